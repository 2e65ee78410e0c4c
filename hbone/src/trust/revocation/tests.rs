//! Tests of changes of trust while tunnels are open.

use http::HeaderMap;

use super::*;
use crate::clock;
use crate::identity::Identity;
use crate::testing::pki::{Ca, Files};
use crate::testing::{ADDRESS, CLIENT, HOUR, Mesh, SECOND, SERVER, Served, id, request};
use crate::trust::Trust;
use crate::tunnel::client::Tunnel;
use crate::tunnel::settings::{ClientSettings, ServerSettings};
use crate::tunnel::stream::{TunnelReader, TunnelStream};

const FOREIGN: &str = "spiffe://other/foreign";

/// An open stream between a client and a server whose credentials can change.
struct Open {
    client: watch::Sender<Credentials>,
    server: watch::Sender<Credentials>,
    mesh: Mesh,
    tunnel: Tunnel,
    served: Served,
    streams: [TunnelStream; 2],
}

fn publish(to: &watch::Sender<Credentials>, identity: Identity, trust: Trust) {
    to.send_replace(Credentials::new(identity, trust).unwrap());
}

impl Open {
    async fn between(client: (Identity, Trust), server: (Identity, Trust)) -> Self {
        let (client, client_credentials) =
            watch::channel(Credentials::new(client.0, client.1).unwrap());
        let (server, server_credentials) =
            watch::channel(Credentials::new(server.0, server.1).unwrap());
        let mesh = Mesh::of(
            client_credentials,
            ClientSettings::default(),
            server_credentials,
            ServerSettings::default(),
        );
        let (near, far, tunnel, served) = mesh.stream().await;
        Self { client, server, mesh, tunnel, served, streams: [near, far] }
    }

    /// Asserts that data passes in both directions.
    async fn assert_open(self) {
        let [near, far] = self.streams;
        let (_near_reader, mut writer) = near.split();
        let (mut reader, _far_writer) = far.split();
        writer.write("still here".into()).await.unwrap();
        assert_eq!(reader.read().await.unwrap().unwrap(), "still here");
    }
}

async fn ended(mut reader: TunnelReader) -> HboneError {
    tokio::time::timeout(SECOND, reader.read()).await.unwrap().unwrap_err()
}

#[tokio::test(start_paused = true)]
async fn revoked_peer_terminates_tunnel_on_either_side() {
    let ca = Ca::root("ours");
    let (client, server) = (ca.identity(CLIENT, 1), ca.identity(SERVER, 2));
    let clean = Files::new().crl("list", &ca.revoke(&[9]));
    let revoked = Files::new().crl("list", &ca.revoke(&[1, 2]));
    for by_client in [true, false] {
        let (client, server) = (client.clone(), server.clone());
        let open =
            Open::between((client.clone(), clean.trust()), (server.clone(), clean.trust())).await;
        match by_client {
            true => publish(&open.client, client, revoked.trust()),
            false => publish(&open.server, server, revoked.trust()),
        }
        let [near, far] = open.streams.map(TunnelStream::split);
        let (cut, lost) = if by_client { (near.0, far.0) } else { (far.0, near.0) };
        assert!(matches!(ended(cut).await, HboneError::Revoked));
        assert!(matches!(ended(lost).await, HboneError::Lost { .. }));
        assert!(open.tunnel.is_closed());
        open.served.ended().await;
    }
}

