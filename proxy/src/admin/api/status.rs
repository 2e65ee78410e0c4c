//! The status of the proxy, as `/status` shows it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::connection::Connection;
use super::states::{CertificateState, Installation, Part, PodState, SelfTestState};

/// The status of the proxy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    /// Whether there is no problem.
    pub(crate) healthy: bool,
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) started: String,
    pub(crate) uptime_seconds: u64,
    /// `NAMESPACE/NAME` of the workload, or the name of the node.
    pub(crate) name: String,
    /// `run` or `node`.
    pub(crate) command: String,
    /// `ready`, also with a notice of the source of pods, or every reason why it is not ready.
    pub(crate) readiness: String,
    /// Everything that is pending or wrong.
    pub(crate) problems: Vec<Problem>,
    /// Conditions and events that are worth knowing, although the proxy is healthy.
    pub(crate) notices: Vec<Problem>,
    pub(crate) identities: Vec<Identity>,
    /// Of the only pod of `underpass run`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rules: Option<Rules>,
    pub(crate) mesh: Mesh,
    /// The pods of a node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) pods: Vec<Pod>,
    pub(crate) tunnels: Tunnels,
    pub(crate) connections: Connections,
    pub(crate) failures: Failures,
}

/// Something that is pending or wrong, or a notice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Problem {
    pub(crate) part: Part,
    /// The pod that it concerns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pod: Option<String>,
    pub(crate) problem: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
}

/// The certificate of a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Identity {
    /// The pods that use it.
    pub(crate) pods: Vec<String>,
    pub(crate) spiffe_id: String,
    pub(crate) state: CertificateState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) expires: Option<String>,
    /// Negative after the expiry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) expires_in_seconds: Option<i64>,
}

/// The interception rules of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Rules {
    pub(crate) profile: String,
    pub(crate) state: Installation,
    pub(crate) self_test: SelfTestState,
    /// The number of rules of other programs that precede these.
    pub(crate) foreign: usize,
    /// The number of repairs after changes by other programs.
    pub(crate) repairs: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_repair_seconds_ago: Option<u64>,
}

/// The mesh, and the control plane that sends it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Mesh {
    pub(crate) generation: u64,
    pub(crate) workloads: usize,
    pub(crate) services: usize,
    pub(crate) policies: usize,
    /// The mesh file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) control_plane: Option<ControlPlane>,
}

/// The connection to the control plane.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ControlPlane {
    pub(crate) address: String,
    pub(crate) connected: bool,
    /// How long it is connected or disconnected.
    pub(crate) for_seconds: u64,
    /// Why the last stream ended or could not be opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// A pod of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Pod {
    pub(crate) uid: String,
    /// `NAMESPACE/NAME`.
    pub(crate) pod: String,
    pub(crate) state: PodState,
    /// How long it is pending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) for_seconds: Option<u64>,
    /// The step that it waits for, or its problem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
    /// Whether the last attempt to serve it has failed.
    pub(crate) has_failed: bool,
}

impl Pod {
    /// Whether it is served without a problem.
    pub(crate) fn is_serving(&self) -> bool {
        self.state == PodState::Serving && self.detail.is_none()
    }
}

/// For example `shop/web-1 6f1b8a42 pending for 12 s: waiting for the next attempt: ...`.
impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { uid, pod, state, for_seconds, detail, .. } = self;
        write!(f, "{pod} {uid} {state}")?;
        if let Some(seconds) = for_seconds {
            write!(f, " for {seconds} s")?;
        }
        match detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

/// The tunnels to and of peers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Tunnels {
    pub(crate) outbound: Vec<OutboundTunnels>,
    pub(crate) inbound: Vec<InboundTunnels>,
}

/// The tunnels of a pod to one peer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OutboundTunnels {
    pub(crate) pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<SocketAddr>,
    /// The identities that the peer may have.
    pub(crate) identities: Vec<String>,
    /// Open ones, also those that take no new streams.
    pub(crate) tunnels: usize,
    pub(crate) streams: usize,
    pub(crate) dialing: usize,
    /// The error of the last dial, while no other is attempted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
}

/// The tunnels of one peer to a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct InboundTunnels {
    pub(crate) pod: String,
    pub(crate) identity: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) tunnels: usize,
    /// The age of the oldest one.
    pub(crate) oldest_seconds: u64,
}

/// Open connections.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Connections {
    pub(crate) outbound_hbone: usize,
    pub(crate) outbound_tcp: usize,
    pub(crate) inbound_hbone: usize,
    pub(crate) inbound_tcp: usize,
    /// Being opened, tunnels of peers included.
    pub(crate) opening: usize,
    pub(crate) oldest: Vec<Connection>,
}

/// Failures of the last minutes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Failures {
    /// The number of minutes.
    pub(crate) minutes: usize,
    /// The most frequent reason first.
    pub(crate) connections: Vec<Failure>,
    /// The most recent name first.
    pub(crate) dns: Vec<DnsFailure>,
}

/// Connections that failed or ended early for one reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Failure {
    /// The reason of the access log.
    pub(crate) reason: String,
    pub(crate) count: u64,
    /// The last one that is listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last: Option<Box<Connection>>,
}

/// A name that could not be resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DnsFailure {
    pub(crate) pod: String,
    pub(crate) name: String,
    /// The type of the record, such as `A`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) reason: String,
    pub(crate) count: u64,
    pub(crate) last_seconds_ago: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
}
