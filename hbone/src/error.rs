//! The errors of tunnels and certificates. Their messages are for the operator.
//!
//! Callers derive HTTP status and log reason from [`HboneError::kind`].

mod credential;
mod hint;
mod issuer;
mod svid;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use h2::Reason;
use http::StatusCode;
use thiserror::Error;
use time::OffsetDateTime;
use underpass_config::{ConfigErrors, Quoted, SpiffeId, TrustDomain};

use crate::tunnel::inspect::TunnelLimit;

pub use self::credential::{CredentialProblem, RequestProblem};
pub use self::issuer::IssuerProblem;
pub use self::svid::SvidProblem;

/// The failure of a tunnel, or of reading or issuing a certificate.
///
/// Cloneable: when a dial fails, all connections that wait for it receive its error.
#[derive(Debug, Clone, Error)]
pub enum HboneError {
    /// Connecting to the peer's HBONE port failed.
    #[error("{} {address}", dial(source))]
    Dial {
        /// The dialled address.
        address: SocketAddr,
        /// The cause. `TimedOut` if our own timeout expired.
        #[source]
        source: Arc<io::Error>,
    },
    /// Connecting was not attempted, because the last attempt failed recently.
    #[error("cannot connect to {address}: in back-off for another {remaining:?} after a failure")]
    BackingOff {
        /// The address in back-off.
        address: SocketAddr,
        /// The remaining back-off.
        remaining: Duration,
        /// The failure of the last attempt.
        #[source]
        source: Arc<Self>,
    },
    /// The tunnel to a gateway is open, but the inner tunnel to the peer behind it failed.
    #[error("no tunnel to the peer behind the gateway {gateway}")]
    BehindGateway {
        /// The gateway's address.
        gateway: SocketAddr,
        /// The failure of the inner tunnel.
        #[source]
        source: Arc<Self>,
    },
    /// The TLS and HTTP/2 handshake timed out.
    #[error("the peer did not finish the handshake in {after:?}")]
    HandshakeTimeout {
        /// The timeout.
        after: Duration,
    },
    /// TLS failed for a reason that has no other variant.
    #[error("TLS failed")]
    Tls {
        /// The error of rustls or of the connection.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer's certificate has an unexpected identity.
    #[error("peer presented {presented}, expected {expected}")]
    UnexpectedPeer {
        /// The expected identities.
        expected: ExpectedPeer,
        /// The verified identity of the peer.
        presented: Quoted,
    },
    /// The peer's certificate is not a workload's certificate.
    #[error("the peer's certificate is not an X.509-SVID: {problem}")]
    NotSvid {
        /// The violated rule of the standard.
        problem: SvidProblem,
    },
    /// The peer's certificate chain is invalid for a reason that has no other variant.
    #[error("the peer's certificate is invalid: {reason}")]
    InvalidCertificate {
        /// The error of webpki.
        reason: Quoted,
    },
    /// A certificate in the peer's chain has expired.
    #[error("the peer's certificate expired at {}", utc(*expired))]
    PeerCertificateExpired {
        /// The end of its validity.
        expired: SystemTime,
    },
    /// A certificate in the peer's chain is not valid yet.
    #[error("the peer's certificate is valid only from {}", utc(*begins))]
    PeerCertificateNotYetValid {
        /// The start of its validity.
        begins: SystemTime,
    },
    /// No roots are configured for the peer's trust domain.
    #[error("there are no roots of the peer's trust domain {trust_domain}")]
    UntrustedDomain {
        /// The trust domain without roots.
        trust_domain: TrustDomain,
    },
    /// A certificate in the peer's chain is on a revocation list.
    #[error("the peer's certificate, or one in its chain, is revoked by a list in trust.crls")]
    Revoked,
    /// Revocation lists are configured, but none is from this issuer.
    #[error("there is no revocation list of the peer's issuer {issuer}")]
    RevocationUnknown {
        /// The distinguished name of the issuer without a revocation list.
        issuer: Quoted,
    },
    /// A revocation list is past its `nextUpdate`.
    #[error("{}: the revocation list of the peer's issuer expired at {}", file.display(), utc(*expired))]
    RevocationListExpired {
        /// The file of the revocation list.
        file: PathBuf,
        /// The list's `nextUpdate`.
        expired: SystemTime,
    },
    /// A revocation list has an invalid signature, or its issuer may not sign lists.
    #[error("the revocation list of the peer's issuer cannot be verified")]
    RevocationListUntrusted {
        /// The error of webpki.
        #[source]
        source: webpki::Error,
    },
    /// The client presented no certificate.
    #[error("the peer presented no certificate")]
    NoPeerCertificate,
    /// The peer rejected our certificate.
    #[error("the peer refused our certificate (TLS alert {alert})")]
    CertificateRefused {
        /// The name of the TLS alert (RFC 8446 section 6.2).
        alert: String,
    },
    /// A violation of HTTP/2 by the peer or by us.
    #[error("HTTP/2 failed")]
    H2 {
        /// The error of h2.
        #[source]
        source: Arc<h2::Error>,
    },
    /// The peer answered CONNECT with a status other than 200.
    #[error("the peer refused the CONNECT request with status {status}")]
    Refused {
        /// The status.
        status: StatusCode,
    },
    /// The answer to CONNECT timed out.
    #[error("the peer did not answer the CONNECT request in {after:?}")]
    ReplyTimeout {
        /// The timeout.
        after: Duration,
    },
    /// The peer aborted the stream.
    #[error("the peer aborted the stream ({reason})")]
    Reset {
        /// The error code of RST_STREAM.
        reason: Reason,
    },
    /// The connection ended before the stream, or the peer's GOAWAY excluded the stream.
    #[error("the connection to the peer was lost")]
    Lost {
        /// The error of h2. `None` if the connection ended without an error.
        #[source]
        source: Option<Arc<h2::Error>>,
    },
    /// The peer does not answer PING.
    #[error("the peer sent nothing for {silent:?}, and did not answer a PING")]
    Unresponsive {
        /// The time since the last received data.
        silent: Duration,
    },
    /// The tunnel was closed because the peer exceeded a limit.
    #[error("the peer exceeded a limit of the tunnel: {limit}")]
    PeerLimit {
        /// The limit.
        limit: TunnelLimit,
    },
    /// The tunnel's certificates have expired, so the request was not sent.
    #[error("the certificates of the tunnel expired at {}", utc(*expired))]
    TunnelExpired {
        /// The earlier expiry of both certificates.
        expired: SystemTime,
    },
    /// The authority of a request is not `HOST:PORT`.
    #[error("{authority:?} is not an authority of the form ADDRESS:PORT or NAME:PORT")]
    InvalidAuthority {
        /// The authority.
        authority: Quoted,
    },
    /// A certificate, key or roots file cannot be used, read or written.
    #[error("{}: {what}", file.display())]
    Credential {
        /// The path. A description if the content came from memory.
        file: PathBuf,
        /// The problem of the file.
        what: CredentialProblem,
    },
    /// Watching a credential file for changes failed.
    #[error("cannot watch a certificate, key, bundle or revocation list for changes")]
    Watch {
        /// The path and the reason.
        #[source]
        source: ConfigErrors,
    },
    /// A CA or a SPIRE agent issued no certificate.
    #[error("{issuer}: {what}")]
    Issuer {
        /// The address of the CA or agent.
        issuer: String,
        /// The reason.
        what: IssuerProblem,
        /// The error of the connection or of a library. `None` if the answer itself is the problem.
        #[source]
        source: Option<Arc<io::Error>>,
    },
    /// The task that obtains and renews the certificate panicked.
    #[error("the task that obtains the certificate ended after an internal error (see the log)")]
    RotationEnded,
    /// The clients file of `underpass ca serve` or one of its token files is invalid.
    #[error("the clients file cannot be used")]
    Clients {
        /// All mistakes in the file.
        #[source]
        source: ConfigErrors,
    },
}

/// The party responsible for an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The peer, or the network.
    Peer,
    /// The operator's settings, files or certificates.
    Configuration,
    /// A defect of underpass.
    Us,
}

