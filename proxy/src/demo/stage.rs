//! Sets up the demonstration: three pods, certificates, settings and two proxies.
//!
//! ```text
//! stranger 10.78.0.1 ── 10.78.0.2 server 10.77.0.2 ── 10.77.0.1 client
//! no proxy                        a proxy                       a proxy
//! ```

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use underpass_config::{IdentityFiles, SpiffeError, SpiffeId, TrustDomain};
use underpass_hbone::{CertificateAuthority, Credentials, Identity, Trust};
use underpass_interception::{
    Endpoint, IpNet, Namespace, PacketCapture, Sandbox, sandbox_folder, veth,
};

use super::web::Server;
use super::{DemoError, STEP_TIMEOUT};
use crate::spawn::ChildProxy;

pub(super) const HTTP_PORT: u16 = 8080;
pub(super) const HBONE_PORT: u16 = 15008;
pub(super) const METRICS_PORT: u16 = 15020;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const SERVER_FOR_STRANGER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

/// A folder in the sandbox's temporary file system.
const FOLDER: &str = "underpass-demo";

/// The pods, with their proxies and the HTTP server.
pub(super) struct Stage {
    pub(super) client: Namespace,
    pub(super) server: Namespace,
    pub(super) stranger: Namespace,
    proxies: Vec<ChildProxy>,
    web: Server,
    identities: (SpiffeId, SpiffeId),
    client_credentials: Credentials,
    token: String,
}

impl Stage {
    pub(super) async fn set_up() -> Result<Self, DemoError> {
        let pod = |name| {
            Namespace::create_named(name)
                .map_err(|source| DemoError::Namespace { doing: "make a pod", source })
        };
        let (client, server, stranger) = (pod("client")?, pod("server")?, pod("stranger")?);
        wire((&client, "eth0", CLIENT), (&server, "eth0", SERVER)).await?;
        wire((&stranger, "eth0", STRANGER), (&server, "eth1", SERVER_FOR_STRANGER)).await?;
        let folder = &sandbox_folder().join(FOLDER);
        let identities = write_files(folder)?;
        let io = |doing| move |source| DemoError::Io { doing, source };
        let web = Server::start(&server, HTTP_PORT).map_err(io("start the HTTP server"))?;
        let proxies = vec![
            start_proxy(&client, "client", folder).await?,
            start_proxy(&server, "server", folder).await?,
        ];
        let client_credentials = read_credentials(folder, "client")?;
        let token = token();
        Ok(Self { client, server, stranger, proxies, web, identities, token, client_credentials })
    }

    /// Stops the proxies; the namespaces end with the process.
    pub(super) async fn take_down(&mut self) {
        for proxy in &mut self.proxies {
            // On timeout, dropping the proxy kills it.
            tokio::time::timeout(STEP_TIMEOUT, proxy.stop()).await.ok();
        }
    }

    /// Starts a packet capture between client and server.
    pub(super) fn capture(&self) -> Result<PacketCapture, DemoError> {
        let failed = |source| DemoError::Namespace { doing: "enter pod client", source };
        let capture = self.client.run(|| PacketCapture::open("eth0")).map_err(failed)?;
        capture.map_err(|source| DemoError::Io { doing: "capture the wire", source })
    }

    pub(super) fn client_ip(&self) -> IpAddr {
        CLIENT.into()
    }

    pub(super) fn server_address(&self, port: u16) -> SocketAddr {
        (SERVER, port).into()
    }

    pub(super) fn server_address_for_stranger(&self, port: u16) -> SocketAddr {
        (SERVER_FOR_STRANGER, port).into()
    }

    /// The identities that the proxies must have authenticated: source, destination.
    pub(super) fn identities(&self) -> &(SpiffeId, SpiffeId) {
        &self.identities
    }

    /// A unique token in the request.
    pub(super) fn token(&self) -> &str {
        &self.token
    }

    /// How many connections have reached the HTTP server.
    pub(super) fn requests(&self) -> usize {
        self.web.requests()
    }

    /// The identity and the trust bundle of the client pod.
    pub(super) fn client_credentials(&self) -> &Credentials {
        &self.client_credentials
    }

