//! A pod: the state that belongs to one workload and its network namespace.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use underpass_config::{InterceptionSettings, Settings, SpiffeId, Workload};
use underpass_interception::{
    InterceptionError, LocalAddresses, NamespaceAccess, Pacing, Sockets, ipv6_available,
};

use crate::decide::connection_registry::Registries;
use crate::decide::endpoint_health::EndpointHealth;
use crate::decide::policy::PolicyContext;
use crate::decide::subject::Decision;
use crate::limits::PodLimits;
use crate::node::Node;
use crate::node::identities::CredentialLease;
use crate::node::sockets::PodSockets;
use crate::rules::self_test::SelfTest;

/// Distinguishes the pods of this process. An id is never used again, unlike an address in memory
/// or a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PodId(u64);

impl PodId {
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// One pod. Its connections and tunnels hold it, so that it ends with the last of them.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) id: PodId,
    /// The pod's own workload, and the settings that permits depend on.
    pub(crate) context: PolicyContext,
    /// Limits of its connections.
    pub(crate) limits: PodLimits,
    /// The sockets to connect with, which the rules of this pod let pass.
    pub(crate) sockets: Arc<PodSockets>,
    /// The current certificate and trust bundle; `None` without a certificate.
    pub(crate) credentials: Option<CredentialLease>,
    /// The endpoints of services to which this pod could not connect.
    pub(crate) endpoints: Arc<EndpointHealth>,
    pub(crate) self_test: SelfTest,
    /// The interception settings, which a reload changes.
    pub(crate) interception: watch::Receiver<InterceptionSettings>,
    /// Counts and terminates the connections, tunnels and streams of the pod.
    pub(crate) connections: Registries<Decision>,
    /// Answers whether an address is the pod's own.
    pub(crate) local: LocalAddresses,
    /// Cancelled when the pod or the process drains: its tunnels take no new streams.
    pub(crate) closing: CancellationToken,
    /// Counts its seats, which hold its tunnels.
    pub(crate) seats: TaskTracker,
}

/// How the sockets of a pod are made.
pub(crate) fn pod_sockets(settings: &Settings) -> Sockets {
    Sockets::new(&settings.interception, ipv6_available())
        .with_keepalive(settings.timeouts.keepalive)
        .with_pacing(Pacing::of_namespace(settings.proxy.pacing))
}

impl Pod {
    /// The pod of the namespace of `access`, with these credentials.
    pub(crate) async fn open(
        node: &Node,
        settings: &Settings,
        access: &NamespaceAccess,
        credentials: Option<CredentialLease>,
        interception: watch::Receiver<InterceptionSettings>,
    ) -> Result<Self, InterceptionError> {
        let sockets = pod_sockets(settings);
        Ok(Self {
            id: PodId::next(),
            context: PolicyContext::of(settings),
            limits: node.limits.pod(),
            sockets: PodSockets::new(access.clone(), sockets, node.limits.descriptors.clone()),
            credentials,
            endpoints: Arc::default(),
            self_test: SelfTest::default(),
            interception,
            connections: Registries::new(node.workers),
            local: access.local_addresses().await?,
            closing: node.drain.closing_of_pod(),
            seats: TaskTracker::new(),
        })
    }

    /// The identity of the current certificate.
    pub(crate) fn identity(&self) -> Option<SpiffeId> {
        self.credentials.as_ref().map(CredentialLease::identity)
    }

    /// Whether the pod can be `workload`: a pod that proves another identity only has its address.
    pub(crate) fn can_be(&self, workload: &Workload) -> bool {
        self.credentials.as_ref().is_none_or(|credentials| credentials.prove(&workload.identity))
    }

    /// Whether the identity of the pod's certificate is that of `workload`.
    pub(crate) fn proves(&self, workload: &Workload) -> bool {
        self.credentials.is_some() && self.can_be(workload)
    }

    /// Whether connections go out of the pod that are not the workload's own: those of virtual
    /// machines and containers, and those that an ingress gateway sends from its clients'
    /// addresses.
    pub(crate) fn accepts_foreign_sources(&self) -> bool {
        let settings = self.interception.borrow();
        settings.ingress || !settings.virtual_interfaces.is_empty()
    }
}
