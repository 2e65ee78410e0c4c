//! Compares mutual trust with a real handshake in each case. Tests changes of trust.

use std::time::SystemTime;

use tokio::time::timeout;

use super::*;
use crate::clock;
use crate::identity::Identity;
use crate::testing::pki::{Ca, Files};
use crate::testing::{ADDRESS, CLIENT, HOUR, Mesh, SECOND, SERVER, id};
use crate::trust::Trust;
use crate::tunnel::settings::{ClientSettings, ServerSettings};

const FOREIGN: &str = "spiffe://other/foreign";

type End = (Identity, Trust);

fn watched((identity, trust): &End) -> (watch::Sender<Credentials>, watch::Receiver<Credentials>) {
    watch::channel(Credentials::new(identity.clone(), trust.clone()).unwrap())
}

/// The errors of both sides, without a tunnel and with a tunnel. `None` if they trust each other.
async fn outcomes(client: &End, server: &End, expected: &str) -> [Option<[String; 2]>; 2] {
    let ((_client, client), (_server, server)) = (watched(client), watched(server));
    let expected = [id(expected)];
    let mutual = MutualTrust::establish(&client, &server, &expected.clone().into());
    let mesh = Mesh::of(client, ClientSettings::default(), server, ServerSettings::default());
    let (near, far) = tokio::io::duplex(64 << 10);
    let dialled = async {
        let tunnel = mesh.connector.open(near, ADDRESS, &expected, SECOND).await?;
        // A server rejects a client only after the client's handshake ended.
        tunnel.connect(crate::testing::request(), SECOND).await.map(drop)
    };
    let accepted = async {
        let mut tunnel = mesh.acceptor.accept(far, SECOND).await?;
        if let Some(request) = tunnel.next().await {
            // Keep the stream: dropping it would abort it.
            let _stream = request.accept(http::HeaderMap::new());
            tunnel.next().await;
        }
        Ok::<_, HboneError>(())
    };
    let (dialled, accepted) = tokio::join!(dialled, accepted);
    let handshake = dialled.err().map(|client| {
        let server = accepted.expect_err(&client.to_string());
        [client.to_string(), server.to_string()]
    });
    let mutual = mutual.err().map(|distrust| [distrust.client, distrust.server]);
    [mutual.map(|errors| errors.map(|error| error.to_string())), handshake]
}

async fn assert_same(case: &str, client: &End, server: &End, expected: &str, trusted: bool) {
    let [mutual, handshake] = outcomes(client, server, expected).await;
    assert_eq!(mutual, handshake, "{case}");
    assert_eq!(mutual.is_none(), trusted, "{case}: {mutual:?}");
}

#[tokio::test(start_paused = true)]
async fn rejects_the_same_peers_as_a_handshake_with_the_same_errors() {
    let (ca, impostor, other) = (Ca::root("ours"), Ca::root("ours"), Ca::root("other"));
    let none = Trust::default;
    let (client, server) = ((ca.identity(CLIENT, 1), none()), (ca.identity(SERVER, 2), none()));
    assert_same("both valid", &client, &server, SERVER, true).await;
    assert_same("unexpected server", &client, &server, CLIENT, false).await;
    let soon = clock::now() + HOUR / 2;
    let expiring = |who| (ca.identity_until(who, 3, soon), none());
    let (expired_client, expired_server) = (expiring(CLIENT), expiring(SERVER));
    let fake = (impostor.identity(CLIENT, 1), none());
    assert_same("client of another root", &fake, &server, SERVER, false).await;
    let foreign = (other.identity(FOREIGN, 1), none());
    assert_same("unknown trust domain", &client, &foreign, FOREIGN, false).await;
    let bundle = |name: &str, ca: &Ca| Files::new().bundle(name, ca).trust();
    let knows_other = (client.0.clone(), bundle("other", &other));
    assert_same("server does not know us", &knows_other, &foreign, FOREIGN, false).await;
    let knows_us = (foreign.0.clone(), bundle("td", &ca));
    assert_same("federated", &knows_other, &knows_us, FOREIGN, true).await;
    assert_same("we do not know the server", &client, &knows_us, FOREIGN, false).await;
    for (serial, case) in [(1, "revoked client"), (2, "revoked server"), (9, "others revoked")] {
        let files = Files::new().crl("list", &ca.revoke(&[serial]));
        let [one, two] = [&client.0, &server.0].map(|id| (id.clone(), files.trust()));
        assert_same(case, &one, &two, SERVER, serial == 9).await;
    }
    let old = ca.revoke_between(&[9], clock::now() - 3 * HOUR, clock::now() - 2 * HOUR);
    let stale = (server.0.clone(), Files::new().crl("list", &old).trust());
    assert_same("stale list at the server", &client, &stale, SERVER, false).await;
    tokio::time::sleep(HOUR * 3 / 4).await;
    assert_same("expired client", &expired_client, &server, SERVER, false).await;
    assert_same("expired server", &client, &expired_server, SERVER, false).await;
}

