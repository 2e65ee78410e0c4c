//! Errors of connections, and their mapping to log codes, HTTP statuses and metric labels.
//!
//! One function ([`ProxyError::reason`]) maps each error to all three, so that they are consistent.
//! `error/hint.rs` has the hints for the operator.

mod hint;

use std::borrow::Cow;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use thiserror::Error;
use underpass_config::{Hint, Quoted, SpiffeId, Workload};
use underpass_hbone::HboneError;
use underpass_interception::is_out_of_files;

use crate::decide::authorization::Denial;
use crate::decide::resolve::ResolveError;
use crate::decide::route::RouteError;
use crate::limits::Refusal;
use crate::mesh::on_demand::LookupError;

/// The reason why a connection failed or ended early.
#[derive(Debug, Error)]
pub(crate) enum ProxyError {
    #[error("the connection was not captured by a rule, so it has no original destination")]
    NotCaptured(#[source] io::Error),
    #[error("the destination {0} is this proxy's own listener")]
    OwnListener(SocketAddr),
    #[error("the destination {0} of an inbound connection is not an address of this pod")]
    NotLocal(SocketAddr),
    #[error("cannot check whether {destination} is an address of this pod")]
    LocalUnknown { destination: SocketAddr, source: io::Error },
    #[error("the source {0} of an outbound connection is not an address of this pod")]
    ForeignSource(SocketAddr),
    #[error("cannot check whether {client} is an address of this pod")]
    SourceUnknown { client: SocketAddr, source: io::Error },
    #[error("{0} requires HBONE, and this proxy has no certificate")]
    NoIdentity(SocketAddr),
    #[error("no certificate for {id} was issued within {}", seconds(after))]
    CertificateAwaited { id: SpiffeId, after: Duration },
    #[error("the mesh has no workload {pod} with this pod's identity {id}")]
    PodNotInMesh { pod: String, id: SpiffeId },
    #[error(
        "the mesh has {workload} in the network {:?}, and this proxy is in {network:?}",
        &*workload.network
    )]
    OtherNetwork { workload: Arc<Workload>, network: String },
    #[error("the control plane has not sent the workload {pod}, so its policies are unknown")]
    WorkloadNotSent { pod: String },
    #[error(transparent)]
    Lookup(LookupError),
    #[error("too many TLS handshakes of {0} are in progress (limits.handshakes_per_source)")]
    TooManyHandshakes(IpAddr),
    #[error(
        "the TLS handshake did not start within {}: too many others are in progress (limits.handshakes)",
        seconds(after)
    )]
    HandshakeNotBegun { after: Duration },
    #[error("{0}")]
    TooManyConnections(Refusal),
    #[error("no file descriptor is left for a connection")]
    OutOfDescriptors,
    #[error("{0}")]
    Denied(Denial),
    #[error("{0} (a plaintext client has no identity)")]
    DeniedInPlain(Denial),
    #[error("plaintext to {0} is refused: proxy.mtls or one of proxy.mtls_overrides is strict")]
    PlaintextRefused(SocketAddr),
    #[error("{0} is not in the mesh, and egress is limited to the mesh (egress: mesh-only)")]
    Egress(SocketAddr),
    #[error("a plaintext connection to {0} is refused: its protocol in the mesh is HBONE")]
    PlaintextToHbone(SocketAddr),
    #[error("after a change of the mesh, {hop} belongs to {workload}, which has another identity")]
    OtherIdentity { hop: SocketAddr, workload: Arc<Workload> },
    #[error("terminated by a change of the mesh: the connection is no longer allowed")]
    NoLongerAllowed(#[source] Box<Self>),
    #[error("no route to the destination")]
    Route(#[source] RouteError),
    #[error("cannot resolve the endpoint's hostname")]
    Resolve(#[source] ResolveError),
    #[error("cannot connect to {destination}")]
    Connect { destination: SocketAddr, source: io::Error },
    #[error("no answer from {destination} within {}", seconds(after))]
    ConnectTimeout { destination: SocketAddr, after: Duration },
    #[error("the tunnel failed")]
    Tunnel(#[source] HboneError),
    #[error("the client's connection failed")]
    Client(#[source] io::Error),
    #[error("the upstream connection failed")]
    Upstream(#[source] io::Error),
    #[error("no data in either direction for {} (timeouts.idle)", seconds(after))]
    IdleTimeout { after: Duration },
    #[error(
        "one side sent its FIN, and the other sent no data for {} (timeouts.half_close)",
        seconds(after)
    )]
    HalfCloseTimeout { after: Duration },
    #[error("the proxy stops, and the drain deadline passed (timeouts.drain)")]
    Drained,
    #[error("the pod takes no new inbound connections: an operator drains it")]
    Draining,
    #[error("an operator drains the pod, and the deadline passed")]
    DrainedByRequest,
    #[error("the connection was cancelled")]
    Dropped,
}

fn seconds(duration: &Duration) -> String {
    format!("{} s", duration.as_secs_f32())
}

/// The party at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Client,
    Peer,
    Us,
}

/// The values of ztunnel's metric label `response_flags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResponseFlags {
    None,
    Deny,
    Connect,
    TlsFailure,
    H2HandshakeFailure,
    IdentityError,
}

impl ResponseFlags {
    pub(crate) const ALL: [Self; 6] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::IdentityError,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::IdentityError => "IDENTITY_ERROR",
        }
    }
}

