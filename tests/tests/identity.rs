//! End-to-end tests of authentication: unauthorized peers are refused, the log contains the reason,
//! and no application is reached.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::process::ExitCode;

use underpass_config::IdentityFiles;
use underpass_tests::{
    APP, CLIENT, Family, HBONE, Pki, Proxy, SERVER, Scene, Settings, Suite, TlsClient, TlsServer,
    exchange,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    add_clients(&mut suite);
    add_servers(&mut suite);
    add_pairs(&mut suite);
    suite.test(
        "a proxy that trusts two authorities accepts clients of both",
        accepts_either_authority,
    );
    suite.test(
        "a storm of refused certificates is logged in few short lines",
        storm_of_refused_certificates,
    );
    suite.run()
}

/// Adds trials with clients that the proxy's server must refuse.
fn add_clients(suite: &mut Suite) {
    suite.test("a client without a certificate is refused", async || {
        client_is_refused(|_| TlsClient::new(None), "no_certificate").await;
    });
    suite.test("a client whose certificate has expired is refused", async || {
        let client = |scene: &Scene| TlsClient::new(Some(&scene.pki.issue_expired(CLIENT)));
        client_is_refused(client, "expired").await;
    });
    suite.test("a client of another authority is refused", async || {
        let client = |scene: &Scene| TlsClient::new(Some(&of_another_authority(scene, CLIENT)));
        client_is_refused(client, "tls").await;
    });
    suite.test(
        "a client of another trust domain is refused, even if its root is trusted",
        async || {
            let client = |scene: &Scene| TlsClient::new(Some(&of_another_domain(scene, CLIENT)));
            client_is_refused(client, "untrusted_domain").await;
        },
    );
    suite.test("a client that does not offer HTTP/2 is refused", async || {
        let client = |scene: &Scene| TlsClient::new(Some(&scene.client_files)).without_alpn();
        client_is_refused(client, "tls").await;
    });
}

/// Adds trials with servers that the proxy's client must refuse.
fn add_servers(suite: &mut Suite) {
    suite.test("a server whose certificate has expired is refused", async || {
        let server = |scene: &Scene| TlsServer::new(&scene.pki.issue_expired(SERVER));
        server_is_refused(server, "expired").await;
    });
    suite.test("a server that does not choose HTTP/2 is refused", async || {
        let server = |scene: &Scene| TlsServer::new(&scene.server_files).without_alpn();
        server_is_refused(server, "tls").await;
    });
    suite.test(
        "a server of another trust domain is refused, even if its root is trusted",
        async || {
            let server = |scene: &Scene| TlsServer::new(&of_another_domain(scene, SERVER));
            server_is_refused(server, "untrusted_domain").await;
        },
    );
}

/// Adds trials with two proxies that must refuse each other and log the reason.
fn add_pairs(suite: &mut Suite) {
    suite.test("a server with another identity is refused and both sides log it", async || {
        let wrong = |scene: &Scene| (scene.client_files.clone(), scene.pki.issue("other"));
        let client = between_proxies(wrong, "identity", "certificate_refused").await;
        for part in [
            "presented spiffe://cluster.local/ns/default/sa/other",
            "expected spiffe://cluster.local/ns/default/sa/server",
        ] {
            assert!(client.contains(part), "{part:?} is not in {client}");
        }
    });
    suite.test("a server of another authority is refused and both sides log it", async || {
        let foreign =
            |scene: &Scene| (scene.client_files.clone(), of_another_authority(scene, SERVER));
        between_proxies(foreign, "tls", "certificate_refused").await;
    });
    suite.test("a client of another authority is refused and both sides log it", async || {
        let foreign =
            |scene: &Scene| (of_another_authority(scene, CLIENT), scene.server_files.clone());
        between_proxies(foreign, "certificate_refused", "tls").await;
    });
}

/// A certificate with the right name from an additional authority that only its owner trusts.
fn of_another_authority(scene: &Scene, account: &str) -> IdentityFiles {
    let folder = scene.world.folder().join("other");
    std::fs::create_dir_all(&folder).expect("a folder");
    let other = Pki::of(&folder, "cluster.local", "roots");
    other.trust(&scene.pki);
    other.issue(account)
}

/// A certificate with the right name in the wrong trust domain, whose root all proxies trust.
fn of_another_domain(scene: &Scene, account: &str) -> IdentityFiles {
    let folder = scene.world.folder().join("elsewhere");
    std::fs::create_dir_all(&folder).expect("a folder");
    let other = Pki::of(&folder, "elsewhere.test", "roots");
    scene.pki.trust(&other);
    IdentityFiles { roots: scene.pki.roots().to_owned(), ..other.issue(account) }
}

