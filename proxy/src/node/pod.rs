//! A pod: the state of one workload and its network namespace.

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
use crate::dns::failed_names::FailedNames;
use crate::limits::PodLimits;
use crate::mesh::on_demand::Lookups;
use crate::node::Node;
use crate::node::identities::CredentialLease;
use crate::node::sockets::PodSockets;
use crate::observe::pod_name::PodName;
use crate::process::pause_gate::PauseGate;
use crate::rules::self_test::SelfTest;
use crate::traffic::inbound_drain::InboundDrain;

/// A process-wide unique id of a pod. Unlike a memory address or a name it is never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PodId(u64);

impl PodId {
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// One pod. Its connections and tunnels own it, so it ends with the last of them.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) id: PodId,
    /// Shared with the records of its connections.
    pub(crate) name: Arc<PodName>,
    /// The inputs of policy decisions: the pod's own workload, and settings.
    pub(crate) context: PolicyContext,
    /// The limits of the pod's connections.
    pub(crate) limits: PodLimits,
    /// The sockets for upstream connections, which the pod's rules do not capture.
    pub(crate) sockets: Arc<PodSockets>,
    /// The current certificate and trust bundle; `None` without a certificate.
    pub(crate) credentials: Option<CredentialLease>,
    /// The health of the endpoints, according to the connections of this pod.
    pub(crate) endpoints: Arc<EndpointHealth>,
    pub(crate) self_test: SelfTest,
    /// Closed while another process takes the pod over. A fixed pod uses the gate of the process.
    pub(crate) accepting: PauseGate,
    /// The current interception settings; a reload changes them.
    pub(crate) interception: watch::Receiver<InterceptionSettings>,
    /// Counts and terminates the connections, tunnels and streams of the pod.
    pub(crate) connections: Registries<Decision>,
    /// Asks the kernel whether an address is the pod's own.
    pub(crate) local: LocalAddresses,
    /// Cancelled when the pod or the process drains: tunnels then accept no new streams.
    pub(crate) closing: CancellationToken,
    /// Refuses and ends inbound connections at the request of an operator.
    pub(crate) inbound_drain: InboundDrain,
    /// Counts the pod's seats, which own its tunnels.
    pub(crate) seats: TaskTracker,
    /// Counts the DNS queries over UDP that wait, and the connections of DNS over TCP.
    pub(crate) queries: TaskTracker,
    /// The DNS names that could not be resolved recently.
    pub(crate) failed_names: Arc<FailedNames>,
    /// The lookups on demand of addresses and names that the mesh does not have yet.
    pub(crate) lookups: Lookups,
}

/// The options of a pod's sockets.
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
        let (sockets, closing) = (pod_sockets(settings), node.drain.closing_of_pod());
        Ok(Self {
            id: PodId::next(),
            name: Arc::new((&settings.workload).into()),
            context: PolicyContext::new(settings),
            limits: node.limits.pod(),
            sockets: PodSockets::new(access.clone(), sockets, node.limits.descriptors.clone()),
            credentials,
            endpoints: Arc::default(),
            self_test: SelfTest::default(),
            accepting: node.accepting_of_pod(),
            interception,
            connections: Registries::new(node.workers),
            local: access.local_addresses().await?,
            inbound_drain: InboundDrain::new(&closing),
            closing,
            seats: TaskTracker::new(),
            queries: TaskTracker::new(),
            failed_names: Arc::default(),
            lookups: node.lookups.of_pod(),
        })
    }

    pub(crate) fn identity(&self) -> Option<SpiffeId> {
        self.credentials.as_ref().map(CredentialLease::identity)
    }

    /// Whether the pod may be `workload`: its certificate has the identity of `workload`, or it has
    /// no certificate.
    pub(crate) fn may_have_identity_of(&self, workload: &Workload) -> bool {
        self.credentials.as_ref().is_none_or(|credentials| credentials.proves(&workload.identity))
    }

    /// Whether the identity of the pod's certificate is that of `workload`.
    pub(crate) fn proves(&self, workload: &Workload) -> bool {
        self.credentials.is_some() && self.may_have_identity_of(workload)
    }

    /// Whether outbound connections may have another source than the workload: a virtual machine or
    /// container in the pod, or a client of an ingress gateway that keeps client addresses.
    pub(crate) fn accepts_foreign_sources(&self) -> bool {
        let settings = self.interception.borrow();
        settings.ingress || !settings.virtual_interfaces.is_empty()
    }
}
