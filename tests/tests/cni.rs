//! Tests of `underpass cni`, the real binary as a CNI plugin, against `underpass node`.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use underpass_interception::TABLE;
use underpass_tests::{
    APP, Family, Mesh, Pki, Pod, Proxy, Settings, Suite, World, binary, exchange, tool, until,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both("an added pod is served with its own identity until it is deleted", lifecycle);
    suite.test("an addition fails closed while the daemon is down or lacks a fact", failures);
    suite.test("a daemon that was killed serves its pods again", restart);
    suite.test("garbage collection removes pods that the runtime does not name", collection);
    suite.test("the daemon installs the plugin and repairs its entry", upkeep);
    suite.run()
}

/// A node with the wired pods `a` and `b`.
struct Scene {
    node: Pod,
    a: Pod,
    b: Pod,
    pki: Pki,
    world: World,
}

impl Scene {
    async fn new() -> Self {
        let mut world = World::new();
        let node = world.pod("node").await;
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        world.wire(&mut a, &mut b).await;
        let pki = Pki::new(world.folder());
        Self { node, a, b, pki, world }
    }

    fn socket(&self) -> PathBuf {
        self.world.folder().join("cni.sock")
    }

    /// Starts the daemon in the node's namespace. The mesh has both pods.
    async fn daemon(&self, more: &str) -> Proxy {
        let mesh = Mesh::default().hbone(&self.a).hbone(&self.b).write(&self.node, "mesh");
        let source = format!("cni: {:?}", self.socket());
        let identity = format!("identity: {{local_ca: {:?}}}", self.pki.dir());
        let settings = Settings::node("node", &source).section(&identity).mesh(&mesh);
        // The plugin's timeout must not include a drain.
        let settings = settings.set("proxy.mtls=strict").set("timeouts.drain=100ms");
        self.node.proxy(&set_all(settings, more)).await
    }

    /// Calls the plugin like a runtime. Returns its exit code and its result.
    async fn call(&self, command: &str, pod: &Pod, changes: Value) -> (i32, String) {
        let ips: Vec<Value> = pod
            .ips()
            .iter()
            .map(|ip| json!({"interface": 0, "address": format!("{ip}/24")}))
            .collect();
        let path = pod.namespace().path();
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "pods", "type": "underpass-cni", "socket": self.socket(),
            "prevResult": {
                "cniVersion": "1.1.0", "ips": ips, "interfaces": [{"name": "eth0", "sandbox": path}],
            },
        });
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        let name = pod.name();
        let file = self.world.folder().join(format!("{command}-{name}.json"));
        fs::write(&file, config.to_string()).expect("a file");
        let script = format!(
            "CNI_COMMAND={command} CNI_CONTAINERID=container-{name} CNI_IFNAME=eth0 CNI_NETNS={} \
             CNI_ARGS='K8S_POD_NAMESPACE=default;K8S_POD_NAME={name};K8S_POD_UID=uid-{name}' \
             exec {} cni < {}",
            path.display(),
            binary().display(),
            file.display()
        );
        let printed = tool(&self.node, "sh", &["-c", &script]).await;
        (printed.status.code().unwrap_or(-1), printed.out)
    }

    async fn succeeds(&self, command: &str, pod: &Pod, changes: Value) -> String {
        let (status, out) = self.call(command, pod, changes).await;
        assert_eq!(status, 0, "{command}: {out}");
        out
    }

    /// The error code and the message of a call that must fail.
    async fn fails(&self, command: &str, pod: &Pod, changes: Value) -> (u64, String) {
        let (status, out) = self.call(command, pod, changes).await;
        assert_eq!(status, 1, "{command}: {out}");
        let error: Value = serde_json::from_str(&out).expect("an error in JSON");
        let text = |key: &str| error[key].as_str().unwrap_or_default();
        (error["code"].as_u64().expect("a code"), format!("{}; {}", text("msg"), text("details")))
    }

    /// Sends bytes from an application in `a` to one in `b`.
    async fn exchanged(&self, family: Family) {
        let app = self.b.listen(APP);
        let to = SocketAddr::new(self.b.ip(family), APP);
        let (mut client, mut server, peer) = self.a.meet(&app, to).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), self.a.ip(family), "the client's own address");
    }
}

fn set_all(settings: Settings, assignments: &str) -> Settings {
    assignments.split_whitespace().fold(settings, Settings::set)
}

async fn has_rules(pod: &Pod) -> bool {
    tool(pod, "nft", &["list", "table", "inet", TABLE]).await.status.success()
}

