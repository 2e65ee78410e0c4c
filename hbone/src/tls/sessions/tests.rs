//! Tests of sessions that are resumed, and of sessions that must not be resumed.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::sync::watch;
use tokio::time::sleep;
use underpass_config::{Cipher, SpiffeId};

use super::*;
use crate::crypto::provider;
use crate::identity::credentials::Credentials;
use crate::testing::pki::{Ca, Files};
use crate::testing::{ADDRESS, CLIENT, HOUR, SECOND, SERVER, Served, id, request};
use crate::tls::{ClientTls, ServerTls};
use crate::trust::{Authorities, Trust};
use crate::tunnel::client::Connector;
use crate::tunnel::server::Acceptor;
use crate::tunnel::settings::{ClientSettings, ServerSettings};

struct Parties {
    client: watch::Sender<Credentials>,
    server: watch::Sender<Credentials>,
    connector: Connector,
    acceptor: Acceptor,
}

fn credentials(ca: &Ca, who: &str, serial: u64, lifetime: Duration) -> Credentials {
    let identity = ca.identity_until(who, serial, clock::now() + lifetime);
    Credentials::new(identity, Trust::default()).unwrap()
}

impl Parties {
    fn new(client: Credentials, server: Credentials) -> Self {
        let (client, client_credentials) = watch::channel(client);
        let (server, server_credentials) = watch::channel(server);
        Self {
            client,
            server,
            connector: Connector::new(client_credentials, ClientSettings::default()),
            acceptor: Acceptor::new(server_credentials, ServerSettings::default()),
        }
    }

    fn of(ca: &Ca) -> Self {
        Self::new(credentials(ca, CLIENT, 1, HOUR), credentials(ca, SERVER, 2, HOUR))
    }

    /// Opens a tunnel, which stays open until its tickets arrive. Returns true if both sides report
    /// a resumed session.
    async fn resume(
        &self,
        address: SocketAddr,
        expected: &[SpiffeId],
    ) -> Result<bool, (Option<HboneError>, Option<HboneError>)> {
        let (near, far) = duplex(64 << 10);
        let (client, server) = tokio::join!(
            self.connector.open(near, address, expected, SECOND),
            self.acceptor.accept(far, SECOND)
        );
        let (tunnel, server) = match (client, server) {
            (Ok(tunnel), Ok(server)) => (tunnel, server),
            (client, server) => return Err((client.err(), server.err())),
        };
        assert_eq!(tunnel.resumed(), server.resumed());
        let resumed = tunnel.resumed();
        assert_eq!(server.peer().spiffe_id(), &id(CLIENT));
        assert_eq!(tunnel.usable_until(), server.usable_until());
        let mut served = Served::new(server);
        let (near, _far) = tokio::join!(tunnel.connect(request(), SECOND), async {
            served.next().await.accept(HeaderMap::new()).unwrap()
        });
        let (_reader, mut writer) = near.unwrap().split();
        writer.write(Bytes::from_static(b"used")).await.unwrap();
        Ok(resumed)
    }

