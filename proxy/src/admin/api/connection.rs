//! A connection, as `/connections` and `/status` show it.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use underpass_config::{Hint as _, Quoted};

use super::time::rfc3339;
use crate::decide::authorization::Denial;
use crate::error::{ProxyError, ResponseFlags};
use crate::node::inspection::Connecting;
use crate::observe::party::{Names, Party};
use crate::observe::record::{EndedConnection, Facts, TrackedConnection};

/// One connection. Absent fields are not known, or do not apply.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Connection {
    pub(crate) state: State,
    /// The time of its accept; of its refusal, if it was refused at once. Empty while connecting.
    pub(crate) started: String,
    /// The time of its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ended: Option<String>,
    /// `NAMESPACE/NAME` of the pod whose proxy serves it.
    pub(crate) pod: String,
    /// `inbound` or `outbound`.
    pub(crate) direction: String,
    /// `hbone` or `tcp`.
    pub(crate) protocol: String,
    pub(crate) verdict: Verdict,
    /// The policy that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) policy: Option<String>,
    /// Why it failed or ended early: the reason of the access log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
    pub(crate) source: End,
    pub(crate) destination: End,
    /// The hostname of the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) service: Option<String>,
    /// The address of the HBONE listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hbone_address: Option<SocketAddr>,
    /// Sent to the client.
    pub(crate) bytes_sent: u64,
    /// Received from the client.
    pub(crate) bytes_received: u64,
    /// From the accept to the first byte for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_byte_ms: Option<f64>,
    /// From the accept to the end, or until now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) duration_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trace_id: Option<String>,
}

/// One end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct End {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) workload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    /// The SPIFFE ID that the handshake has proven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) identity: Option<String>,
    /// Whether the workload is only claimed: by the address, or by the peer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_claimed: bool,
}

/// The state of a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Permitted, and not open yet.
    Connecting,
    #[default]
    Open,
    Closed,
    /// It could not be opened.
    Failed,
}

/// The decision about a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    #[default]
    Allowed,
    /// A policy, a limit or a check of this proxy or of the peer refused or terminated it.
    Denied,
    /// It was allowed, and could not be opened.
    Failed,
}

/// The values of `direction`.
pub(crate) const DIRECTIONS: [&str; 2] = ["inbound", "outbound"];
/// The values of `protocol`.
pub(crate) const PROTOCOLS: [&str; 2] = ["hbone", "tcp"];

impl State {
    pub(crate) const ALL: [Self; 4] = [Self::Connecting, Self::Open, Self::Closed, Self::Failed];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Failed => "failed",
        }
    }
}

impl Verdict {
    pub(crate) const ALL: [Self; 3] = [Self::Allowed, Self::Denied, Self::Failed];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

impl Connection {
    /// An open connection.
    pub(crate) fn open(connection: &TrackedConnection) -> Self {
        let duration_ms = Some(milliseconds(connection.accepted.elapsed()));
        Self { state: State::Open, duration_ms, ..Self::tracked(connection) }
    }

    /// A connection that has ended or could not be opened.
    pub(crate) fn ended(ended: &EndedConnection) -> Self {
        let EndedConnection { connection, at, was_open, outcome } = ended;
        let known = Self {
            state: if *was_open { State::Closed } else { State::Failed },
            ended: Some(rfc3339(wall_clock(*at))),
            duration_ms: Some(milliseconds(at.saturating_duration_since(connection.accepted))),
            ..Self::tracked(connection)
        };
        let Err(error) = outcome else { return known };
        let reason = error.reason();
        let verdict = match (reason.flags, was_open) {
            (ResponseFlags::Deny, _) => Verdict::Denied,
            (_, true) => Verdict::Allowed,
            (_, false) => Verdict::Failed,
        };
        Self {
            verdict,
            policy: denying(error).or(known.policy),
            reason: Some(reason.code.to_owned()),
            error: Some(Quoted::chain(error).to_string()),
            hint: error.hint().map(Into::into),
            ..known
        }
    }

    /// A permitted connection that is not open yet.
    pub(crate) fn connecting(connecting: &Connecting) -> Self {
        let Connecting { pod, direction, client, destination, tunnel } = connecting;
        let at = |address| End { address, ..End::default() };
        Self {
            state: State::Connecting,
            pod: pod.to_string(),
            direction: direction.as_str().to_owned(),
            protocol: protocol(tunnel.is_some()).to_owned(),
            source: at(*client),
            destination: at(Some(*destination)),
            hbone_address: *tunnel,
            ..Self::default()
        }
    }

    fn tracked(connection: &TrackedConnection) -> Self {
        let TrackedConnection { pod, facts, accepted, .. } = connection;
        let Facts { direction, source, destination, service, hbone, trace, policy, .. } = facts;
        let [bytes_sent, bytes_received] = connection.bytes();
        Self {
            started: rfc3339(wall_clock(*accepted)),
            pod: pod.to_string(),
            direction: direction.as_str().to_owned(),
            protocol: protocol(hbone.is_some()).to_owned(),
            policy: policy.as_ref().map(ToString::to_string),
            source: source.into(),
            destination: destination.into(),
            service: service.as_ref().map(|service| service.hostname.to_string()),
            hbone_address: *hbone,
            bytes_sent,
            bytes_received,
            first_byte_ms: connection.first_byte().map(milliseconds),
            trace_id: trace.map(|trace| format!("{:032x}", trace.trace_id())),
            ..Self::default()
        }
    }
}

impl From<&Party> for End {
    fn from(party: &Party) -> Self {
        let (proven, claimed) = (party.proven_names(), party.claimed_names());
        let is_claimed = proven.workload.is_none() && claimed != Names::default();
        let names = if is_claimed { claimed } else { proven };
        Self {
            address: party.address,
            workload: names.workload.map(str::to_owned),
            namespace: names.namespace.map(str::to_owned),
            identity: party.identity.as_ref().map(ToString::to_string),
            is_claimed,
        }
    }
}

/// The policy that denied or terminated a connection.
fn denying(error: &ProxyError) -> Option<String> {
    match error {
        ProxyError::Denied(Denial::By(policy)) | ProxyError::DeniedInPlain(Denial::By(policy)) => {
            Some(policy.to_string())
        }
        ProxyError::NoLongerAllowed(error) => denying(error),
        _ => None,
    }
}

fn protocol(has_tunnel: bool) -> &'static str {
    if has_tunnel { "hbone" } else { "tcp" }
}

fn milliseconds(duration: Duration) -> f64 {
    // Exact: below 2^53 microseconds.
    duration.as_micros() as f64 / 1000.0
}

fn wall_clock(at: Instant) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(at.elapsed()).unwrap_or(now)
}
