//! The reasons why a certificate is not the X.509-SVID of a workload.

use thiserror::Error;
use underpass_config::{Quoted, SpiffeError, TrustDomain};

/// The reason why a certificate is not the X.509-SVID of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SvidProblem {
    /// It, or a relevant extension, does not parse or occurs twice.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// Not exactly one URI name.
    #[error("it has {0} URI names, exactly one is needed: the SPIFFE ID")]
    UriNames(usize),
    /// The URI name is not a SPIFFE ID.
    #[error("its URI name {name} is not a SPIFFE ID: {problem}")]
    Name {
        /// The URI name.
        name: Quoted,
        /// The problem.
        problem: SpiffeError,
    },
    /// The name of a trust domain, which only the certificate of a CA may have.
    #[error("its SPIFFE ID spiffe://{0} has no path: it names a trust domain, not a workload")]
    TrustDomainOnly(TrustDomain),
    /// basicConstraints with CA:TRUE.
    #[error("it is the certificate of a CA (basicConstraints CA:TRUE), not of a workload")]
    Authority,
    /// keyUsage without digitalSignature.
    #[error("its keyUsage lacks digitalSignature")]
    NoDigitalSignature,
    /// keyUsage of a CA.
    #[error("its keyUsage has {0}, which only a CA may have")]
    SigningUsage(&'static str),
}
