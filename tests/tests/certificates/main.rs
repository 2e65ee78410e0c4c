//! End-to-end tests of certificates: renewal under traffic, defects, revocation, federation, and
//! CAs. `identity.rs` tests authentication.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod authority;
mod revocation;

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use underpass_tests::{
    APP, CLIENT, Family, Mesh, Pki, Proxy, SERVER, Scene, Server, Settings, Suite, exchange,
    http_get, until,
};

const IN_USE: &str = "certificate in use";
const KEPT: &str = "the current one, if any, stays in use";

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("repeated renewals of certificates fail no connection", renewal);
    suite.test("a proxy watches all files with one inotify instance", one_inotify_instance);
    suite.test("a mismatched certificate and key are logged, and the previous ones stay", mismatch);
    suite.test("a proxy issues and renews certificates from a local CA", local_ca);
    suite.test("workloads of federated trust domains reach each other", federation);
    suite.test("a certificate of an alias of the trust domain is accepted, one of another domain is refused", alias);
    suite.test("a proxy is unready while its certificate is expired", expiry);
    suite.test_with_users(
        "sidecar: a local CA renews certificates although the proxy's user cannot read its key",
        local_ca_of_root,
    );
    revocation::add_tests(&mut suite);
    authority::add_tests(&mut suite);
    suite.run()
}

/// The number of connections in a round of traffic.
const ROUND: usize = 50;

/// Opens connections one after another and exchanges bytes on each.
async fn traffic(scene: &Scene) {
    for _ in 0..ROUND {
        scene.echoed().await;
    }
}

async fn renewal() {
    let (scene, mut client, mut server) = Scene::with_proxies().await;
    let _app = Server::echo(&scene.server, APP);
    for round in 1..=4 {
        let renew = async {
            let (_, _) = (scene.pki.issue(CLIENT), scene.pki.issue(SERVER));
            client.more_than(round, &[IN_USE]).await;
            server.more_than(round, &[IN_USE]).await;
        };
        tokio::join!(traffic(&scene), renew);
    }
    for proxy in [&client, &server] {
        assert_eq!(proxy.count(&["connection failed"]), 0, "{}", proxy.log());
    }
}

/// The settings name a mesh folder, a certificate, its key and roots, a bundle and a revocation
/// list.
async fn one_inotify_instance() {
    let scene = Scene::new().await;
    let list = scene.pki.revoke(&[]);
    let other = Pki::of(scene.world.folder(), "other.test", "other");
    let bundle = format!("other.test={}", other.roots().display());
    let mesh = scene.world.folder().join("mesh");
    fs::create_dir(&mesh).expect("a folder");
    let documents = ["first", "second"].map(|name| mesh.join(name).with_extension("yaml"));
    fs::copy(&scene.mesh, &documents[0]).expect("a mesh");
    let trust = format!("trust: {{crls: [{list:?}], bundles: [{bundle:?}]}}");
    let settings = Settings::new(CLIENT).identity(&scene.client_files).mesh(&mesh).section(&trust);
    let mut proxy = scene.client.proxy(&settings).await;
    assert_eq!(inotify_instances(proxy.pid()), 1);

    let _renewed = scene.pki.issue(CLIENT);
    proxy.more_than(1, &[IN_USE]).await;
    for (round, file) in [&list, other.roots()].into_iter().enumerate() {
        let content = fs::read(file).expect("a file");
        fs::write(file, [content, b"\n".into()].concat()).expect("a file");
        proxy.more_than(round, &["revocation lists reloaded"]).await;
    }
    fs::write(&documents[1], "no mesh").expect("a file");
    proxy.line(&["ERROR", "second.yaml"]).await;
    settings.section("wrong: true").write(&scene.client);
    proxy.line(&["ERROR", "cannot reload the settings"]).await;
    assert_eq!(inotify_instances(proxy.pid()), 1);
}

fn inotify_instances(pid: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    // The process may close a descriptor at any time.
    let target = |entry: std::io::Result<fs::DirEntry>| fs::read_link(entry.ok()?.path()).ok();
    descriptors.filter_map(target).filter(|target| target.ends_with("anon_inode:inotify")).count()
}

async fn mismatch() {
    let (scene, mut client, _server) = Scene::with_proxies().await;
    let _app = Server::echo(&scene.server, APP);
    fs::copy(&scene.server_files.key, &scene.client_files.key).expect("a key");
    client.line(&[KEPT, "the key does not belong to the certificate"]).await;
    traffic(&scene).await;
    let before = client.count(&[IN_USE]);
    let _renewed = scene.pki.issue(CLIENT);
    client.more_than(before, &[IN_USE]).await;
    traffic(&scene).await;
}

async fn local_ca() {
    let scene = Scene::new().await;
    let _app = Server::echo(&scene.server, APP);
    let settings = |name: &str| {
        let ca = format!("identity: {{local_ca: {:?}, ttl: 3s}}", scene.pki.dir());
        Settings::new(name).section(&ca).mesh(&scene.mesh)
    };
    let mut client = scene.client.proxy(&settings(CLIENT)).await;
    let mut server = scene.server.proxy(&settings(SERVER)).await;
    for round in 1..=3 {
        let renewed = async {
            client.more_than(round, &[IN_USE]).await;
            server.more_than(round, &[IN_USE]).await;
        };
        tokio::join!(traffic(&scene), renewed);
    }
    assert_eq!(server.count(&["connection failed"]), 0, "{}", server.log());
    let line = server.line(&["connection complete"]).await;
    assert!(
        line.contains("src.identity=\"spiffe://cluster.local/ns/default/sa/client\""),
        "{line}"
    );
}

