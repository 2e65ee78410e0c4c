//! The messages between the broker and the proxy process, one JSON value for each message.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use underpass_config::{SpiffeError, SpiffeId};
use underpass_hbone::{HboneError, Identity, IdentityPem};
use underpass_interception::{Family, SocketKind, SocketRole};

use crate::admin::api::status::Pod;
use crate::admin::readiness::SourceReport;
use crate::pods::facts::wire::WireDns;
use crate::rules::health::RulesState;

/// The maximum length of a message in bytes. The kernel's default limit, with overhead, is 212,992
/// (`net.core.wmem_default`).
pub(crate) const MAX_MESSAGE: usize = 128 << 10;
/// The maximum number of sockets in one answer: what one message can carry.
pub(crate) const MAX_SOCKETS: usize = 64;

/// The name of the Unix socket of administration among the endpoints.
pub(crate) const ADMIN_SOCKET: &str = "admin-socket";

/// A message that can be encoded and decoded.
pub(crate) trait Message: Serialize + for<'a> Deserialize<'a> + fmt::Debug {
    /// Its bytes; `None` if it is too long.
    fn encode(&self) -> Option<Vec<u8>> {
        serde_json::to_vec(self).ok().filter(|bytes| bytes.len() <= MAX_MESSAGE)
    }

    /// The message of these bytes.
    fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// From the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum ToProxy {
    /// The first message. Attached: the sockets of the endpoints, in this order. If `paused`, the
    /// endpoints accept from [`ToProxy::Serving`] on, because another process accepts until then.
    Start { settings: String, endpoints: Vec<String>, paused: bool },
    /// Answered by [`ToBroker::Done`] with this number.
    Command { number: u64, command: Command },
    /// Answered by [`ToBroker::Done`] with this number and [`Outcome::Readiness`], also before
    /// [`ToBroker::Ready`].
    Readiness { number: u64 },
    /// The answer to a request. Attached: its sockets.
    Answer { number: u64, answer: Result<Answer, Refusal> },
    /// A certificate of the identity of served pods.
    Certificate(Certificate),
    /// No pod with this SPIFFE ID is served any longer.
    DropCertificate { identity: String },
    /// The interception settings of a pod have changed.
    Interception { pod: PodKey, interception: String },
    /// The self-test has ended: all connections are served.
    EndTest { pod: PodKey },
    /// The settings of the log have changed: all settings, with those of the log.
    Logging { settings: String },
    /// A metric of the broker.
    Metric(Metric),
    /// A report of the source of pods.
    Source(SourceReport),
    /// The state of the rules of the pod of `underpass run`.
    Rules(RulesState),
    /// The node serves its pods.
    Serving,
    /// The node stops.
    Draining,
    /// Another process has taken over: the endpoints close, and the pods drain.
    HandedOver,
    /// All pods are closed: the process ends.
    End,
}

/// A command to the proxy process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Command {
    /// Answered once every worker has answered.
    Ping,
    /// Serve a pod. Attached: its listeners, in this order, and a socket to look up its addresses.
    Serve(PodToStart),
    /// Answered by [`Outcome::OtherWorkload`] for the pod with this namespace and name.
    FindOtherWorkload {
        namespace: String,
        name: String,
        addresses: Vec<IpAddr>,
    },
    /// Connections to `destination` are those of the self-test.
    Expect {
        pod: PodKey,
        destination: SocketAddr,
    },
    /// Whether the pod has a valid certificate, or needs none.
    HasCertificate {
        pod: PodKey,
    },
    /// Connections wait in the queues of the listeners while another process takes over.
    PauseAccepting {
        pod: PodKey,
    },
    ResumeAccepting {
        pod: PodKey,
    },
    PauseEndpoints,
    ResumeEndpoints,
    StopAccepting {
        pod: PodKey,
    },
    Drain {
        pod: PodKey,
        deadline: Duration,
    },
    /// Terminate all connections of the pod, and close its tunnels and sockets.
    Close {
        pod: PodKey,
    },
}

/// A pod that the proxy process will serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PodToStart {
    pub(crate) pod: PodKey,
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    /// The interception settings as a settings file.
    pub(crate) interception: String,
    /// The pod's resolver settings.
    pub(crate) dns: WireDns,
    pub(crate) listeners: Vec<String>,
    /// Accept once the certificate is issued. Without one after this time the outcome is
    /// [`Outcome::CertificateLate`].
    pub(crate) certificate_within: Option<Duration>,
}

/// Names a pod that is served: a uid can be enrolled again in another namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PodKey {
    pub(crate) uid: String,
    /// Never used again.
    pub(crate) enrolment: u64,
}

/// From the proxy process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum ToBroker {
    /// Mesh and trust are loaded.
    Loaded,
    /// The workers run.
    Ready,
    /// The outcome of a command.
    Done { number: u64, outcome: Result<Outcome, String> },
    /// A connection of the self-test has arrived.
    Arrived { pod: PodKey },
    /// Answered by [`ToProxy::Answer`] with this number.
    Request { number: u64, request: Request },
}

/// The outcome of a command that was performed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Outcome {
    Done,
    /// `ready`, or the reasons why the process is not ready.
    Readiness(String),
    /// An address that the mesh gives to another workload, and that workload.
    OtherWorkload(Option<(IpAddr, String)>),
    /// Whether the pod has a certificate.
    HasCertificate(bool),
    /// The pod is not served: it got no certificate in time.
    CertificateLate,
    /// The number of connections that a drain has terminated.
    Terminated(usize),
}

