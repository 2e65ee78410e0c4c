//! The reasons why a certificate is not the X.509-SVID of a workload.

use thiserror::Error;
use underpass_config::{Quoted, SpiffeError, TrustDomain};

/// The first rule of the standard that a certificate violates.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SvidProblem {
    /// The certificate or an extension does not parse, or an extension occurs twice.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// The certificate has no URI name, or more than one.
    #[error("it has {0} URI names, exactly one is needed: the SPIFFE ID")]
    UriNames(usize),
    /// The URI name is not a SPIFFE ID.
    #[error("its URI name {name} is not a SPIFFE ID: {problem}")]
    Name {
        /// The URI name.
        name: Quoted,
        /// The reason why the name is not a SPIFFE ID.
        problem: SpiffeError,
    },
    /// The URI name is a trust domain, which only a CA's certificate may have.
    #[error("its SPIFFE ID spiffe://{0} has no path: it names a trust domain, not a workload")]
    TrustDomainOnly(TrustDomain),
    /// The certificate is a CA's: basicConstraints has CA:TRUE.
    #[error("it is the certificate of a CA (basicConstraints CA:TRUE), not of a workload")]
    Authority,
    /// keyUsage lacks digitalSignature.
    #[error("its keyUsage lacks digitalSignature")]
    NoDigitalSignature,
    /// keyUsage has a value that only a CA may have.
    #[error("its keyUsage has {0}, which only a CA may have")]
    SigningUsage(&'static str),
}