async fn lifecycle(family: Family) {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon("interception.on_exit=remove").await;
    scene.succeeds("STATUS", &scene.a, json!({})).await;
    for pod in [&scene.a, &scene.b, &scene.b] {
        let result = scene.succeeds("ADD", pod, json!({})).await;
        assert_eq!(
            serde_json::from_str::<Value>(&result).expect("a result")["cniVersion"],
            "1.1.0"
        );
        assert!(has_rules(pod).await, "the rules stand once ADD returns");
    }
    // Strict mTLS: only a tunnel with the identity of `a` passes.
    scene.exchanged(family).await;
    let access = daemon.line(&["access: ", "sa/a"]).await;
    assert!(access.contains("sa/b"), "{access}");
    scene.succeeds("CHECK", &scene.a, json!({})).await;
    for _ in 0..2 {
        scene.succeeds("DEL", &scene.a, json!({"prevResult": null})).await;
    }
    assert!(!has_rules(&scene.a).await, "DEL removes the rules");
    assert_eq!(scene.fails("CHECK", &scene.a, json!({})).await.0, 3);
    scene.succeeds("CHECK", &scene.b, json!({})).await;
}

async fn failures() {
    let scene = Scene::new().await;
    let (code, text) = scene.fails("ADD", &scene.a, json!({})).await;
    assert_eq!(code, 11);
    assert!(
        text.contains("cannot be reached") && text.contains("start `underpass node`"),
        "{text}"
    );
    assert_eq!(scene.fails("STATUS", &scene.a, json!({})).await.0, 50);
    scene.succeeds("DEL", &scene.a, json!({})).await;
    let _daemon = scene.daemon("").await;
    let unknown = scene.world.pod("unknown").await;
    let addresses = json!({"prevResult": {"ips": [{"address": "192.0.2.1/24"}]}});
    let (code, text) = scene.fails("ADD", &unknown, addresses.clone()).await;
    assert_eq!(code, 11);
    assert!(text.contains("the mesh has no workload default/unknown"), "{text}");
    let (code, text) = scene.fails("ADD", &scene.a, addresses).await;
    assert_eq!(code, 11);
    assert!(text.contains("but the pod has 192.0.2.1"), "{text}");
    assert!(!has_rules(&scene.a).await, "a refused addition changes nothing");
    // The namespace is the node's own.
    let (code, _) = scene
        .fails("ADD", &scene.node, json!({"prevResult": {"ips": [{"address": "192.0.2.1/24"}]}}))
        .await;
    assert_eq!(code, 101);
}

async fn restart() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon("").await;
    for pod in [&scene.a, &scene.b] {
        scene.succeeds("ADD", pod, json!({})).await;
    }
    daemon.signal(Signal::SIGKILL);
    daemon.ended_by_itself().await;
    assert_eq!(scene.fails("ADD", &scene.a, json!({})).await.0, 11);
    assert!(has_rules(&scene.a).await, "the pods stay closed");
    let mut daemon = scene.daemon("").await;
    for pod in ["default/a", "default/b"] {
        daemon.line(&["pod enrolled", pod]).await;
    }
    scene.exchanged(Family::V4).await;
    scene.succeeds("CHECK", &scene.a, json!({})).await;
}

async fn collection() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon("").await;
    for pod in [&scene.a, &scene.b] {
        scene.succeeds("ADD", pod, json!({})).await;
    }
    let valid = json!([{"containerID": "container-a", "ifname": "eth0"}]);
    scene.succeeds("GC", &scene.a, json!({"cni.dev/valid-attachments": valid})).await;
    daemon.line(&["pod removed", "uid-b"]).await;
    scene.succeeds("CHECK", &scene.a, json!({})).await;
    assert_eq!(scene.fails("CHECK", &scene.b, json!({})).await.0, 3);
}

async fn upkeep() {
    const LIST: &str = r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;
    let scene = Scene::new().await;
    let (net, bin) = (scene.world.folder().join("net.d"), scene.world.folder().join("bin"));
    for folder in [&net, &bin] {
        fs::create_dir(folder).expect("a folder");
    }
    let folders = format!(
        "node.cni_install.net_dir={} node.cni_install.bin_dir={}",
        net.display(),
        bin.display()
    );
    let _daemon = scene.daemon(&folders).await;
    let (code, text) = scene.fails("STATUS", &scene.a, json!({})).await;
    assert_eq!(code, 50);
    assert!(text.contains("no network configuration yet"), "{text}");
    let list = net.join("10-n.conflist");
    for _ in 0..2 {
        fs::write(&list, LIST).expect("a file");
        until("the entry is added", async || {
            fs::read_to_string(&list).expect("a list").contains("underpass-cni")
        })
        .await;
    }
    // The installed plugin is selected by its name alone.
    let plugin = bin.join("underpass-cni").display().to_string();
    let script = format!("echo '{{}}' | CNI_COMMAND=VERSION exec {plugin}");
    let printed = tool(&scene.node, "sh", &["-c", &script]).await;
    assert!(printed.ok().contains("supportedVersions"));
    let [net, bin] = [net, bin].map(|folder| folder.display().to_string());
    let uninstall = ["cni", "uninstall", "--net-dir", &net, "--bin-dir", &bin, "--dry-run"];
    assert!(scene.node.underpass(&uninstall).await.ok().contains("would remove"));
}