async fn client_is_refused(client: impl FnOnce(&Scene) -> TlsClient, reason: &str) {
    let scene = Scene::new().await;
    let client = client(&scene);
    let mut proxy = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let read = client.read(&scene.client, scene.server.at(Family::V4, HBONE)).await;
    assert!(read.is_err(), "the client got {read:?} bytes instead of an alert");
    failed(&mut proxy, reason).await;
    assert!(!app.is_reached(), "the application was reached");
}

async fn server_is_refused(server: impl FnOnce(&Scene) -> TlsServer, reason: &str) {
    let scene = Scene::new().await;
    let server = server(&scene);
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    let listener = scene.server.listen(HBONE);
    let app = scene.server.listen(APP);
    let serve = async {
        let (stream, _) = listener.accept().await;
        server.receive(stream).await
    };
    let to = scene.app(Family::V4);
    let (received, ()) = tokio::join!(serve, scene.client.dial_and_see_reset(to));
    assert!(received.is_err(), "the server received {received:?}");
    failed(&mut proxy, reason).await;
    assert!(!app.is_reached(), "the application was reached");
}

/// Waits for the access-log line of the failed connection.
async fn failed(proxy: &mut Proxy, reason: &str) -> String {
    let reason = format!("reason=\"{reason}\"");
    let line = proxy.line(&["connection failed", &reason]).await;
    assert_eq!(proxy.access_lines(1).await, [line.as_str()]);
    line
}

/// Starts both proxies with these certificates (client's, server's). Expects RST at the application
/// and a logged reason on both sides. Returns the client's line.
async fn between_proxies(
    files: impl FnOnce(&Scene) -> (IdentityFiles, IdentityFiles),
    client_reason: &str,
    server_reason: &str,
) -> String {
    let scene = Scene::new().await;
    let (client_files, server_files) = files(&scene);
    let settings = |name: &str, files| Settings::new(name).identity(files).mesh(&scene.mesh);
    let mut client = scene.client.proxy(&settings(CLIENT, &client_files)).await;
    let mut server = scene.server.proxy(&settings(SERVER, &server_files)).await;
    let app = scene.server.listen(APP);
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    assert!(!app.is_reached(), "the application was reached");
    failed(&mut server, server_reason).await;
    failed(&mut client, client_reason).await
}

/// The number of clients with a self-signed certificate of 60 KB.
const STORM: usize = 200;

async fn storm_of_refused_certificates() {
    let scene = Scene::new().await;
    let mut server = scene.server.proxy(&scene.server_settings()).await;
    let client = TlsClient::new(Some(&self_signed(&scene, 60_000)));
    let hbone = scene.server.at(Family::V4, HBONE);
    for _ in 0..STORM {
        let read = client.read(&scene.client, hbone).await;
        assert!(read.is_err(), "the client got {read:?} bytes instead of an alert");
    }
    server.line(&["connection failed", "reason=\"svid\""]).await;
    server.line(&["similar log lines suppressed", "kind=\"failed handshakes\""]).await;
    let (log, longest) = (server.log(), server.log().lines().map(str::len).max());
    assert!(longest.is_some_and(|bytes| bytes < 2000), "{longest:?} bytes in a line");
    assert!(log.lines().count() < STORM, "{log}");
    let failed = scene.server.metrics().await;
    let failed = failed.sum("underpass_handshakes_failed_total", &[("reason", "svid")]);
    assert_eq!(failed, Some(STORM as f64));
}

/// A self-signed certificate with a URI name of `bytes` bytes.
fn self_signed(scene: &Scene, bytes: usize) -> IdentityFiles {
    let file = |name: &str| scene.world.folder().join(name);
    let files = IdentityFiles {
        certificate: file("storm.pem"),
        key: file("storm.key"),
        roots: scene.pki.roots().to_owned(),
    };
    let names = format!("[x]\nsubjectAltName=URI:spiffe://cluster.local/{}\n", "a".repeat(bytes));
    std::fs::write(file("storm.cnf"), format!("[req]\ndistinguished_name=dn\n[dn]\n{names}"))
        .expect("a file");
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-new", "-nodes", "-newkey", "ec", "-subj", "/O=storm"])
        .args(["-pkeyopt", "ec_paramgen_curve:P-256", "-extensions", "x", "-config"])
        .arg(file("storm.cnf"))
        .arg("-keyout")
        .arg(&files.key)
        .arg("-out")
        .arg(&files.certificate)
        .output()
        .expect("this test needs the openssl command");
    assert!(made.status.success(), "{made:?}");
    files
}

async fn accepts_either_authority() {
    let scene = Scene::new().await;
    let folder = scene.world.folder().join("second");
    std::fs::create_dir_all(&folder).expect("a folder");
    let second = Pki::of(&folder, "cluster.local", "roots");
    scene.pki.trust(&second);
    let files = IdentityFiles { roots: scene.pki.roots().to_owned(), ..second.issue(CLIENT) };
    let settings = Settings::new(CLIENT).identity(&files).mesh(&scene.mesh);
    let _client = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
}
