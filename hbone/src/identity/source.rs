//! The sources of certificates: files, a local CA, Istio's CA protocol, and SPIRE.
//!
//! `rotation` publishes the certificates; the caller selects the source.

mod files;
mod issued;
mod istio_ca;
mod local_ca;
mod spire;
#[cfg(test)]
pub(crate) mod testing;

use std::future::Future;
use std::path::Path;
use std::pin::Pin;

use crate::clock;
use crate::error::{CredentialProblem, HboneError};
use crate::identity::Identity;

pub use self::files::FileSource;
pub use self::issued::{CertificateIssuer, IssueFuture, IssuedSource};
pub use self::istio_ca::{IstioCa, IstioCaSource};
pub use self::local_ca::LocalCaSource;
pub use self::spire::{DelegatedIdentitySource, WorkloadApiSource};

/// The result of [`IdentitySource::next`].
pub type NextIdentity<'a> = Pin<Box<dyn Future<Output = Result<Identity, HboneError>> + Send + 'a>>;

/// A source of a workload's certificates.
pub trait IdentitySource: Send {
    /// Returns the first identity, then each new one. Returns each error once, and retries in the
    /// next call with a back-off. The last identity stays valid after an error. Cancel-safe.
    fn next(&mut self) -> NextIdentity<'_>;
}

/// The urgency of a certificate request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A connection waits for the certificate.
    RealTime,
    /// A connection will need the certificate.
    Warmup,
    /// The previous certificate is still valid.
    Background,
}

/// Checks that an identity is valid now and that its own roots verify it.
fn valid_now(name: &Path, identity: Identity) -> Result<Identity, HboneError> {
    let now = clock::now();
    if identity.not_before() > now {
        let what = CredentialProblem::NotYetValid(identity.not_before());
        return Err(HboneError::credential(name, what));
    }
    if identity.expires() <= now {
        let what = CredentialProblem::Expired(identity.expires());
        return Err(HboneError::credential(name, what));
    }
    identity.verify(name, now)?;
    Ok(identity)
}