/// The representation of an error in the log, in metrics and in the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reason {
    /// A stable code for the access log (`reason=`).
    pub(crate) code: &'static str,
    /// ztunnel's `response_flags` label.
    pub(crate) flags: ResponseFlags,
    pub(crate) fault: Fault,
    /// The status of the response to a CONNECT request.
    pub(crate) status: StatusCode,
}

impl ProxyError {
    /// An error of a tunnel. A lack of file descriptors is not the peer's fault.
    pub(crate) fn tunnel(error: HboneError) -> Self {
        if lacks_descriptor(&error) { Self::OutOfDescriptors } else { Self::Tunnel(error) }
    }

    /// Whether another endpoint of the service may be tried: no data has been sent, and the error
    /// is not a decision against the connection.
    pub(crate) fn is_endpoint_failure(&self) -> bool {
        match self {
            Self::Resolve(..) | Self::Connect { .. } | Self::ConnectTimeout { .. } => true,
            Self::Tunnel(error) => is_peer_failure(error),
            _ => false,
        }
    }

    pub(crate) fn reason(&self) -> Reason {
        use Fault::{Client, Peer, Us};
        use ResponseFlags::{Connect, Deny, IdentityError};
        let (code, flags, fault, status) = match self {
            Self::NotCaptured(_) => ("not_captured", Deny, Client, StatusCode::BAD_REQUEST),
            Self::OwnListener(_) => ("own_listener", Deny, Client, StatusCode::SERVICE_UNAVAILABLE),
            Self::NotLocal(_) => ("not_local", Deny, Client, StatusCode::BAD_REQUEST),
            Self::LocalUnknown { .. } => ("not_local", Deny, Us, StatusCode::SERVICE_UNAVAILABLE),
            Self::ForeignSource(_) => ("foreign_source", Deny, Client, StatusCode::BAD_REQUEST),
            Self::SourceUnknown { .. } => {
                ("foreign_source", Deny, Us, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::NoIdentity(_) => {
                ("no_identity", IdentityError, Us, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::CertificateAwaited { .. } => {
                ("certificate_awaited", IdentityError, Us, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::PodNotInMesh { .. }
            | Self::OtherNetwork { .. }
            | Self::WorkloadNotSent { .. } => {
                ("pod_not_in_mesh", Deny, Us, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::Lookup(_) => ("lookup", Connect, Us, StatusCode::SERVICE_UNAVAILABLE),
            Self::TooManyHandshakes(_) | Self::HandshakeNotBegun { .. } => {
                ("too_many_handshakes", Deny, Peer, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::OutOfDescriptors
            | Self::TooManyConnections(Refusal::Descriptors | Refusal::DescriptorShare(_)) => {
                ("out_of_descriptors", Connect, Us, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::TooManyConnections(_) => {
                ("too_many_connections", Deny, Client, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::Denied(_) | Self::DeniedInPlain(_) => {
                ("policy_denied", Deny, Client, StatusCode::UNAUTHORIZED)
            }
            Self::PlaintextRefused(_) => {
                ("plaintext_refused", Deny, Client, StatusCode::UNAUTHORIZED)
            }
            Self::Egress(_) => ("egress_denied", Deny, Client, StatusCode::FORBIDDEN),
            Self::PlaintextToHbone(_) => {
                ("plaintext_to_hbone", Deny, Client, StatusCode::FORBIDDEN)
            }
            Self::OtherIdentity { .. } => {
                ("other_identity", IdentityError, Peer, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::NoLongerAllowed(_) => {
                ("no_longer_allowed", Deny, Client, StatusCode::UNAUTHORIZED)
            }
            // A tunnel's request for another workload is the peer's fault. A failed route of a
            // captured connection is the mesh's.
            Self::Route(RouteError::NotHere { .. }) => {
                ("not_here", Deny, Client, StatusCode::BAD_REQUEST)
            }
            Self::Route(error) => (error.code(), Connect, Us, StatusCode::SERVICE_UNAVAILABLE),
            Self::Resolve(..) => ("resolve", Connect, Us, StatusCode::SERVICE_UNAVAILABLE),
            Self::Connect { .. } => ("connect", Connect, Peer, StatusCode::SERVICE_UNAVAILABLE),
            Self::ConnectTimeout { .. } => {
                ("connect_timeout", Connect, Peer, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::Tunnel(error) => return tunnel_reason(error),
            Self::Client(_) => {
                ("client_reset", ResponseFlags::None, Client, StatusCode::BAD_GATEWAY)
            }
            Self::Upstream(_) => {
                ("upstream_reset", ResponseFlags::None, Peer, StatusCode::BAD_GATEWAY)
            }
            Self::IdleTimeout { .. } => {
                ("idle_timeout", ResponseFlags::None, Client, StatusCode::GATEWAY_TIMEOUT)
            }
            Self::HalfCloseTimeout { .. } => {
                ("half_close_timeout", ResponseFlags::None, Client, StatusCode::GATEWAY_TIMEOUT)
            }
            Self::Draining => ("draining", Deny, Us, StatusCode::SERVICE_UNAVAILABLE),
            Self::Drained | Self::DrainedByRequest => {
                ("drained", ResponseFlags::None, Us, StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::Dropped => ("dropped", ResponseFlags::None, Us, StatusCode::SERVICE_UNAVAILABLE),
        };
        Reason { code, flags, fault, status }
    }
}

fn lacks_descriptor(error: &HboneError) -> bool {
    match error {
        HboneError::Dial { source, .. } => is_out_of_files(source),
        HboneError::BehindGateway { source, .. } | HboneError::BackingOff { source, .. } => {
            lacks_descriptor(source)
        }
        _ => false,
    }
}

fn is_peer_failure(error: &HboneError) -> bool {
    use StatusCode as Status;
    match error {
        HboneError::Refused { status } => matches!(
            *status,
            Status::BAD_GATEWAY | Status::SERVICE_UNAVAILABLE | Status::GATEWAY_TIMEOUT
        ),
        HboneError::BehindGateway { source, .. } | HboneError::BackingOff { source, .. } => {
            is_peer_failure(source)
        }
        error => error.fault() == underpass_hbone::Fault::Peer,
    }
}

/// The chain of causes, outermost first: `cannot connect to 10.0.0.1:80: Connection refused`.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// The text and the hint of an error that `underpass status` shows later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Described {
    pub(crate) error: String,
    pub(crate) hint: Option<Cow<'static, str>>,
}

impl Described {
    pub(crate) fn new(error: &(impl Hint + 'static)) -> Self {
        Self { error: Quoted::chain(error).to_string(), hint: error.hint() }
    }
}

fn tunnel_reason(error: &HboneError) -> Reason {
    let flags = match error {
        HboneError::Dial { .. } | HboneError::ReplyTimeout { .. } => ResponseFlags::Connect,
        // A back-off has the reason of the last failed attempt.
        HboneError::BackingOff { source, .. } | HboneError::BehindGateway { source, .. } => {
            tunnel_reason(source).flags
        }
        HboneError::Refused { status: StatusCode::UNAUTHORIZED } => ResponseFlags::Deny,
        HboneError::Refused { .. } => ResponseFlags::Connect,
        HboneError::HandshakeTimeout { .. }
        | HboneError::Tls { .. }
        | HboneError::NoPeerCertificate
        | HboneError::PeerCertificateExpired { .. }
        | HboneError::PeerCertificateNotYetValid { .. }
        | HboneError::InvalidCertificate { .. }
        | HboneError::Revoked
        | HboneError::RevocationUnknown { .. }
        | HboneError::RevocationListExpired { .. }
        | HboneError::RevocationListUntrusted { .. }
        | HboneError::CertificateRefused { .. } => ResponseFlags::TlsFailure,
        HboneError::UnexpectedPeer { .. }
        | HboneError::NotSvid { .. }
        | HboneError::UntrustedDomain { .. }
        | HboneError::Credential { .. }
        | HboneError::Watch { .. }
        | HboneError::RotationEnded
        | HboneError::Clients { .. }
        | HboneError::Issuer { .. } => ResponseFlags::IdentityError,
        HboneError::TunnelExpired { .. } => ResponseFlags::TlsFailure,
        HboneError::H2 { .. } | HboneError::InvalidAuthority { .. } => {
            ResponseFlags::H2HandshakeFailure
        }
        HboneError::Reset { .. }
        | HboneError::Lost { .. }
        | HboneError::Unresponsive { .. }
        | HboneError::PeerLimit { .. } => ResponseFlags::None,
    };
    let fault = match error.fault() {
        underpass_hbone::Fault::Peer => Fault::Peer,
        underpass_hbone::Fault::Configuration | underpass_hbone::Fault::Us => Fault::Us,
    };
    Reason { code: error.kind(), flags, fault, status: StatusCode::SERVICE_UNAVAILABLE }
}
