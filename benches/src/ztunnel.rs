//! Runs a ztunnel for comparison, if the user provides the binary.
//!
//! Each pod has the rules of the ambient profile and a separate ztunnel: in shared mode in another
//! namespace (`zds.rs`), in dedicated mode within the pod. A local file replaces the control plane,
//! and `underpass ca serve` beside ztunnel issues the certificate. All other settings are defaults.

use std::fs::{self, File, Permissions};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use underpass_tests::{Mesh, Pki, Pod, Settings, World, http_get};

use crate::options::{Options, ZtunnelMode};
use crate::zds;

/// The timeout for readiness.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(20);
const CA: u16 = 15012;
const READINESS: u16 = 15021;

/// The ztunnel of a pod. Dropping it ends the process.
#[derive(Debug)]
pub(crate) struct Ztunnel {
    ca: Child,
    proxy: Child,
    log: PathBuf,
    /// The namespace of a shared ztunnel.
    node: Option<Pod>,
}

/// Starts a ztunnel for each pod, in a mesh with `protocol`.
pub(crate) async fn pair(
    world: &World,
    pods: [&Pod; 2],
    protocol: &str,
    options: &Options,
) -> Vec<Ztunnel> {
    let pki = Pki::new(world.folder());
    let member = |mesh: Mesh, pod: &Pod| {
        // ztunnel requires every key.
        let more = format!(
            ", uid: bench//Pod/default/{}, namespace: default, trustDomain: cluster.local, node: local, network: \"\", services: {{}}",
            pod.name()
        );
        mesh.workload_with(pod.name(), &pod.ips(), protocol, &more)
    };
    let mesh = pods.into_iter().fold(Mesh::default(), member);
    let mut pair = Vec::new();
    for pod in pods {
        let node = match options.ztunnel_mode {
            ZtunnelMode::Shared => Some(world.pod(&format!("{}-node", pod.name())).await),
            ZtunnelMode::Dedicated => None,
        };
        let mesh = mesh.write(pod, "mesh");
        pair.push(Ztunnel::start(pod, node, &pki, &mesh, options).await);
    }
    pair
}

impl Ztunnel {
    async fn start(
        pod: &Pod,
        node: Option<Pod>,
        pki: &Pki,
        mesh: &Path,
        options: &Options,
    ) -> Self {
        let home = node.as_ref().unwrap_or(pod);
        let settings = Settings::new(pod.name()).set("interception.profile=ambient");
        pod.rules("install", &settings).await.ok();
        let (token, clients) = clients(pod);
        let mut authority = Command::new(underpass_tests::binary());
        authority.args(["ca", "serve", "--listen", &format!("127.0.0.1:{CA}")]);
        authority.args(["--name", "localhost", "--log", "warn"]);
        authority.arg("--dir").arg(pki.dir()).arg("--clients").arg(clients);
        let ca = start(home, &mut authority, "ca");
        wait_for_port(home, CA).await;
        let program = options.ztunnel.as_ref().expect("a ztunnel path requires --ztunnel");
        let mut command = Command::new(program);
        command
            .env("NODE_NAME", "local")
            .env("CLUSTER_ID", "Kubernetes")
            .env("ENABLE_ORIG_SRC", "true")
            .env("IPV6_ENABLED", "false")
            .env("XDS_ADDRESS", "")
            .env("LOCAL_XDS_PATH", mesh)
            .env("CA_ADDRESS", format!("https://localhost:{CA}"))
            .env("CA_ROOT_CA", pki.roots())
            .env("AUTH_TOKEN", token)
            .env("RUST_LOG", options.log_filter());
        set_mode(&mut command, pod, options.ztunnel_mode);
        let proxy = start(home, &mut command, "ztunnel");
        let log = log(home, "ztunnel");
        let ztunnel = Self { ca, proxy, log, node };
        ztunnel.wait_until_ready(pod).await;
        ztunnel
    }

    /// Waits until the ztunnel is ready to serve `pod`.
    async fn wait_until_ready(&self, pod: &Pod) {
        let home = self.node.as_ref().unwrap_or(pod);
        wait_for_port(home, READINESS).await;
        let readiness = (Ipv4Addr::LOCALHOST, READINESS).into();
        let began = Instant::now();
        while http_get(home, readiness, "/healthz/ready").await.0 != 200 {
            assert!(
                began.elapsed() < OPERATION_TIMEOUT,
                "ztunnel is not ready in time; the log:\n{}",
                self.log()
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.proxy.id()
    }

    /// The log.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Ztunnel {
    fn drop(&mut self) {
        for child in [&mut self.proxy, &mut self.ca] {
            // The process may have ended already.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// Configures the pod that ztunnel serves.
fn set_mode(command: &mut Command, pod: &Pod, mode: ZtunnelMode) {
    match mode {
        ZtunnelMode::Shared => {
            let socket = pod.folder().join(format!("{}.zds", pod.name()));
            zds::announce(&socket, pod).expect("the world's folder can be written");
            command.env("PROXY_MODE", "shared").env("INPOD_UDS", socket);
        }
        ZtunnelMode::Dedicated => {
            command
                .env("PROXY_MODE", "dedicated")
                .env("PROXY_WORKLOAD_INFO", format!("default/{0}/{0}", pod.name()))
                .env("PACKET_MARK", underpass_interception::PROXY_MARK.to_string());
        }
    }
}

/// Writes the token of the pod's ztunnel, and the CA's file with its identity. Returns both paths.
fn clients(pod: &Pod) -> (PathBuf, PathBuf) {
    let file = |kind: &str, text: &str| {
        let file = pod.folder().join(format!("{}.{kind}", pod.name()));
        fs::write(&file, text).expect("the world's folder can be written");
        fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("it is ours");
        file
    };
    let name = pod.name();
    let identity = format!("spiffe://cluster.local/ns/default/sa/{name}");
    let clients = format!("clients:\n- {{token: token-{name}, identities: [\"{identity}\"]}}\n");
    (file("token", &format!("token-{name}")), file("clients", &clients))
}

/// Starts a program in the pod, with its output in a file.
fn start(pod: &Pod, command: &mut Command, name: &str) -> Child {
    let output = File::create(log(pod, name)).expect("the world's folder can be written");
    let errors = output.try_clone().expect("a descriptor more");
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    pod.run(|| command.spawn()).expect("the program is there and may be run: is its path absolute?")
}

fn log(pod: &Pod, name: &str) -> PathBuf {
    pod.folder().join(format!("{name}-{}.log", pod.name()))
}

/// Waits until a port of the pod's loopback accepts connections.
async fn wait_for_port(pod: &Pod, port: u16) {
    let began = Instant::now();
    while pod.dial((Ipv4Addr::LOCALHOST, port).into()).await.is_err() {
        assert!(
            began.elapsed() < OPERATION_TIMEOUT,
            "port {port} of pod {} is not open in time",
            pod.name()
        );
        sleep(Duration::from_millis(20)).await;
    }
}
