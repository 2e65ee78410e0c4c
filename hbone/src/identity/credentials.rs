//! A generation of credentials: a workload's identity and its trust in peers, built once and shared
//! by all tunnels.

use std::sync::Arc;

use tokio::sync::watch;

use crate::crypto::provider;
use crate::error::HboneError;
use crate::identity::Identity;
use crate::tls::{ClientTls, ServerTls};
use crate::trust::{Authorities, Trust};

/// An identity, trusted roots, and TLS configurations with session caches. Cheap to clone.
///
/// TLS resumes sessions only within one generation. A new certificate, root or revocation list
/// starts a new generation, so that a ticket is never accepted under a changed trust.
#[derive(Debug, Clone)]
pub struct Credentials(Arc<Generation>);

#[derive(Debug)]
struct Generation {
    identity: Identity,
    authorities: Arc<Authorities>,
    client: ClientTls,
    server: ServerTls,
}

impl Credentials {
    /// Combines an identity with the trust in peers. The identity's roots replace roots in `trust`
    /// for its own trust domain and the aliases of that domain.
    ///
    /// # Errors
    /// [`HboneError::Tls`] if rustls rejects the identity.
    pub fn new(identity: Identity, trust: Trust) -> Result<Self, HboneError> {
        let provider = provider(trust.ciphers());
        let authorities = Arc::new(Authorities::new(&identity, trust));
        let client = ClientTls::new(&identity, authorities.clone(), provider.clone())?;
        let server = ServerTls::new(&identity, authorities.clone(), provider)?;
        Ok(Self(Arc::new(Generation { identity, authorities, client, server })))
    }

    /// The identity that tunnels authenticate with.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// Wraps credentials that never change, for tests and the demonstration.
    pub fn fixed(self) -> watch::Receiver<Self> {
        watch::channel(self).1
    }

    /// Returns true if both are the same generation.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn authorities(&self) -> &Arc<Authorities> {
        &self.0.authorities
    }

    pub(crate) fn client(&self) -> &ClientTls {
        &self.0.client
    }

    pub(crate) fn server(&self) -> &ServerTls {
        &self.0.server
    }
}