#[tokio::test(start_paused = true)]
async fn unaffected_tunnels_survive_trust_changes() {
    let ca = Ca::root("ours");
    let (client, server) = (ca.identity(CLIENT, 1), ca.identity(SERVER, 2));
    let files = Files::new().crl("list", &ca.revoke(&[9]));
    let clean = files.trust();
    let open = Open::between((client, clean.clone()), (server, clean.clone())).await;
    for serial in [3, 4] {
        publish(&open.client, ca.identity(CLIENT, serial), clean.clone());
        publish(&open.server, ca.identity(SERVER, serial + 2), clean.clone());
        tokio::time::sleep(SECOND).await;
    }
    let others = Files::new().crl("list", &ca.revoke(&[9, 10, 11])).trust();
    publish(&open.server, ca.identity(SERVER, 7), others);
    // Expiry of the peer's certificate terminates no tunnel.
    tokio::time::sleep(2 * HOUR).await;
    let later = Files::new().crl("list", &ca.revoke(&[9, 10, 11, 12])).trust();
    publish(&open.server, ca.identity(SERVER, 8), later);
    tokio::time::sleep(SECOND).await;
    open.assert_open().await;
}

#[tokio::test(start_paused = true)]
async fn invalid_revocation_list_keeps_tunnels_and_rejects_handshakes() {
    let (ca, impostor) = (Ca::root("ours"), Ca::root("ours"));
    let (client, server) = (ca.identity(CLIENT, 1), ca.identity(SERVER, 2));
    let now = clock::now();
    let bad = [
        impostor.revoke(&[1]),
        Ca::root("others").revoke(&[1]),
        ca.revoke_between(&[1], now - 3 * HOUR, now - 2 * HOUR),
    ];
    for list in bad {
        let files = Files::new().crl("list", &list);
        let parties = ((client.clone(), Trust::default()), (server.clone(), Trust::default()));
        let open = Open::between(parties.0, parties.1).await;
        publish(&open.server, server.clone(), files.trust());
        tokio::time::sleep(SECOND).await;
        let (near, far) = tokio::io::duplex(64 << 10);
        let expected = [id(SERVER)];
        let (_client, refused) = tokio::join!(
            open.mesh.connector.open(near, ADDRESS, &expected, SECOND),
            open.mesh.acceptor.accept(far, SECOND)
        );
        let error = refused.unwrap_err();
        assert!(error.kind().starts_with("revocation_"), "{error:?}");
        open.assert_open().await;
    }
}

#[tokio::test(start_paused = true)]
async fn removed_trust_domain_terminates_tunnel() {
    let (ca, other) = (Ca::root("ours"), Ca::root("other"));
    let federated = Files::new().bundle("other", &other);
    let theirs = Files::new().bundle("td", &ca);
    let server = ca.identity(SERVER, 2);
    let stranger = (other.identity(FOREIGN, 1), theirs.trust());
    let open = Open::between(stranger, (server.clone(), federated.trust())).await;
    publish(&open.server, server.clone(), Trust::default());
    let [_near, (far, _writer)] = open.streams.map(TunnelStream::split);
    assert!(matches!(ended(far).await, HboneError::UntrustedDomain { .. }));

    // Replacing the roots of the peer's trust domain terminates the tunnel too.
    let stranger = (other.identity(FOREIGN, 1), theirs.trust());
    let open = Open::between(stranger, (server.clone(), federated.trust())).await;
    let renewed = Files::new().bundle("other", &Ca::root("renewed"));
    publish(&open.server, server, renewed.trust());
    let [_near, (far, _writer)] = open.streams.map(TunnelStream::split);
    assert!(matches!(ended(far).await, HboneError::Tls { .. }));
}

#[tokio::test(start_paused = true)]
async fn dropped_credentials_publisher_keeps_tunnel() {
    let ca = Ca::root("ours");
    let parties =
        [ca.identity(CLIENT, 1), ca.identity(SERVER, 2)].map(|one| (one, Trust::default()));
    let [client, server] = parties;
    let Open { client, server, mesh, tunnel, served, streams } =
        Open::between(client, server).await;
    drop((client, server));
    // The tunnel must stay usable after a while too.
    tokio::time::sleep(HOUR / 2).await;
    let mut served = served;
    let (answer, _far) = tokio::join!(tunnel.connect(request(), SECOND), async {
        served.next().await.accept(HeaderMap::new()).unwrap()
    });
    answer.unwrap();
    drop((mesh, streams));
}
