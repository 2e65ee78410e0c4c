//! Sets up the demonstration of the node daemon: two nodes, four pods, and a daemon on each node.
//!
//! ```text
//!  client 10.79.0.1 ─┐                         ┌─ store 10.79.0.3
//!                    ├─ bridge ─────── bridge ─┤
//!  web    10.79.0.2 ─┘  node-a         node-b  └─ guest 10.79.0.4
//! ```
//!
//! `guest` has no pod file at first. The policy of `store` allows only `client`.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use underpass_config::SpiffeId;
use underpass_hbone::CertificateAuthority;
use underpass_interception::{Namespace, PacketCapture, Sandbox, sandbox_folder};

use crate::demo::setup::{
    self, FOLDER, HTTP_PORT, METRICS_PORT, connect, create_namespace, enter_command, start_proxy,
};
use crate::demo::web::{self, Exchange, Server};
use crate::demo::{DemoError, STEP_TIMEOUT};
use crate::spawn::ChildProxy;

const NODES: [&str; 2] = ["node-a", "node-b"];
const BRIDGE: &str = "pods";
/// The interface of each node that leads to the other one.
const UPLINK: &str = "uplink";

/// A pod, and the HTTP server in it.
pub(super) struct DemoPod {
    pub(super) name: &'static str,
    pub(super) namespace: Namespace,
    pub(super) identity: SpiffeId,
    address: Ipv4Addr,
    server: Server,
}

impl DemoPod {
    async fn start(
        name: &'static str,
        last_octet: u8,
        node: &Namespace,
    ) -> Result<Self, DemoError> {
        let (namespace, identity) = (create_namespace(name)?, setup::identity(name)?);
        let address = Ipv4Addr::new(10, 79, 0, last_octet);
        connect((&namespace, "eth0", Some(address)), (node, name, None)).await?;
        node.add_bridge_port(BRIDGE, name)
            .await
            .map_err(DemoError::namespace("connect a pod to the bridge"))?;
        let server =
            Server::start(&namespace, HTTP_PORT).map_err(DemoError::io("start an HTTP server"))?;
        Ok(Self { name, namespace, identity, address, server })
    }

    pub(super) fn http_address(&self) -> SocketAddr {
        (self.address, HTTP_PORT).into()
    }

    /// The number of connections that have reached the HTTP server.
    pub(super) fn requests(&self) -> usize {
        self.server.requests()
    }

    /// The content of the pod's file for a node daemon.
    fn file(&self) -> String {
        let Self { name, address, .. } = self;
        let path = self.namespace.path().display();
        format!(
            "uid: {name}\nnetns: {path}\nips: [{address}]\n\
             workload: {{name: {name}, namespace: demo, serviceAccount: {name}}}\n"
        )
    }
}

/// A node: its namespace, its folder of pod files and its daemon.
pub(super) struct DemoNode {
    pub(super) namespace: Namespace,
    name: &'static str,
    pods: PathBuf,
    daemon: ChildProxy,
}

impl DemoNode {
    async fn start(
        name: &'static str,
        namespace: Namespace,
        pods: &[&DemoPod],
        folder: &Path,
    ) -> Result<Self, DemoError> {
        let pod_files = folder.join(name);
        fs::create_dir(&pod_files).map_err(DemoError::io("make a folder"))?;
        let settings = folder.join(format!("{name}.yaml"));
        let text = format!(
            "node: {{name: {name}, pods: {{directory: {}}}}}\n\
             mesh: {{file: mesh.yaml}}\n\
             identity: {{local_ca: .}}\n\
             proxy: {{mtls: strict}}\n",
            pod_files.display()
        );
        fs::write(&settings, text).map_err(DemoError::io("write the settings"))?;
        let arguments = ["--config".into(), settings.into_os_string()];
        let daemon = start_proxy(&namespace, name, "node", &arguments).await?;
        let mut node = Self { namespace, name, pods: pod_files, daemon };
        for pod in pods {
            node.add(pod).await?;
        }
        Ok(node)
    }

    /// Writes the file of a pod, and waits until the daemon serves the pod.
    pub(super) async fn add(&mut self, pod: &DemoPod) -> Result<(), DemoError> {
        // The rename is atomic: the daemon never reads a partial file.
        let (file, unfinished) = (self.file(pod), self.pods.join(".unfinished"));
        fs::write(&unfinished, pod.file())
            .and_then(|()| fs::rename(&unfinished, file))
            .map_err(DemoError::io("write a pod file"))?;
        self.logged(&["pod enrolled", &format!("uid={}", pod.name)]).await
    }

    /// Removes the file of a pod, and waits until the daemon has removed the pod.
    pub(super) async fn remove(&mut self, pod: &DemoPod) -> Result<(), DemoError> {
        fs::remove_file(self.file(pod)).map_err(DemoError::io("remove a pod file"))?;
        self.logged(&["pod removed", &format!("uid={}", pod.name)]).await
    }

    fn file(&self, pod: &DemoPod) -> PathBuf {
        self.pods.join(format!("{}.yaml", pod.name))
    }

