//! The sources of certificates: files, a local CA, Istio's CA protocol, and SPIRE.
//!
//! `rotation` publishes the certificates; the caller selects the source.

mod files;
mod istio_ca;
mod local_ca;
mod spire;
#[cfg(test)]
pub(crate) mod testing;

use std::future::Future;
use std::pin::Pin;

use crate::error::HboneError;
use crate::identity::Identity;
use crate::identity::identity_pem::IdentityPem;

pub use self::files::FileSource;
pub use self::istio_ca::{IstioCa, IstioCaSource, istio_ca_problems};
pub use self::local_ca::{LocalAuthority, LocalCaSource};
pub use self::spire::{DelegatedIdentitySource, WorkloadApiSource};

/// The result of [`IdentitySource::next`].
pub type NextIdentity<'a> = Pin<Box<dyn Future<Output = Result<Identity, HboneError>> + Send + 'a>>;

/// A source of a workload's certificates.
pub trait IdentitySource: Send {
    /// Returns the first identity, then each new one. Returns each error once, and retries in the
    /// next call with a back-off. The last identity stays valid after an error. Cancel-safe.
    fn next(&mut self) -> NextIdentity<'_>;
}

/// The result of [`PemSource::next_pem`].
pub type NextPem<'a> = Pin<Box<dyn Future<Output = Result<IdentityPem, HboneError>> + Send + 'a>>;

/// A source of a workload's certificates for another process.
pub trait PemSource: Send {
    /// As [`IdentitySource::next`], with the same checks.
    fn next_pem(&mut self) -> NextPem<'_>;
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