    async fn resumes(&self) -> bool {
        self.resume(ADDRESS, &[id(SERVER)]).await.unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn later_tunnels_to_a_peer_resume_sessions() {
    let parties = Parties::of(&Ca::root("ours"));
    assert!(!parties.resumes().await);
    for _ in 0..10 {
        assert!(parties.resumes().await);
    }
}

#[tokio::test(start_paused = true)]
async fn sessions_are_not_shared_between_addresses_or_expected_peers() {
    let parties = Parties::of(&Ca::root("ours"));
    assert!(!parties.resumes().await);
    let other_address = SocketAddr::from(([10, 0, 0, 9], 15008));
    assert!(!parties.resume(other_address, &[id(SERVER)]).await.unwrap());
    let more = [id(SERVER), id("spiffe://td/ns/x/sa/y")];
    assert!(!parties.resume(ADDRESS, &more).await.unwrap());
    let (refused, _) = parties.resume(ADDRESS, &more[1..]).await.unwrap_err();
    assert!(matches!(refused, Some(HboneError::UnexpectedPeer { .. })));
    assert!(parties.resumes().await);
}

#[tokio::test(start_paused = true)]
async fn rotation_of_either_side_prevents_resumption() {
    let ca = Ca::root("ours");
    let parties = Parties::of(&ca);
    assert!(!parties.resumes().await);
    parties.server.send_replace(credentials(&ca, SERVER, 3, HOUR));
    // The server has new ticket keys, so it cannot decrypt this ticket.
    assert!(!parties.resumes().await);
    assert!(parties.resumes().await);
    parties.client.send_replace(credentials(&ca, CLIENT, 4, HOUR));
    assert!(!parties.resumes().await);
    assert!(parties.resumes().await);
}

#[tokio::test(start_paused = true)]
async fn revocation_prevents_resumption() {
    let ca = Ca::root("ours");
    let parties = Parties::of(&ca);
    assert!(!parties.resumes().await);
    let revoked = Files::new().crl("list", &ca.revoke(&[1])).trust();
    let server = ca.identity(SERVER, 2);
    parties.server.send_replace(Credentials::new(server, revoked).unwrap());
    let (_, refused) = parties.resume(ADDRESS, &[id(SERVER)]).await.unwrap_err();
    assert!(matches!(refused, Some(HboneError::Revoked)), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn session_expires_with_either_certificate() {
    let ca = Ca::root("ours");
    // The server's certificate has expired: the client offers no ticket.
    let parties =
        Parties::new(credentials(&ca, CLIENT, 1, 3 * HOUR), credentials(&ca, SERVER, 2, HOUR));
    assert!(!parties.resumes().await);
    sleep(HOUR / 2).await;
    assert!(parties.resumes().await);
    sleep(HOUR).await;
    let (refused, _) = parties.resume(ADDRESS, &[id(SERVER)]).await.unwrap_err();
    assert!(matches!(refused, Some(HboneError::PeerCertificateExpired { .. })), "{refused:?}");
    // The client's certificate has expired: it offers no ticket.
    let parties =
        Parties::new(credentials(&ca, CLIENT, 1, HOUR), credentials(&ca, SERVER, 2, 3 * HOUR));
    assert!(!parties.resumes().await);
    sleep(HOUR + SECOND).await;
    let (_, refused) = parties.resume(ADDRESS, &[id(SERVER)]).await.unwrap_err();
    assert!(matches!(refused, Some(HboneError::PeerCertificateExpired { .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn tickets_of_several_servers_expire_with_earliest_certificate() {
    let ca = Ca::root("ours");
    let parties =
        Parties::new(credentials(&ca, CLIENT, 1, 3 * HOUR), credentials(&ca, SERVER, 2, HOUR));
    assert!(!parties.resumes().await);
    parties.server.send_replace(credentials(&ca, SERVER, 3, 3 * HOUR));
    assert!(!parties.resumes().await);
    sleep(HOUR).await;
    assert!(!parties.resumes().await);
    assert!(parties.resumes().await);
}

/// Performs a handshake, and reads until the tickets arrive. Returns true if it resumed a session.
async fn handshake(
    client: &ClientTls,
    server: &ServerTls,
    address: SocketAddr,
) -> Result<bool, HboneError> {
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let connect = async {
        let (mut stream, _) = client.connect(Box::new(near), address, &expected).await?;
        let mut greeting = [0; 5];
        // A refused client receives no data.
        let _refused = stream.read_exact(&mut greeting).await;
        Ok(())
    };
    let accept = async {
        let (mut stream, peer) = server.accept(Box::new(far)).await?;
        stream.write_all(b"hello").await.unwrap();
        stream.flush().await.unwrap();
        Ok(peer.resumed)
    };
    let (client, server) = tokio::join!(connect, accept);
    server.and_then(|resumed| client.map(|()| resumed))
}

#[tokio::test(start_paused = true)]
async fn server_verifies_resuming_client_again() {
    let ca = Ca::root("ours");
    let identity = ca.identity(CLIENT, 1);
    let server = credentials(&ca, SERVER, 2, 3 * HOUR);
    let authorities = Arc::new(Authorities::new(&identity, Trust::default()));
    let client =
        ClientTls::new(&identity, authorities, provider(&Cipher::ALL)).unwrap().with_later_expiry();
    assert!(!handshake(&client, server.server(), ADDRESS).await.unwrap());
    assert!(handshake(&client, server.server(), ADDRESS).await.unwrap());
    sleep(HOUR + SECOND).await;
    let refused = handshake(&client, server.server(), ADDRESS).await.unwrap_err();
    assert!(matches!(refused, HboneError::PeerCertificateExpired { .. }), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn ticket_expires_with_server_certificate() {
    let tickets = Tickets::new(clock::now() + HOUR).unwrap();
    let ticket = tickets.encrypt(b"session").unwrap();
    assert!(tickets.lifetime() >= 3599 && tickets.lifetime() <= 3600);
    assert_eq!(tickets.decrypt(&ticket).unwrap(), b"session");
    assert_eq!(tickets.encrypt(&[0; MAX_SESSION_BYTES + 1]), None);
    sleep(HOUR).await;
    assert_eq!((tickets.encrypt(b"session"), tickets.decrypt(&ticket)), (None, None));
}

#[tokio::test(start_paused = true)]
async fn number_of_peers_with_sessions_is_bounded() {
    let ca = Ca::root("ours");
    let (client, server) = (credentials(&ca, CLIENT, 1, HOUR), credentials(&ca, SERVER, 2, HOUR));
    for port in 1..=1030 {
        // The server never answers.
        let (near, far) = duplex(1024);
        drop(far);
        let address = SocketAddr::from(([10, 0, 0, 1], port));
        client.client().connect(Box::new(near), address, &[id(SERVER)]).await.unwrap_err();
    }
    assert_eq!(client.client().peers(), 1024);
    assert!(!handshake(client.client(), server.server(), ADDRESS).await.unwrap());
    assert_eq!(client.client().peers(), 1024);
}
