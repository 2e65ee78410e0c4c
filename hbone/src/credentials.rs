//! One generation of what a tunnel needs to prove who we are and to judge who is there: built once, shared by all.
//!
//! Not here: where it comes from, and when the next one is made.

use std::sync::Arc;

use tokio::sync::watch;

use crate::crypto::provider;
use crate::tls::{ClientTls, ServerTls};
use crate::trust::Authorities;
use crate::{HboneError, Identity, Trust};

/// An identity, whom it trusts, and the TLS configurations of both, with their sessions. Cheap to clone.
///
/// Sessions are resumed only within one generation: a new certificate, other roots or a new revocation list make a new
/// one, so that no ticket outlives what was known when it was given.
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
    /// Roots in `trust` for the identity's own trust domain, or for an alias of it, are not used: the identity's are.
    ///
    /// # Errors
    /// [`HboneError::Tls`] if rustls refuses the identity.
    pub fn new(identity: Identity, trust: Trust) -> Result<Self, HboneError> {
        let provider = provider(trust.ciphers());
        let authorities = Arc::new(Authorities::new(&identity, trust));
        let client = ClientTls::new(&identity, authorities.clone(), provider.clone())?;
        let server = ServerTls::new(&identity, authorities.clone(), provider)?;
        Ok(Self(Arc::new(Generation { identity, authorities, client, server })))
    }

    /// Who we are.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// A receiver that never gets others: for tests and demos.
    pub fn fixed(self) -> watch::Receiver<Self> {
        watch::channel(self).1
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