#[tokio::test]
async fn accepts_identities_in_aliases_of_their_trust_domain() {
    let ca = Ca::root("ours");
    let alias = || Files::new().alias("old").alias("td").trust();
    let client = watched(&(ca.identity(CLIENT, 1), alias()));
    let server = watched(&(ca.identity("spiffe://old/ns/default/sa/server", 2), alias()));
    // Each side has the other's name as an alias of its own trust domain.
    let trust = established(&client.1, &server.1);
    assert_eq!(trust.client().spiffe_id(), &id(CLIENT));
    assert!(!trust.client().aliases().is_empty());
    assert_eq!(trust.server().spiffe_id().trust_domain().to_string(), "old");
}

fn established(
    client: &watch::Receiver<Credentials>,
    server: &watch::Receiver<Credentials>,
) -> MutualTrust {
    MutualTrust::establish(client, server, &[id(SERVER)].into()).unwrap()
}

fn publish(to: &watch::Sender<Credentials>, identity: Identity, trust: Trust) {
    to.send_replace(Credentials::new(identity, trust).unwrap());
}

#[tokio::test(start_paused = true)]
async fn revocation_of_either_end_ends_mutual_trust() {
    let ca = Ca::root("ours");
    let (client, server) = (ca.identity(CLIENT, 1), ca.identity(SERVER, 2));
    let revoked = Files::new().crl("list", &ca.revoke(&[1, 2])).trust();
    for by_client in [true, false] {
        let end = |identity: &Identity| watched(&(identity.clone(), Trust::default()));
        let (one, two) = (end(&client), end(&server));
        let trust = established(&one.1, &two.1);
        let (sender, identity) = if by_client { (&one.0, &client) } else { (&two.0, &server) };
        publish(sender, identity.clone(), revoked.clone());
        let (distrusted, kept) = (trust.server_revocation(), trust.client_revocation());
        let (distrusted, kept) = if by_client { (distrusted, kept) } else { (kept, distrusted) };
        assert!(matches!(timeout(SECOND, distrusted).await.unwrap(), HboneError::Revoked));
        timeout(SECOND, kept).await.unwrap_err();
    }
}

#[tokio::test(start_paused = true)]
async fn renewed_certificate_keeps_connections_and_is_verified_for_new_ones() {
    let ca = Ca::root("ours");
    let (client, server) = (ca.identity(CLIENT, 1), ca.identity(SERVER, 2));
    let (one, two) = (watched(&(client, Trust::default())), watched(&(server, Trust::default())));
    let trust = established(&one.1, &two.1);
    let is_current = || trust.is_current(&one.1.borrow(), &two.1.borrow());
    assert!(is_current());
    publish(&two.0, ca.identity(SERVER, 3), Trust::default());
    assert!(!is_current());
    timeout(SECOND, trust.server_revocation()).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn expired_certificate_prevents_new_connections_and_keeps_open_ones() {
    let ca = Ca::root("ours");
    let end: SystemTime = clock::now() + HOUR / 2;
    let one = watched(&(ca.identity_until(CLIENT, 1, end), Trust::default()));
    let two = watched(&(ca.identity(SERVER, 2), Trust::default()));
    let trust = established(&one.1, &two.1);
    assert!(trust.is_current(&one.1.borrow(), &two.1.borrow()));
    tokio::time::sleep(HOUR).await;
    assert!(!trust.is_current(&one.1.borrow(), &two.1.borrow()));
    timeout(SECOND, trust.client_revocation()).await.unwrap_err();
}

async fn panicking() -> HboneError {
    panic!("of a monitor")
}

#[tokio::test(start_paused = true)]
async fn panic_of_monitor_revokes_both_ends() {
    let ca = Ca::root("ours");
    let one = watched(&(ca.identity(CLIENT, 1), Trust::default()));
    let two = watched(&(ca.identity(SERVER, 2), Trust::default()));
    let mut trust = established(&one.1, &two.1);
    let ends = [&trust.server, &trust.client]
        .map(|peer| (RevocationMonitor::testing(panicking()), peer.clone()));
    trust.monitoring.abort();
    trust.monitoring = tokio::spawn(follow(ends)).abort_handle();
    timeout(SECOND, trust.server_revocation()).await.unwrap();
    timeout(SECOND, trust.client_revocation()).await.unwrap();
    assert!(!trust.is_current(&one.1.borrow(), &two.1.borrow()));
}