    /// Waits for a line of the daemon's log that contains all `parts`.
    async fn logged(&mut self, parts: &[&str]) -> Result<(), DemoError> {
        let matches = |line: &str| parts.iter().all(|part| line.contains(part));
        let found = self.daemon.logged(|log| log.lines().any(matches));
        let found = tokio::time::timeout(STEP_TIMEOUT, found).await.unwrap_or_default();
        if found {
            return Ok(());
        }
        let (line, log) = (parts.join(" … "), self.daemon.log());
        Err(DemoError::Daemon { node: self.name, line, log })
    }
}

/// The nodes, with their daemons and pods.
pub(in crate::demo) struct Stage {
    pub(super) a: DemoNode,
    pub(super) b: DemoNode,
    pub(super) client: DemoPod,
    pub(super) web: DemoPod,
    pub(super) store: DemoPod,
    pub(super) guest: DemoPod,
    pub(super) token: String,
}

impl Stage {
    pub(in crate::demo) async fn set_up() -> Result<Self, DemoError> {
        let [name_a, name_b] = NODES;
        let (a, b) = (create_namespace(name_a)?, create_namespace(name_b)?);
        connect((&a, UPLINK, None), (&b, UPLINK, None)).await?;
        for node in [&a, &b] {
            let failed = DemoError::namespace("make a bridge");
            node.add_bridge(BRIDGE).await.map_err(failed)?;
            let failed = DemoError::namespace("connect the nodes");
            node.add_bridge_port(BRIDGE, UPLINK).await.map_err(failed)?;
        }
        let client = DemoPod::start("client", 1, &a).await?;
        let web = DemoPod::start("web", 2, &a).await?;
        let store = DemoPod::start("store", 3, &b).await?;
        let guest = DemoPod::start("guest", 4, &b).await?;
        let folder = &sandbox_folder().join(FOLDER);
        CertificateAuthority::init(folder, setup::trust_domain()?)
            .map_err(DemoError::Certificates)?;
        fs::write(folder.join("mesh.yaml"), mesh(&[&client, &web, &store, &guest], &client))
            .map_err(DemoError::io("write the mesh file"))?;
        let a = DemoNode::start(name_a, a, &[&client, &web], folder).await?;
        let b = DemoNode::start(name_b, b, &[&store], folder).await?;
        Ok(Self { a, b, client, web, store, guest, token: setup::token() })
    }

    /// Stops the daemons. The namespaces end with the process.
    pub(in crate::demo) async fn take_down(&mut self) {
        for node in [&mut self.a, &mut self.b] {
            setup::stop(&mut node.daemon).await;
        }
    }

    /// Starts a packet capture between the nodes.
    pub(super) fn capture_uplink(&self) -> Result<PacketCapture, DemoError> {
        setup::capture(&self.a.namespace, UPLINK)
    }

    /// Sends one HTTP request from one pod to another.
    pub(super) fn exchange(&self, from: &DemoPod, to: &DemoPod) -> Exchange {
        web::exchange(&from.namespace, to.http_address(), &self.token)
    }

    /// Commands to enter pods and nodes.
    pub(in crate::demo) fn enter_commands(&self, sandbox: Sandbox) -> String {
        let enter = |namespace| enter_command(sandbox, namespace);
        let (client, node) = (enter(&self.client.namespace), enter(&self.a.namespace));
        let store = self.store.http_address();
        let pods = self.a.pods.display();
        format!(
            "\nIt stays until Ctrl-C. Look around from another terminal:\n\
             \x20 {client} curl -s http://{store}/\n\
             \x20 {client} nft list ruleset\n\
             \x20 {node} tcpdump -ni {UPLINK}\n\
             \x20 {node} curl -s http://127.0.0.1:15021/healthz/pods\n\
             \x20 {node} curl -s http://127.0.0.1:{METRICS_PORT}/metrics\n\
             \x20 {node} ls {pods}\n\
             (nsenter, curl, nft and tcpdump are Debian's util-linux, curl, nftables and tcpdump)"
        )
    }
}

/// A mesh of these pods, in which only `allowed` may connect to `store`.
fn mesh(pods: &[&DemoPod], allowed: &DemoPod) -> String {
    let workload = |pod: &&DemoPod| {
        let DemoPod { name, address, .. } = pod;
        let policies = if *name == "store" { "[demo/only-client]" } else { "[]" };
        format!(
            "- {{name: {name}, namespace: demo, serviceAccount: {name}, protocol: HBONE, \
             workloadIps: [{address}], authorizationPolicies: {policies}}}\n"
        )
    };
    let workloads: String = pods.iter().map(workload).collect();
    let principal = allowed.identity.to_string();
    let principal = principal.trim_start_matches("spiffe://");
    format!(
        "workloads:\n{workloads}policies:\n\
         - {{name: only-client, namespace: demo, scope: WorkloadSelector, action: Allow, \
         rules: [[[{{principals: [{{exact: {principal}}}]}}]]]}}\n"
    )
}