/// Everything that the proxy process can request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Request {
    /// Sockets to connect with.
    Sockets { of: SocketsOf, kind: WireKind, count: usize },
    /// The status of the pods after the first `skip` ones.
    Pods { skip: usize },
    /// The rules of the pod with this name, `NAMESPACE/NAME`, with their counters.
    Rules { pod: String },
}

/// The network namespace of requested sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum SocketsOf {
    /// The node's own, for its CA, its control plane and lookups of hostnames.
    Node,
    Pod(PodKey),
}

/// The kind of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireKind {
    pub(crate) v6: bool,
    pub(crate) role: WireRole,
}

/// The role of a socket's destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum WireRole {
    Upstream,
    Workload,
    NameServer,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Answer {
    /// The sockets are attached.
    Sockets,
    Pods {
        /// Without the states of their certificates.
        pods: Vec<Pod>,
        more: bool,
    },
    /// A socket is attached, from which a JSON object is read: it may be longer than a message.
    Rules,
    /// No pod has the name of the request.
    NoSuchPod,
}

/// Why the broker does not do what is requested.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Refusal {
    #[error("the message is malformed")]
    Malformed,
    #[error("the message has descriptors attached")]
    Descriptors,
    #[error("the message answers no command")]
    UnexpectedAnswer,
    #[error("no such pod is served")]
    UnknownPod,
    #[error("{0} sockets were requested: 1 to {MAX_SOCKETS} are allowed")]
    SocketCount(usize),
    #[error("the settings need no such connections of the node itself")]
    SocketsOfNode,
    /// The request is allowed, and the operation failed.
    #[error("{0}")]
    Failed(String),
}

/// A certificate chain, its key, and the roots by trust domain, in PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Certificate {
    /// The SPIFFE ID of the workload; that in the certificate may differ if it comes from files.
    workload: String,
    chain: String,
    key: String,
    bundles: BTreeMap<String, String>,
}

/// Why a certificate of the broker is not usable.
#[derive(Debug, Error)]
pub(crate) enum CertificateError {
    #[error("the SPIFFE ID of a workload or the name of a trust domain is malformed")]
    Name(#[from] SpiffeError),
    #[error(transparent)]
    Identity(#[from] HboneError),
}

/// A change of a metric.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Metric {
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) change: Change,
}

/// How a metric changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Change {
    /// Increments a counter.
    Count(u64),
    /// Sets a gauge to the number with these bits: JSON would round it.
    Set { bits: u64 },
}

impl Message for ToProxy {}
impl Message for ToBroker {}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uid)
    }
}

impl Refusal {
    /// The label of the metric; `None` for a failure, which is not the fault of the proxy process.
    pub(crate) fn reason(&self) -> Option<&'static str> {
        Some(match self {
            Self::Malformed | Self::Descriptors => "malformed",
            Self::UnexpectedAnswer => "unexpected_answer",
            Self::UnknownPod => "unknown_pod",
            Self::SocketCount(_) => "socket_count",
            Self::SocketsOfNode => "sockets_of_node",
            Self::Failed(_) => return None,
        })
    }
}

/// Without the key.
impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("chain", &self.chain).finish_non_exhaustive()
    }
}

impl Certificate {
    pub(crate) fn new(workload: &SpiffeId, identity: IdentityPem) -> Self {
        let IdentityPem { chain, key, bundles } = identity;
        let bundles = bundles.into_iter().map(|(domain, roots)| (domain.to_string(), roots));
        Self { workload: workload.to_string(), chain, key, bundles: bundles.collect() }
    }

    /// The workload and its identity.
    pub(crate) fn identity(self) -> Result<(SpiffeId, Identity), CertificateError> {
        let Self { workload, chain, key, bundles } = self;
        let parse = |(domain, roots): (String, String)| Ok((domain.parse()?, roots));
        let bundles = bundles.into_iter().map(parse).collect::<Result<_, SpiffeError>>();
        let pem = IdentityPem { chain, key, bundles: bundles? };
        Ok((workload.parse()?, pem.identity(Path::new("the broker's certificate"))?))
    }
}

impl From<SocketKind> for WireKind {
    fn from(kind: SocketKind) -> Self {
        let role = match kind.role {
            SocketRole::Upstream => WireRole::Upstream,
            SocketRole::Workload => WireRole::Workload,
            SocketRole::NameServer => WireRole::NameServer,
        };
        Self { v6: kind.family == Family::V6, role }
    }
}

impl From<WireKind> for SocketKind {
    fn from(WireKind { v6, role }: WireKind) -> Self {
        let family = if v6 { Family::V6 } else { Family::V4 };
        let role = match role {
            WireRole::Upstream => SocketRole::Upstream,
            WireRole::Workload => SocketRole::Workload,
            WireRole::NameServer => SocketRole::NameServer,
        };
        Self { family, role }
    }
}

/// Decodes the bytes as a message of each side. Panics if a decoded message changes when it is
/// encoded and decoded again. For the fuzz target and the tests.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn check_bytes(bytes: &[u8]) {
    fn check<M: Message + PartialEq>(bytes: &[u8]) {
        let Some(message) = M::decode(bytes) else { return };
        // An escaped text can be longer than the message that it came in.
        let Some(encoded) = message.encode() else { return };
        assert_eq!(M::decode(&encoded), Some(message));
    }
    check::<ToProxy>(bytes);
    check::<ToBroker>(bytes);
}
