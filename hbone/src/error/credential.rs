//! The problems of certificates, keys, roots and certificate signing requests.
//!
//! The error that contains a problem names the file.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use thiserror::Error;
use underpass_config::{Quoted, SpiffeId, TrustDomain};

use super::{SvidProblem, utc};

/// A problem of a certificate, key or roots file. Messages show it after the file's path.
#[derive(Debug, Clone, Error)]
pub enum CredentialProblem {
    /// The file cannot be read or written.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// The process lacks permission to read or write the file.
    #[error("permission denied")]
    Permission,
    /// The file exists and must not be replaced.
    #[error("the file exists and is not overwritten")]
    Exists,
    /// The file is not well-formed PEM.
    #[error("the file is not well-formed PEM ({0})")]
    Pem(String),
    /// The file has no PEM section of the required kind.
    #[error("the file has no PEM section of a {0}")]
    Empty(&'static str),
    /// The certificate does not parse.
    #[error("the file contains a malformed certificate ({0})")]
    Certificate(String),
    /// The revocation list does not parse.
    #[error("the file contains a malformed or unsupported revocation list ({0})")]
    RevocationList(String),
    /// The roots of the certificate's trust domain are missing.
    #[error("there are no roots of {0}, the certificate's own trust domain")]
    NoRoots(TrustDomain),
    /// The key cannot be used.
    #[error("the file contains no usable private key ({0})")]
    Key(String),
    /// The key does not match the certificate.
    #[error("the key does not belong to the certificate")]
    KeyMismatch,
    /// The roots that came with the certificate do not verify it. Peers with the same roots would
    /// refuse it.
    #[error("the roots do not verify the certificate ({0})")]
    UnknownIssuer(String),
    /// The certificate is not a workload's certificate.
    #[error("the certificate is not an X.509-SVID: {0}")]
    Svid(SvidProblem),
    /// The CA's certificate names no trust domain.
    #[error("the CA's certificate names no trust domain: {0}")]
    Authority(SvidProblem),
    /// The certificate has expired.
    #[error("the certificate expired at {}", utc(*.0))]
    Expired(SystemTime),
    /// The certificate is not valid yet.
    #[error("the certificate is not valid before {}", utc(*.0))]
    NotYetValid(SystemTime),
    /// The token file does not contain one word.
    #[error("the file contains no token (one word of visible ASCII)")]
    Token,
    /// The certificate signing request is invalid.
    #[error("{0}")]
    Request(RequestProblem),
    /// A server name is neither a host name nor an IP address.
    #[error("the name is not a host name or an IP address")]
    ServerName,
    /// The requested identity belongs to another trust domain than the CA.
    #[error("this authority issues for trust domain {trust_domain}, not for {id}")]
    ForeignId {
        /// The trust domain of the CA.
        trust_domain: TrustDomain,
        /// The requested identity.
        id: SpiffeId,
    },
    /// Another CA issued the certificate.
    #[error("another authority issued the certificate, so it cannot be revoked here")]
    ForeignIssuer,
    /// The validity ends after the year 9999, which X.509 cannot express.
    #[error("the lifetime is out of range")]
    Lifetime,
    /// Generating a key or signing a certificate failed.
    #[error("generating the certificate failed ({0})")]
    Issue(String),
}

/// The reason why a certificate signing request is rejected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestProblem {
    /// The request does not parse.
    #[error("the certificate request is not valid PEM ({0})")]
    Malformed(String),
    /// The signature does not match the key in the request.
    #[error("the signature of the certificate request is wrong or unsupported ({0})")]
    Signature(String),
    /// The key is too weak or has an unsupported type.
    #[error("the key must be P-256, P-384, Ed25519, or RSA of at least 2048 bits")]
    Key,
    /// The request names more than one identity.
    #[error(
        "the certificate request must have at most one URI name, a SPIFFE identity, and has: {0}"
    )]
    Names(Quoted),
}
