//! Where our certificate comes from, and when the next one does: files, our own CA, Istio's CA
//! protocol, or SPIRE.
//!
//! Not here: what is done with it (`rotation`), and which source is used, which is a setting.

mod files;
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
pub use self::istio_ca::{IstioCa, IstioCaSource};
pub use self::local_ca::LocalCaSource;
pub use self::spire::SpireSource;

/// What [`IdentitySource::next`] returns.
pub type NextIdentity<'a> = Pin<Box<dyn Future<Output = Result<Identity, HboneError>> + Send + 'a>>;

/// Where our certificate comes from.
pub trait IdentitySource: Send {
    /// The first identity, then each new one when it is there. After an error, which is told once,
    /// the last identity stays and this is called again: the source paces itself. Cancel-safe.
    fn next(&mut self) -> NextIdentity<'_>;
}

/// How urgent a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A connection waits for it.
    RealTime,
    /// It will be needed.
    Warmup,
    /// The previous one is still valid.
    Background,
}

/// An identity that can be used from now on, and that peers with the same roots accept.
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