/// The expected identity of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectedPeer {
    /// A server must have one of these identities.
    OneOf(Arc<[SpiffeId]>),
    /// A client may have any identity in this trust domain or in another domain with known roots.
    MemberOf(TrustDomain),
}

impl HboneError {
    /// The error of the outer tunnel, if `error` comes from one of its streams. `None` for other
    /// causes.
    pub(crate) fn carried_by(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().cloned()
    }

    /// The error of a stream whose peer called [`TunnelWriter::abort`](crate::TunnelWriter::abort).
    pub fn aborted_by_peer() -> Self {
        Self::Reset { reason: Reason::CONNECT_ERROR }
    }

    /// The party responsible for this error.
    pub fn fault(&self) -> Fault {
        match self {
            Self::CertificateRefused { .. }
            | Self::RevocationUnknown { .. }
            | Self::RevocationListExpired { .. }
            | Self::RevocationListUntrusted { .. }
            | Self::Credential { .. }
            | Self::Watch { .. }
            | Self::Clients { .. } => Fault::Configuration,
            Self::Issuer { what, .. } => what.fault(),
            // `InvalidAuthority` is about our own request: a server answers a peer's invalid
            // authority without this error.
            Self::InvalidAuthority { .. } | Self::RotationEnded => Fault::Us,
            Self::BackingOff { source, .. } | Self::BehindGateway { source, .. } => source.fault(),
            Self::H2 { source } if !source.is_remote() && !source.is_library() => Fault::Us,
            _ => Fault::Peer,
        }
    }

