//! The problems of certificates, keys, roots and certificate requests.
//!
//! The error that contains the problem names the file.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use thiserror::Error;
use underpass_config::{Quoted, SpiffeId, TrustDomain};

use super::{SvidProblem, utc};

/// A problem of a credential. Always shown with its file.
#[derive(Debug, Clone, Error)]
pub enum CredentialProblem {
    /// It cannot be read or written.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// The process lacks permission to read or write it.
    #[error("permission denied")]
    Permission,
    /// It exists and must not be replaced.
    #[error("it exists already and is not overwritten")]
    Exists,
    /// It is not PEM.
    #[error("it is not well-formed PEM ({0})")]
    Pem(String),
    /// It has no PEM section of the required kind.
    #[error("it has no PEM section of a {0}")]
    Empty(&'static str),
    /// A certificate that does not parse.
    #[error("it holds a malformed certificate ({0})")]
    Certificate(String),
    /// A revocation list that does not parse.
    #[error("it holds a malformed or unsupported revocation list ({0})")]
    RevocationList(String),
    /// The roots of the certificate's own trust domain are missing.
    #[error("there are no roots of {0}, the certificate's own trust domain")]
    NoRoots(TrustDomain),
    /// The key cannot be used.
    #[error("it holds no usable private key ({0})")]
    Key(String),
    /// The key does not match the certificate.
    #[error("the key does not belong to the certificate")]
    KeyMismatch,
    /// The roots that came with the certificate do not verify it, so peers would refuse it.
    #[error("the roots do not verify the certificate ({0})")]
    UnknownIssuer(String),
    /// The certificate is not a workload's.
    #[error("the certificate is not an X.509-SVID: {0}")]
    Svid(SvidProblem),
    /// The certificate of a CA names no trust domain.
    #[error("the CA's certificate names no trust domain: {0}")]
    Authority(SvidProblem),
    /// The certificate is no longer valid.
    #[error("the certificate expired at {}", utc(*.0))]
    Expired(SystemTime),
    /// The certificate is not valid yet.
    #[error("the certificate is not valid before {}", utc(*.0))]
    NotYetValid(SystemTime),
    /// No bearer token.
    #[error("it holds no token, which is one word of visible ASCII")]
    Token,
    /// An invalid certificate signing request.
    #[error("{0}")]
    Request(RequestProblem),
    /// A server name that is neither a host name nor an address.
    #[error("it is not a host name or an IP address")]
    ServerName,
    /// The authority was asked for an identity of another trust domain.
    #[error("this authority issues for trust domain {trust_domain}, not for {id}")]
    ForeignId {
        /// The trust domain of the authority.
        trust_domain: TrustDomain,
        /// The requested identity.
        id: SpiffeId,
    },
    /// Another authority issued the certificate.
    #[error("this authority did not issue it and cannot revoke it")]
    ForeignIssuer,
    /// A lifetime that no certificate can express.
    #[error("the lifetime is out of range")]
    Lifetime,
    /// Generating or signing failed.
    #[error("the certificate could not be generated ({0})")]
    Issue(String),
}

/// The reason why a certificate signing request is rejected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestProblem {
    /// It does not parse.
    #[error("it is not a certificate request in PEM ({0})")]
    Malformed(String),
    /// The signature does not prove that the sender holds the key.
    #[error("its signature is wrong, or of a kind that is not supported ({0})")]
    Signature(String),
    /// A key that is too weak or of an unsupported type.
    #[error("its key must be P-256, P-384, Ed25519, or RSA of at least 2048 bits")]
    Key,
    /// It asks for more than one identity.
    #[error("it must have at most one URI name, a SPIFFE identity, and has: {0}")]
    Names(Quoted),
}
