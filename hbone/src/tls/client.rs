//! The TLS client of one generation of credentials: one configuration per peer, so that peers do
//! not share sessions.
//!
//! Not here: selecting the peer, and dialling.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::ClientConfig;
use rustls::client::{ClientSessionStore, Resumption, UnbufferedClientConnection};
use rustls::crypto::CryptoProvider;
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::ServerName;
use underpass_config::SpiffeId;

use super::record::{FinishedHandshake, TlsStream, handshake};
use super::sessions::Sessions;
use super::verify::{Peer, Verifier};
use super::{ALPN, handshake_error, require_h2, tls_error};
use crate::clock::WallClock;
use crate::error::{ExpectedPeer, HboneError};
use crate::identity::Identity;
use crate::trust::Authorities;
use crate::tunnel::io::Io;

/// Maximum number of peers with stored sessions.
const PEERS: usize = 1024;

/// The client side of one [`Credentials`](crate::Credentials), shared by all its connections.
#[derive(Debug)]
pub(crate) struct ClientTls {
    authorities: Arc<Authorities>,
    /// Expiry of our own certificate and all sessions.
    expires: SystemTime,
    /// Configuration without the parts of a peer: it expects no peer and stores no session.
    template: ClientConfig,
    /// rustls resumes only with the same verifier and certificate as the original session.
    peers: Mutex<HashMap<PeerKey, Arc<PeerTls>>>,
}

/// A session is resumed only at the same address with the same expected peers.
type PeerKey = (SocketAddr, Arc<[SpiffeId]>);

#[derive(Debug)]
struct PeerTls {
    config: Arc<ClientConfig>,
    verifier: Arc<Verifier>,
    sessions: Arc<Sessions>,
}

impl ClientTls {
    pub(crate) fn new(
        identity: &Identity,
        authorities: Arc<Authorities>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, HboneError> {
        let mut tls = Self::anonymous(identity, authorities, provider)?;
        tls.template.client_auth_cert_resolver =
            Arc::new(SingleCertAndKey::from(identity.certified_key()));
        Ok(tls)
    }

    /// A client that uses the trust of `identity` and presents no certificate.
    pub(crate) fn anonymous(
        identity: &Identity,
        authorities: Arc<Authorities>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, HboneError> {
        let no_peer = ExpectedPeer::OneOf(Arc::new([]));
        let verifier = Verifier { authorities: authorities.clone(), expected: no_peer };
        let mut template = ClientConfig::builder_with_details(provider, Arc::new(WallClock))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        template.alpn_protocols = vec![ALPN.to_vec()];
        template.enable_sni = false;
        template.resumption = Resumption::disabled();
        // The record layer needs the secrets.
        template.enable_secret_extraction = true;
        Ok(Self { authorities, expires: identity.expires(), template, peers: Mutex::default() })
    }

    /// Handshakes with a server that must be one of `expected`; others do not receive our
    /// certificate.
    pub(crate) async fn connect(
        &self,
        io: Io,
        address: SocketAddr,
        expected: &[SpiffeId],
    ) -> Result<(TlsStream<Io>, Peer), HboneError> {
        let (finished, peer) = self.handshake(io, address, expected).await?;
        Ok((finished.into_stream().map_err(tls_error)?, peer))
    }

    pub(super) async fn handshake(
        &self,
        io: Io,
        address: SocketAddr,
        expected: &[SpiffeId],
    ) -> Result<(FinishedHandshake<UnbufferedClientConnection, Io>, Peer), HboneError> {
        let tls = self.peer((address, expected.into()));
        // rustls requires a name; an address is never sent as SNI (RFC 6066 section 3), and our
        // verifier ignores it.
        let no_name = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
        let connection = UnbufferedClientConnection::new(tls.config.clone(), no_name);
        let finished = handshake(connection.map_err(tls_error)?, io)
            .await
            .map_err(|unfinished| handshake_error(unfinished.error))?;
        require_h2(finished.facts())?;
        let peer =
            Peer::of(finished.facts(), &tls.verifier).inspect_err(|_| tls.sessions.clear())?;
        if !peer.resumed {
            tls.sessions.record_handshake(peer.expires.min(self.expires));
        }
        Ok((finished, peer))
    }

    fn peer(&self, key: PeerKey) -> Arc<PeerTls> {
        // No code panics while it holds the lock.
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = peers.get(&key) {
            return known.clone();
        }
        // Evict any peer: it costs one full handshake if that peer is dialled again.
        if peers.len() >= PEERS
            && let Some(any) = peers.keys().next().cloned()
        {
            peers.remove(&any);
        }
        let peer = Arc::new(self.peer_tls(key.1.clone()));
        peers.insert(key, peer.clone());
        peer
    }

    fn peer_tls(&self, expected: Arc<[SpiffeId]>) -> PeerTls {
        let expected = ExpectedPeer::OneOf(expected);
        let verifier = Arc::new(Verifier { authorities: self.authorities.clone(), expected });
        let sessions = Arc::new(Sessions::new(self.expires));
        let mut config = self.template.clone();
        config.dangerous().set_certificate_verifier(verifier.clone());
        let store: Arc<dyn ClientSessionStore> = sessions.clone();
        config.resumption = Resumption::store(store);
        PeerTls { config: Arc::new(config), verifier, sessions }
    }
}

#[cfg(test)]
impl ClientTls {
    /// A client that offers tickets although its certificate has expired.
    pub(crate) fn with_later_expiry(mut self) -> Self {
        self.expires += std::time::Duration::from_secs(1 << 20);
        self
    }

    /// Number of peers with stored sessions.
    pub(crate) fn peers(&self) -> usize {
        self.peers.lock().unwrap().len()
    }
}
