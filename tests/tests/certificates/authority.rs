//! End-to-end tests of `underpass ca serve`, Istio's CA protocol.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use underpass_tests::{
    APP, Background, CLIENT, Family, SERVER, Scene, Server, Settings, Suite, binary, http_get,
    until,
};

use crate::{IN_USE, KEPT, traffic};

/// istiod's port.
const PORT: u16 = 15012;

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("proxies obtain and renew certificates from ca serve", issued);
    suite.test(
        "a proxy keeps its certificate while the CA is down and renews it afterwards",
        ca_down,
    );
    suite.test("a proxy without a token gets no certificate and logs the reason", missing_token);
    suite.test("a client of the CA gets only the identities of its token", other_identity_refused);
    suite.test("a node's token obtains certificates for its workloads", impersonation);
}

/// A CA in the server's pod, with the files that its clients need.
struct Authority {
    scene: Scene,
    clients: PathBuf,
    running: Option<Background>,
}

impl Authority {
    async fn new(clients: &str) -> Self {
        let scene = Scene::new().await;
        let clients_file = scene.world.folder().join("clients.yaml");
        let mut authority = Self { scene, clients: clients_file, running: None };
        fs::write(&authority.clients, clients).expect("a file");
        for (name, token) in [("client-token", "clients-secret\n"), ("node-token", "nodes-secret")]
        {
            fs::write(authority.file(name), token).expect("a file");
        }
        authority.start().await;
        authority
    }

    async fn start(&mut self) {
        let listen = self.address().to_string();
        let (dir, clients) = (self.scene.pki.dir(), &self.clients);
        let paths = [dir, clients].map(|path| path.to_str().expect("a path in UTF-8"));
        let [dir, clients] = paths;
        let arguments = [
            "ca",
            "serve",
            "--dir",
            dir,
            "--listen",
            &listen,
            "--clients",
            clients,
            "--name",
            "ca.test",
        ];
        self.running = Some(self.scene.server.background(binary(), &arguments));
        until("the CA listens", async || self.scene.client.dial(self.address()).await.is_ok())
            .await;
    }

    async fn stop(&mut self) {
        self.running = None;
        until("the CA is gone", async || self.scene.server.dial(self.address()).await.is_err())
            .await;
    }

    fn address(&self) -> SocketAddr {
        self.scene.server.at(Family::V4, PORT)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scene.world.folder().join(name)
    }

    /// The settings of a workload that authenticates with `token`.
    fn settings(&self, name: &str, token: &str) -> Settings {
        let roots = self.scene.pki.dir().join("roots.pem");
        let (address, token) = (self.address(), self.file(token));
        let ca = format!(
            "identity: {{ttl: 3s, istio_ca: {{address: \"https://{address}\", server_name: ca.test, \
             roots: {roots:?}, token: {token:?}}}}}"
        );
        Settings::new(name).section(&ca).mesh(&self.scene.mesh)
    }
}

const BOTH: &str = "clients:
- token: clients-secret
  identities: [spiffe://cluster.local/ns/default/sa/client]
- token: nodes-secret
  identities: [\"spiffe://cluster.local/ns/default/sa/*\"]
";

async fn issued() {
    let authority = Authority::new(BOTH).await;
    let scene = &authority.scene;
    let _app = Server::echo(&scene.server, APP);
    let mut client = scene.client.proxy(&authority.settings(CLIENT, "client-token")).await;
    let mut server = scene.server.proxy(&authority.settings(SERVER, "node-token")).await;
    for round in 1..=3 {
        let renewed = async {
            client.more_than(round, &[IN_USE]).await;
            server.more_than(round, &[IN_USE]).await;
        };
        tokio::join!(traffic(scene), renewed);
    }
    assert_eq!(client.count(&["connection failed"]), 0, "{}", client.log());
    server.line(&["src.identity=\"spiffe://cluster.local/ns/default/sa/client\""]).await;
}

async fn ca_down() {
    let mut authority = Authority::new(BOTH).await;
    let settings = authority.settings(CLIENT, "client-token");
    let mut client = authority.scene.client.proxy(&settings).await;
    authority.stop().await;
    client.line(&[KEPT, "identity.istio_ca.address"]).await;
    authority.start().await;
    let before = client.count(&[IN_USE]);
    client.more_than(before, &[IN_USE]).await;
}

async fn missing_token() {
    let authority = Authority::new(BOTH).await;
    fs::write(authority.file("client-token"), "another-secret").expect("a file");
    refused(&authority, "identity.istio_ca.token").await;
}

async fn other_identity_refused() {
    let authority = Authority::new(&BOTH.replace("sa/client", "sa/another")).await;
    refused(&authority, "spiffe://cluster.local/ns/default/sa/client").await;
}

/// Asserts that the client's proxy gets no certificate, and logs the reason `why`.
async fn refused(authority: &Authority, why: &str) {
    let pod = &authority.scene.client;
    let arguments = authority.settings(CLIENT, "client-token").arguments(pod);
    let arguments: Vec<_> =
        ["run"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
    let proxy = pod.background(binary(), &arguments);
    let endpoint = pod.at(Family::V4, 15020);
    until("the readiness endpoint is up", async || pod.dial(endpoint).await.is_ok()).await;
    until("the certificate was refused", async || {
        pod.metrics().await.sum("underpass_certificate_failures_total", &[]) > Some(0.0)
    })
    .await;
    let (status, _) = http_get(pod, pod.at(Family::V4, 15021), "/healthz/ready").await;
    assert_eq!(status, 503, "the proxy is unready without a certificate");
    proxy.signal(Signal::SIGTERM);
    let output = proxy.ended().await;
    let output = format!("{}{}", output.out, output.err);
    assert!(output.contains(why), "{output}");
}

async fn impersonation() {
    let authority = Authority::new(BOTH).await;
    let scene = &authority.scene;
    let _app = Server::echo(&scene.server, APP);
    let node = |name: &str| {
        authority.settings(name, "node-token").set("identity.istio_ca.impersonate=true")
    };
    let _client = scene.client.proxy(&node(CLIENT)).await;
    let mut server = scene.server.proxy(&node(SERVER)).await;
    scene.echoed().await;
    server.line(&["src.identity=\"spiffe://cluster.local/ns/default/sa/client\""]).await;
}