    /// Commands to enter the pods.
    pub(super) fn enter_commands(&self, sandbox: Sandbox) -> String {
        // A process cannot enter the user namespace that it is in already.
        let user = match sandbox {
            Sandbox::OfRoot => "",
            Sandbox::InUserNamespace => " -U --preserve-credentials",
        };
        // The namespaces' paths exist only in the sandbox's mount namespace, so enter that one
        // first.
        let enter = format!("nsenter -t {}{user} -m nsenter", std::process::id());
        let [client, server] = [&self.client, &self.server]
            .map(|pod| format!("{enter} --net={}", pod.path().display()));
        format!(
            "\nIt stays until Ctrl-C. Look around from another terminal:\n\
             \x20 {client} curl -s http://{SERVER}:{HTTP_PORT}/\n\
             \x20 {client} nft list ruleset\n\
             \x20 {server} tcpdump -ni eth0\n\
             \x20 {server} curl -s http://127.0.0.1:{METRICS_PORT}/metrics\n\
             (nsenter, curl, nft and tcpdump are Debian's util-linux, curl, nftables and tcpdump)"
        )
    }
}

async fn wire(
    a: (&Namespace, &str, Ipv4Addr),
    b: (&Namespace, &str, Ipv4Addr),
) -> Result<(), DemoError> {
    let addresses = [a.2, b.2].map(|address| [IpNet::new_assert(IpAddr::V4(address), 24)]);
    let [for_a, for_b] = &addresses;
    let end = |(namespace, interface, _), addresses| Endpoint {
        namespace,
        interface,
        addresses,
        default_route: false,
    };
    veth(&end(a, for_a), &end(b, for_b))
        .await
        .map_err(|source| DemoError::Namespace { doing: "connect the pods", source })
}

/// Certificates, the mesh file and the settings of both pods.
fn write_files(folder: &Path) -> Result<(SpiffeId, SpiffeId), DemoError> {
    let failed = |source| DemoError::Io { doing: "write the settings", source };
    let ca =
        CertificateAuthority::init(folder, trust_domain()?).map_err(DemoError::Certificates)?;
    let issue = |pod: &str| -> Result<SpiffeId, DemoError> {
        let id = SpiffeId::istio(trust_domain()?, "demo", pod)
            .map_err(|error| failed(io::Error::other(error)))?;
        let issued = ca.issue(&id, Duration::from_secs(3600)).map_err(DemoError::Certificates)?;
        issued.write(&folder.join(pod)).map_err(DemoError::Certificates)?;
        fs::write(settings_of(folder, pod), settings(pod)).map_err(failed)?;
        Ok(id)
    };
    let identities = (issue("client")?, issue("server")?);
    fs::write(folder.join("mesh.yaml"), mesh()).map_err(failed)?;
    Ok(identities)
}

fn read_credentials(folder: &Path, pod: &str) -> Result<Credentials, DemoError> {
    let files = IdentityFiles {
        certificate: folder.join(format!("{pod}.pem")),
        key: folder.join(format!("{pod}.key")),
        roots: folder.join("roots.pem"),
    };
    let identity = Identity::from_files(&files).map_err(DemoError::Certificates)?;
    Credentials::new(identity, Trust::default()).map_err(DemoError::Certificates)
}

fn trust_domain() -> Result<TrustDomain, DemoError> {
    "cluster.local".parse().map_err(|error: SpiffeError| DemoError::Io {
        doing: "name the trust domain",
        source: io::Error::other(error),
    })
}

fn settings_of(folder: &Path, pod: &str) -> PathBuf {
    folder.join(format!("{pod}.yaml"))
}

fn settings(pod: &str) -> String {
    format!(
        "workload: {{name: {pod}, namespace: demo, serviceAccount: {pod}}}\n\
         mesh: {{file: mesh.yaml}}\n\
         identity: {{certificate: {pod}.pem, key: {pod}.key, roots: roots.pem}}\n"
    )
}

fn mesh() -> String {
    let workload = |name: &str, addresses: &[Ipv4Addr]| {
        format!(
            "- {{name: {name}, namespace: demo, serviceAccount: {name}, protocol: HBONE, workloadIps: {addresses:?}}}\n"
        )
    };
    format!(
        "workloads:\n{}{}",
        workload("client", &[CLIENT]),
        workload("server", &[SERVER, SERVER_FOR_STRANGER])
    )
}

async fn start_proxy(
    namespace: &Namespace,
    pod: &'static str,
    folder: &Path,
) -> Result<ChildProxy, DemoError> {
    let program = std::env::current_exe()
        .map_err(|source| DemoError::Io { doing: "find this program", source })?;
    let arguments = ["--config".into(), settings_of(folder, pod).into_os_string()];
    ChildProxy::start(&program, namespace, "run", &arguments, STEP_TIMEOUT)
        .await
        .map_err(|source| DemoError::Proxy { pod, source })
}

/// Unique, not secret; a minimal image has no /dev/urandom.
fn token() -> String {
    format!("{:032x}", fastrand::u128(..))
}
