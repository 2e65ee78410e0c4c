//! A node with two pods. Calls the plugin like a container runtime.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde_json::{Value, json};
use underpass_interception::TABLE;
use underpass_tests::{
    APP, Family, Mesh, Pki, Pod, Proxy, Settings, World, binary, exchange, http_get, tool,
};

/// A node with the wired pods `a` and `b`.
pub(crate) struct Scene {
    pub(crate) node: Pod,
    pub(crate) a: Pod,
    pub(crate) b: Pod,
    pub(crate) pki: Pki,
    pub(crate) world: World,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        let mut world = World::new();
        let node = world.pod("node").await;
        let (mut a, mut b) = (world.pod("a").await, world.pod("b").await);
        world.wire(&mut a, &mut b).await;
        let pki = Pki::new(world.folder());
        Self { node, a, b, pki, world }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.world.folder().join("cni.sock")
    }

    /// Starts the daemon in the node's namespace. The mesh has both pods.
    pub(crate) async fn daemon(&self, more: &str) -> Proxy {
        let mesh = Mesh::default().hbone(&self.a).hbone(&self.b);
        self.daemon_in(mesh, more).await
    }

    /// Starts the daemon in the node's namespace with another mesh.
    pub(crate) async fn daemon_in(&self, mesh: Mesh, more: &str) -> Proxy {
        self.node.proxy(&more.split_whitespace().fold(self.settings_in(mesh), Settings::set)).await
    }

    /// The settings of the daemon with both pods in the mesh.
    pub(crate) fn settings(&self) -> Settings {
        self.settings_in(Mesh::default().hbone(&self.a).hbone(&self.b))
    }

    fn settings_in(&self, mesh: Mesh) -> Settings {
        let mesh = mesh.write(&self.node, "mesh");
        let source = format!("cni: {:?}", self.socket());
        let identity = format!("identity: {{local_ca: {:?}}}", self.pki.dir());
        let settings = Settings::node("node", &source).section(&identity).mesh(&mesh);
        // The plugin's timeout must not include a drain.
        settings.set("proxy.mtls=strict").set("timeouts.drain=100ms")
    }

    /// The readiness of the daemon: its status and its text.
    pub(crate) async fn readiness(&self) -> (u16, String) {
        http_get(&self.node, SocketAddr::from(([127, 0, 0, 1], 15021)), "/healthz/ready").await
    }

    /// The daemon's status lines about its pods.
    pub(crate) async fn pods(&self) -> String {
        http_get(&self.node, SocketAddr::from(([127, 0, 0, 1], 15021)), "/healthz/pods").await.1
    }

    pub(crate) async fn metrics(&self) -> String {
        http_get(&self.node, SocketAddr::from(([127, 0, 0, 1], 15020)), "/metrics").await.1
    }

    /// Calls the plugin like a runtime. Returns its exit code and its result.
    pub(crate) async fn call(&self, command: &str, pod: &Pod, changes: Value) -> (i32, String) {
        let path = pod.namespace().path();
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "pods", "type": "underpass-cni", "socket": self.socket(),
        });
        config["prevResult"] = previous_result(pod, &pod.ips());
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

    pub(crate) async fn succeeds(&self, command: &str, pod: &Pod, changes: Value) -> String {
        let (status, out) = self.call(command, pod, changes).await;
        assert_eq!(status, 0, "{command}: {out}");
        out
    }

    /// The error code and the message of a call that must fail.
    pub(crate) async fn fails(&self, command: &str, pod: &Pod, changes: Value) -> (u64, String) {
        let (status, out) = self.call(command, pod, changes).await;
        assert_eq!(status, 1, "{command}: {out}");
        let error: Value = serde_json::from_str(&out).expect("an error in JSON");
        let text = |key: &str| error[key].as_str().unwrap_or_default();
        (error["code"].as_u64().expect("a code"), format!("{}; {}", text("msg"), text("details")))
    }

    /// Sends bytes from an application in `a` to one in `b`.
    pub(crate) async fn exchanged(&self, family: Family) {
        let app = self.b.listen(APP);
        let to = SocketAddr::new(self.b.ip(family), APP);
        let (mut client, mut server, peer) = self.a.meet(&app, to).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), self.a.ip(family), "the client's own address");
    }
}

/// The result of the previous plugin, which gave the pod these addresses.
pub(crate) fn previous_result(pod: &Pod, ips: &[IpAddr]) -> Value {
    let address = |ip: &IpAddr| json!({"interface": 0, "address": format!("{ip}/24")});
    let ips: Vec<Value> = ips.iter().map(address).collect();
    let sandbox = pod.namespace().path();
    json!({"cniVersion": "1.1.0", "ips": ips, "interfaces": [{"name": "eth0", "sandbox": sandbox}]})
}

pub(crate) async fn has_rules(pod: &Pod) -> bool {
    tool(pod, "nft", &["list", "table", "inet", TABLE]).await.status.success()
}
