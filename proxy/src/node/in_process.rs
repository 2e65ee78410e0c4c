//! The data plane of this process: its workers serve the pods.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::timeout;
use underpass_config::WorkloadSettings;

use crate::dns::service::DnsService;
use crate::limits::FdPermit;
use crate::node::Node;
use crate::node::data_plane::{CertificateState, DataPlane, PodToServe, ServedPod};
use crate::node::identities::Identities;
use crate::node::pod::Pod;
use crate::node::pod_error::PodError;
use crate::node::workers::Workers;
use crate::rules::self_test::Arrivals;
use crate::traffic::drain::drain;
use crate::traffic::inbound_drain::DrainState;

/// The workers of this process. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct InProcess {
    pub(crate) node: Arc<Node>,
    pub(crate) workers: Workers,
    /// `None` without certificates: HBONE is off.
    pub(crate) identities: Option<Arc<Identities>>,
}

impl DataPlane for InProcess {
    fn serve(&self, pod: PodToServe) -> BoxFuture<'static, Result<Box<dyn ServedPod>, PodError>> {
        let this = self.clone();
        Box::pin(async move { this.open(pod).await })
    }

    fn other_workload(
        &self,
        pod: &WorkloadSettings,
        addresses: Vec<IpAddr>,
    ) -> BoxFuture<'static, Result<Option<(IpAddr, String)>, PodError>> {
        let other = self.node.mesh.borrow().other_workload(pod, &addresses);
        Box::pin(async { Ok(other) })
    }
}

impl InProcess {
    async fn open(self, pod: PodToServe) -> Result<Box<dyn ServedPod>, PodError> {
        let PodToServe {
            settings, interception, access, listeners, dns, certificate_within, ..
        } = pod;
        let identities = self.identities.as_ref();
        let credentials =
            identities.map(|identities| identities.lease_awaited(&settings.workload.spiffe_id));
        if let (Some(limit), Some(lease)) = (certificate_within, &credentials) {
            let issued = timeout(limit, lease.first()).await;
            issued.map_err(|_| PodError::CertificateLate(limit))?.map_err(PodError::Identity)?;
        }
        let pod = Pod::open(&self.node, &settings, &access, credentials, interception).await?;
        let descriptors = &self.node.limits.descriptors;
        let has_dns_proxy = !dns.is_empty();
        let idle = || descriptors.hold_of_idle_pod(has_dns_proxy);
        let descriptors = self.node.has_many_pods.then(idle);
        let served =
            LocalPod { pod: Arc::new(pod), workers: self.workers, _descriptors: descriptors };
        let LocalPod { pod, workers, .. } = &served;
        let mut added = workers.add_listeners(pod, listeners.into_kinds()).await;
        if added.is_ok() && has_dns_proxy {
            let service = DnsService::of_pod(&self.node, pod, &settings);
            added = workers.add_dns(pod, service, dns).await;
        }
        if let Err(error) = added {
            served.stop_accepting().await;
            served.close().await;
            return Err(PodError::Accept(error));
        }
        Ok(Box::new(served))
    }
}

/// A pod that the workers of this process serve.
#[derive(Debug)]
struct LocalPod {
    pod: Arc<Pod>,
    workers: Workers,
    /// The descriptors of an idle pod of a node. `None` for the only pod of `underpass run`: its
    /// descriptors were counted as open files at the start.
    _descriptors: Option<FdPermit>,
}

impl LocalPod {
    /// Waits until the waiting DNS queries are answered and the connections of DNS are closed.
    async fn queries_answered(&self) {
        self.pod.queries.close();
        self.pod.queries.wait().await;
    }
}

impl ServedPod for LocalPod {
    fn arrivals(&self) -> Arc<dyn Arrivals> {
        Arc::new(self.pod.self_test.clone())
    }

    fn certificate(&self) -> CertificateState {
        let Some(lease) = &self.pod.credentials else { return CertificateState::Valid };
        match lease.is_expired() {
            Some(false) => CertificateState::Valid,
            Some(true) => CertificateState::Expired,
            None => CertificateState::Awaited,
        }
    }

    fn drain_state(&self) -> DrainState {
        self.pod.inbound_drain.state()
    }

    fn has_certificate(&self) -> BoxFuture<'static, bool> {
        let has_certificate = self.certificate() == CertificateState::Valid;
        Box::pin(async move { has_certificate })
    }

    fn pause_accepting(&self) -> BoxFuture<'static, ()> {
        let gate = self.pod.accepting.clone();
        Box::pin(async move { gate.close().await })
    }

    fn resume_accepting(&self) {
        self.pod.accepting.open();
    }

    fn stop_accepting(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.workers.remove_listeners(self.pod.id).await;
            self.pod.closing.cancel();
        })
    }

    fn drain(&self, deadline: Duration) -> BoxFuture<'_, usize> {
        Box::pin(async move {
            let queries = timeout(deadline, self.queries_answered());
            tokio::join!(drain(&self.pod.connections, deadline), queries).0
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            drain(&self.pod.connections, Duration::ZERO).await;
            self.pod.sockets.close();
            self.workers.close_tunnels(&self.pod).await;
        })
    }
}

impl Drop for LocalPod {
    fn drop(&mut self) {
        self.pod.closing.cancel();
        self.pod.sockets.close();
    }
}
