//! What can go wrong with a tunnel or a certificate, in words for the operator.
//!
//! Not here: which status or log reason a failure becomes. That is the caller's, from [`HboneError::kind`].

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
use underpass_config::{SpiffeId, TrustDomain};

/// Why a tunnel could not be opened or used, or a certificate not be read or issued.
///
/// Cloneable, because one failed dial is reported to all who waited for it.
#[derive(Debug, Clone, Error)]
pub enum HboneError {
    /// No connection to the peer's HBONE port.
    #[error(
        "cannot connect to {address}: does the peer listen for HBONE, and is the port open on the way?"
    )]
    Dial {
        /// What was dialled.
        address: SocketAddr,
        /// Why it failed; `TimedOut` when our own deadline passed.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer let the TLS and HTTP/2 handshake wait for too long.
    #[error("the peer did not finish the handshake in {after:?} (timeouts.handshake)")]
    HandshakeTimeout {
        /// The deadline that passed.
        after: Duration,
    },
    /// TLS failed for a reason without a variant of its own.
    #[error("TLS failed: do both sides speak TLS 1.3 with h2, and trust the same roots?")]
    Tls {
        /// What rustls or the connection said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The certificate is good, but the peer is somebody else.
    #[error(
        "peer presented {}, expected {expected}: are serviceAccount and trustDomain right in the mesh file?",
        list(presented)
    )]
    UnexpectedPeer {
        /// Who it should have been.
        expected: ExpectedPeer,
        /// The URI names in its certificate.
        presented: Vec<String>,
    },
    /// The peer's certificate, or one in its chain, is no longer valid.
    #[error(
        "the peer's certificate expired at {}: is it still renewed, and are both clocks right?",
        utc(*expired)
    )]
    PeerCertificateExpired {
        /// The end of its validity.
        expired: SystemTime,
    },
    /// The client came without a certificate.
    #[error("the peer presented no certificate: is it an HBONE client at all?")]
    NoPeerCertificate,
    /// The peer did not like our certificate.
    #[error(
        "the peer refused our certificate (TLS alert {alert}): does it trust our root, and is ours still valid?"
    )]
    CertificateRefused {
        /// The alert's name, as in RFC 8446 section 6.2.
        alert: String,
    },
    /// HTTP/2 was violated, by the peer or by us.
    #[error("HTTP/2 failed")]
    H2 {
        /// What h2 said.
        #[source]
        source: Arc<h2::Error>,
    },
    /// The answer to CONNECT was not 200.
    #[error("the peer refused the CONNECT request with status {status}: its log tells why")]
    Refused {
        /// The answer.
        status: StatusCode,
    },
    /// No answer to CONNECT.
    #[error("the peer did not answer the CONNECT request in {after:?} (timeouts.reply)")]
    ReplyTimeout {
        /// The deadline that passed.
        after: Duration,
    },
    /// The peer aborted the stream.
    #[error("the peer aborted the stream ({reason})")]
    Reset {
        /// The code of its RST_STREAM.
        reason: Reason,
    },
    /// The connection ended, or a GOAWAY cut the stream, before END_STREAM.
    #[error("the connection to the peer was lost")]
    Lost {
        /// What h2 said, if it was asked.
        #[source]
        source: Option<Arc<h2::Error>>,
    },
    /// The peer answers no PING.
    #[error("the peer was silent for {silent:?}: the connection is given up")]
    Unresponsive {
        /// How long nothing was received.
        silent: Duration,
    },
    /// An authority that names no host and port.
    #[error("{authority:?} is not an authority of the form ADDRESS:PORT or NAME:PORT")]
    InvalidAuthority {
        /// What was given.
        authority: String,
    },
    /// A certificate, key or roots that cannot be used, read or written.
    #[error("{}: {what}", file.display())]
    Credential {
        /// The file, or what it would have held when it came from memory.
        file: PathBuf,
        /// What is wrong.
        what: CredentialProblem,
    },
}

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The peer, or the network between.
    Peer,
    /// The operator's settings, files or certificates.
    Configuration,
    /// A defect of ours.
    Us,
}

/// Who a peer was expected to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectedPeer {
    /// A server: one of these.
    OneOf(Arc<[SpiffeId]>),
    /// A client: any identity of our trust domain.
    MemberOf(TrustDomain),
}

