//! The TLS client for one generation of credentials. Each peer has its own configuration, so that
//! peers do not share sessions.

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

/// The maximum number of peers with stored sessions.
const MAX_CACHED_PEERS: usize = 1024;

/// The TLS client for one [`Credentials`](crate::Credentials), shared by all its connections.
#[derive(Debug)]
pub(crate) struct ClientTls {
    authorities: Arc<Authorities>,
    /// The expiry of our certificate. Sessions end with it.
    expires: SystemTime,
    /// The common part of all configurations: expects no peer, and stores no sessions.
    template: ClientConfig,
    /// The configurations by peer. rustls resumes a session only if verifier and certificate are
    /// the same objects as before.
    peers: Mutex<HashMap<PeerKey, Arc<PeerTls>>>,
}

/// A session is resumed only at the same address and with the same expected peers.
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

    /// Creates a client that verifies servers by the trust of `identity`, but presents no
    /// certificate.
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
        // The record layer needs the traffic secrets.
        template.enable_secret_extraction = true;
        Ok(Self { authorities, expires: identity.expires(), template, peers: Mutex::default() })
    }

    /// Performs a handshake. The server must have one of the `expected` identities; other servers
    /// do not receive our certificate.
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
        // rustls requires a server name. It sends no SNI for an address (RFC 6066 section 3), and
        // our verifier ignores the name.
        let no_name = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
        let connection = UnbufferedClientConnection::new(tls.config.clone(), no_name);
        let finished = handshake(connection.map_err(tls_error)?, io)
            .await
            .map_err(|unfinished| handshake_error(unfinished.error))?;
        require_h2(finished.negotiated())?;
        let peer =
            Peer::of(finished.negotiated(), &tls.verifier).inspect_err(|_| tls.sessions.clear())?;
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
        // Evict an arbitrary peer: if it is dialled again, that costs one full handshake.
        if peers.len() >= MAX_CACHED_PEERS
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
    /// Pretends a later expiry: the client then offers tickets although its certificate has
    /// expired.
    pub(crate) fn with_later_expiry(mut self) -> Self {
        self.expires += std::time::Duration::from_secs(1 << 20);
        self
    }

    /// The number of peers with stored sessions.
    pub(crate) fn peers(&self) -> usize {
        self.peers.lock().unwrap().len()
    }
}