    /// A short label for metrics and logs. Dashboards depend on it: do not change it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dial { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
                "connect_timeout"
            }
            Self::Dial { .. } => "connect",
            Self::BackingOff { .. } => "backing_off",
            // The connection record names the gateway; metrics count the inner failure.
            Self::BehindGateway { source, .. } => source.kind(),
            Self::HandshakeTimeout { .. } => "handshake_timeout",
            Self::Tls { .. } => "tls",
            Self::UnexpectedPeer { .. } => "identity",
            Self::NotSvid { .. } => "svid",
            Self::InvalidCertificate { .. } => "certificate",
            Self::PeerCertificateExpired { .. } => "expired",
            Self::PeerCertificateNotYetValid { .. } => "not_yet_valid",
            Self::UntrustedDomain { .. } => "untrusted_domain",
            Self::Revoked => "revoked",
            Self::RevocationUnknown { .. } => "revocation_unknown",
            Self::RevocationListExpired { .. } => "revocation_list_expired",
            Self::RevocationListUntrusted { .. } => "revocation_list_untrusted",
            Self::NoPeerCertificate => "no_certificate",
            Self::CertificateRefused { .. } => "certificate_refused",
            Self::H2 { .. } => "h2",
            Self::Refused { .. } => "refused",
            Self::ReplyTimeout { .. } => "reply_timeout",
            Self::Reset { .. } => "reset",
            Self::Lost { .. } => "lost",
            Self::Unresponsive { .. } => "unresponsive",
            Self::PeerLimit { .. } => "peer_limit",
            Self::TunnelExpired { .. } => "tunnel_expired",
            Self::InvalidAuthority { .. } => "authority",
            Self::Credential { .. } => "credential",
            Self::Watch { .. } => "watch",
            Self::RotationEnded => "rotation",
            Self::Clients { .. } => "clients",
            Self::Issuer { .. } => "issuer",
        }
    }

    pub(crate) fn h2(source: h2::Error) -> Self {
        Self::H2 { source: Arc::new(source) }
    }

    pub(crate) fn credential(file: impl Into<PathBuf>, what: CredentialProblem) -> Self {
        Self::Credential { file: file.into(), what }
    }

    pub(crate) fn file(file: impl Into<PathBuf>, error: io::Error) -> Self {
        let what = match error.kind() {
            io::ErrorKind::PermissionDenied => CredentialProblem::Permission,
            _ => CredentialProblem::Io(Arc::new(error)),
        };
        Self::credential(file, what)
    }
}

impl fmt::Display for ExpectedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneOf(ids) => f.write_str(&list(ids)),
            Self::MemberOf(trust_domain) => write!(f, "spiffe://{trust_domain}/…"),
        }
    }
}

/// The beginning of the message about a failed connect.
fn dial(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::TimedOut => "no answer from",
        _ => "cannot connect to",
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    if items.is_empty() {
        return "no SPIFFE identity".to_owned();
    }
    let texts: Vec<String> = items.iter().map(ToString::to_string).collect();
    texts.join(" or ")
}

fn utc(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let instant =
        i64::try_from(since).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    instant.map_or_else(
        || "a time beyond the year 9999".to_owned(),
        |t| {
            let (date, hour, minute, second) = (t.date(), t.hour(), t.minute(), t.second());
            format!("{date} {hour:02}:{minute:02}:{second:02} UTC")
        },
    )
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn message_does_not_repeat_its_source() {
        let source = Arc::new(io::Error::other("the inner text"));
        let address = SocketAddr::from(([10, 0, 0, 1], 15008));
        for error in
            [HboneError::Dial { address, source: source.clone() }, HboneError::Tls { source }]
        {
            assert!(!error.to_string().contains("the inner text"), "{error}");
            assert_eq!(error.source().unwrap().to_string(), "the inner text");
        }
    }

    #[test]
    fn identity_mismatch_names_expected_and_presented_identity() {
        let expected: Arc<[SpiffeId]> =
            ["spiffe://td/ns/a/sa/b".parse().unwrap(), "spiffe://td/ns/a/sa/c".parse().unwrap()]
                .into();
        let error = HboneError::UnexpectedPeer {
            expected: ExpectedPeer::OneOf(expected),
            presented: "spiffe://td/ns/x/sa/y".into(),
        };
        let message = "peer presented spiffe://td/ns/x/sa/y, \
                     expected spiffe://td/ns/a/sa/b or spiffe://td/ns/a/sa/c";
        assert_eq!(error.to_string(), message);
    }

    #[test]
    fn times_are_printed_in_utc() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_605);
        assert_eq!(utc(time), "2026-01-01 00:00:05 UTC");
    }
}