/// What is wrong with a credential. Always shown with its file.
#[derive(Debug, Clone, Error)]
pub enum CredentialProblem {
    /// It cannot be read or written.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// It is there, and is not to be replaced.
    #[error("it exists already and is not overwritten: choose another directory")]
    Exists,
    /// It is not PEM.
    #[error("it is not well-formed PEM ({0})")]
    Pem(String),
    /// There is no section of the needed kind.
    #[error("it has no PEM section of a {0}")]
    Empty(&'static str),
    /// A certificate that does not parse.
    #[error("it holds a malformed certificate ({0})")]
    Certificate(String),
    /// The key cannot be used.
    #[error("it holds no usable private key ({0})")]
    Key(String),
    /// The key belongs to another certificate.
    #[error("the key does not belong to the certificate: were they issued together?")]
    KeyMismatch,
    /// The leaf must have exactly one `spiffe://` name.
    #[error("the certificate must have exactly one SPIFFE URI name, it has: {}", list(.0))]
    Names(Vec<String>),
    /// The certificate is no longer valid.
    #[error("the certificate expired at {}: issue a new one", utc(*.0))]
    Expired(SystemTime),
    /// The authority was asked for an identity of another trust domain.
    #[error("this authority issues for trust domain {trust_domain}, not for {id}")]
    ForeignId {
        /// What the authority issues for.
        trust_domain: TrustDomain,
        /// What was asked.
        id: SpiffeId,
    },
    /// A lifetime that no certificate can express.
    #[error("the lifetime is out of range")]
    Lifetime,
    /// Generating or signing failed.
    #[error("the certificate could not be generated ({0})")]
    Issue(String),
}

impl HboneError {
    /// Whose fault this is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::CertificateRefused { .. } | Self::Credential { .. } => Fault::Configuration,
            // The server answers a peer's bad authority itself: an error is about one we asked for.
            Self::InvalidAuthority { .. } => Fault::Us,
            Self::H2 { source } if !source.is_remote() && !source.is_library() => Fault::Us,
            _ => Fault::Peer,
        }
    }

    /// A short label for metrics and logs. Stable: dashboards depend on it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dial { .. } => "connect",
            Self::HandshakeTimeout { .. } => "handshake_timeout",
            Self::Tls { .. } => "tls",
            Self::UnexpectedPeer { .. } => "identity",
            Self::PeerCertificateExpired { .. } => "expired",
            Self::NoPeerCertificate => "no_certificate",
            Self::CertificateRefused { .. } => "certificate_refused",
            Self::H2 { .. } => "h2",
            Self::Refused { .. } => "refused",
            Self::ReplyTimeout { .. } => "reply_timeout",
            Self::Reset { .. } => "reset",
            Self::Lost { .. } => "lost",
            Self::Unresponsive { .. } => "unresponsive",
            Self::InvalidAuthority { .. } => "authority",
            Self::Credential { .. } => "credential",
        }
    }

    pub(crate) fn h2(source: h2::Error) -> Self {
        Self::H2 { source: Arc::new(source) }
    }

    pub(crate) fn credential(file: impl Into<PathBuf>, what: CredentialProblem) -> Self {
        Self::Credential { file: file.into(), what }
    }

    pub(crate) fn file(file: impl Into<PathBuf>, error: io::Error) -> Self {
        Self::credential(file, CredentialProblem::Io(Arc::new(error)))
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
    fn a_message_does_not_repeat_its_source() {
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
    fn an_identity_mismatch_says_who_was_expected_and_who_came() {
        let expected: Arc<[SpiffeId]> =
            ["spiffe://td/ns/a/sa/b".parse().unwrap(), "spiffe://td/ns/a/sa/c".parse().unwrap()]
                .into();
        let error = HboneError::UnexpectedPeer {
            expected: ExpectedPeer::OneOf(expected),
            presented: vec!["spiffe://td/ns/x/sa/y".to_owned()],
        };
        let start = "peer presented spiffe://td/ns/x/sa/y, \
                     expected spiffe://td/ns/a/sa/b or spiffe://td/ns/a/sa/c:";
        assert!(error.to_string().starts_with(start), "{error}");
    }

    #[test]
    fn times_are_printed_in_utc() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_605);
        assert_eq!(utc(time), "2026-01-01 00:00:05 UTC");
    }
}