async fn expiry() {
    let scene = Scene::new().await;
    let files = scene.pki.issue_expiring(CLIENT, Duration::from_secs(5));
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    let readiness = async || {
        http_get(&scene.client, scene.client.at(Family::V4, 15021), "/healthz/ready").await
    };
    let certificate = files.certificate.display().to_string();
    proxy.line(&["WARN", "expires soon", &certificate]).await;
    assert_eq!(readiness().await.0, 200);
    proxy.line(&["ERROR", "the certificate has expired", &certificate]).await;
    let (status, reason) = readiness().await;
    assert_eq!((status, &*reason), (503, "not ready: the certificate has expired\n"));
    let _renewed = scene.pki.issue(CLIENT);
    proxy.more_than(1, &[IN_USE]).await;
    assert_eq!(readiness().await.0, 200);
}

async fn local_ca_of_root() {
    let scene = Scene::new().await;
    let ca = format!("identity: {{local_ca: {:?}, ttl: 3s}}", scene.pki.dir());
    let settings = Settings::new(CLIENT).section(&ca).mesh(&scene.mesh);
    let mut proxy = scene.client.proxy(&settings.set("interception.profile=sidecar")).await;
    proxy.line(&["WARN", "ca.key", "certificates are renewed"]).await;
    proxy.more_than(3, &[IN_USE]).await;
    assert_eq!(proxy.count(&["ERROR"]), 0, "{}", proxy.log());
}

/// A server of another trust domain with its own roots.
struct Foreign {
    scene: Scene,
    other: Pki,
}

impl Foreign {
    async fn new() -> Self {
        let scene = Scene::new().await;
        let other = Pki::of(scene.world.folder(), "other.test", "other");
        Self { scene, other }
    }

    /// Starts both proxies with additional settings.
    async fn start(&self, client: &str, server: &str) -> (Proxy, Proxy) {
        let Self { scene, other } = self;
        let mesh = Mesh::default().hbone(&scene.client).foreign(&scene.server, "other.test");
        let mesh = mesh.write(&scene.client, "federated");
        let client =
            Settings::new(CLIENT).identity(&scene.client_files).mesh(&mesh).section(client);
        let server = Settings::new(SERVER)
            .set("workload.trustDomain=other.test")
            .identity(&other.issue(SERVER))
            .mesh(&mesh)
            .section(server);
        tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server))
    }
}

async fn federation() {
    let foreign = Foreign::new().await;
    let Foreign { scene, other } = &foreign;
    let bundle = |domain: &str, pki: &Pki| {
        format!("trust: {{bundles: [{:?}]}}", format!("{domain}={}", pki.roots().display()))
    };
    let (of_other, of_own) = (bundle("other.test", other), bundle("cluster.local", &scene.pki));
    let (_client, mut server) = foreign.start(&of_other, &of_own).await;
    let app = scene.server.listen(APP);
    let (mut near, mut far, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut near, &mut far).await;
    drop((near, far));
    server.line(&["src.identity=\"spiffe://cluster.local/ns/default/sa/client\""]).await;
}

async fn alias() {
    let scene = Scene::new().await;
    let _app = Server::echo(&scene.server, APP);
    // A certificate of the domain's old name, from the same root.
    let old = Pki::of(scene.world.folder(), "old.test", "old");
    scene.pki.trust(&old);
    let files = underpass_config::IdentityFiles {
        roots: scene.pki.roots().to_owned(),
        ..old.issue(CLIENT)
    };
    let client = Settings::new(CLIENT)
        .set("workload.trustDomain=old.test")
        .identity(&files)
        .section("trust: {aliases: [cluster.local]}")
        .mesh(&scene.mesh);
    let mut proxy = scene.client.proxy(&client).await;
    let mut without = scene.server.proxy(&scene.server_settings()).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    without.line(&["connection failed", "trust.aliases"]).await;
    // Stop both proxies: the client's would back off before dialling again.
    tokio::join!(proxy.stop(), without.stop());
    let _client = scene.client.proxy(&client).await;
    let server = scene.server_settings().section("trust: {aliases: [old.test]}");
    let server = scene.server.proxy(&server).await;
    scene.echoed().await;
    // Policies apply to the peer under both names of the domain.
    for domain in ["cluster.local", "old.test"] {
        let rule = format!("[[[{{principals: [{{exact: {domain}/ns/default/sa/client}}]}}]]]");
        let mesh = Mesh::default().hbone(&scene.client).hbone(&scene.server);
        scene.set_mesh(&mesh.policy(domain, "Deny", &rule));
        let denied = format!("denied by: default/{domain}");
        until("the client is denied", async || {
            drop(scene.client.dial(scene.app(Family::V4)).await);
            server.count(&["policy_denied", &denied]) > 0
        })
        .await;
    }
}
