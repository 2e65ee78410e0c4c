//! The interface between the privileged side of a pod (listeners, rules) and its data plane, which
//! serves its connections: in this process (`in_process.rs`), or in the proxy process (`broker/`).

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use underpass_config::{InterceptionSettings, PodUid, Settings, WorkloadSettings};
use underpass_interception::NamespaceAccess;

use crate::node::pod_error::PodError;
use crate::rules::self_test::Arrivals;
use crate::traffic::inbound_drain::DrainState;
use crate::traffic::listeners::{DnsKind, Kind, Listeners};

/// Serves the connections of pods.
pub(crate) trait DataPlane: fmt::Debug + Send + Sync {
    /// Accepts the connections of a pod from now on.
    ///
    /// # Errors
    ///
    /// The workers cannot accept, or the pod gets no certificate in time; no connection is served.
    fn serve(&self, pod: PodToServe) -> BoxFuture<'static, Result<Box<dyn ServedPod>, PodError>>;

    /// An address that the mesh gives to another workload than `pod`, and that workload; see
    /// `Snapshot::other_workload`.
    ///
    /// # Errors
    ///
    /// The data plane does not answer.
    fn other_workload(
        &self,
        pod: &WorkloadSettings,
        addresses: Vec<IpAddr>,
    ) -> BoxFuture<'static, Result<Option<(IpAddr, String)>, PodError>>;
}

/// A pod for the data plane.
#[derive(Debug)]
pub(crate) struct PodToServe {
    /// Its uid; `None` for the fixed pod of `underpass run`.
    pub(crate) uid: Option<PodUid>,
    /// The settings of the pod.
    pub(crate) settings: Arc<Settings>,
    /// The current interception settings; a reload changes them.
    pub(crate) interception: watch::Receiver<InterceptionSettings>,
    /// The pod's network namespace, for the sockets of its connections.
    pub(crate) access: NamespaceAccess,
    pub(crate) listeners: Listeners<Kind>,
    /// The listeners of the DNS proxy; empty unless DNS queries are captured.
    pub(crate) dns: Listeners<DnsKind>,
    /// How long the pod waits for its certificate before it accepts. Without one after this time,
    /// it is not served. `None`: it accepts at once, and its tunnels wait for the certificate.
    pub(crate) certificate_within: Option<Duration>,
}

/// A pod whose connections are served. Dropping it closes its listeners, and each tunnel when its
/// last stream ends.
pub(crate) trait ServedPod: fmt::Debug + Send + Sync {
    /// Detects the test connections of this pod.
    fn arrivals(&self) -> Arc<dyn Arrivals>;

    /// The state of the certificate for the pod's tunnels, as the status of the pod in this process
    /// shows it.
    fn certificate(&self) -> CertificateState;

    /// Whether an operator drains the pod, as the status of the pod in this process shows it.
    fn drain_state(&self) -> DrainState;

    /// Whether the certificate is valid, or the pod needs none.
    fn has_certificate(&self) -> BoxFuture<'static, bool>;

    /// Stops accepting, while another process takes over: connections wait in the queues of the
    /// listeners.
    fn pause_accepting(&self) -> BoxFuture<'static, ()>;

    /// Accepts again.
    fn resume_accepting(&self);

    /// Closes the listeners. Tunnels accept no new streams.
    fn stop_accepting(&self) -> BoxFuture<'_, ()>;

    /// Waits until `deadline` for the end of the connections, and terminates the rest. Returns the
    /// number of terminated ones. Cancel-safe until the deadline.
    fn drain(&self, deadline: Duration) -> BoxFuture<'_, usize>;

    /// Terminates the remaining connections, and closes the tunnels and sockets. Afterwards the
    /// data plane has no socket in the pod's namespace.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// The state of a pod's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CertificateState {
    /// The certificate is valid, or the pod needs none.
    Valid,
    /// The first certificate is not issued yet.
    Awaited,
    Expired,
}
