//! A generation of credentials: the own identity and the trust in peers, built once and shared by
//! all tunnels.

use std::sync::Arc;

use tokio::sync::watch;

use crate::crypto::provider;
use crate::error::HboneError;
use crate::identity::Identity;
use crate::tls::{ClientTls, ServerTls};
use crate::trust::{Authorities, Trust};

/// An identity, the trusted roots, and the TLS configurations with their session caches. Cheap to
/// clone.
///
/// Sessions are resumed only within a generation. A new certificate, root or revocation list starts
/// a new generation, so no ticket outlives the state in which it was issued.
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
    /// Combines both. The identity's own roots take precedence over roots in `trust` for its trust
    /// domain or an alias of it.
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

    /// The own identity.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// A receiver without updates, for tests and the demonstration.
    pub fn fixed(self) -> watch::Receiver<Self> {
        watch::channel(self).1
    }

    /// Whether both are the same generation.
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
