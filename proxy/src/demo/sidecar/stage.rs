//! Sets up the demonstration: three pods, certificates, settings and two proxies.
//!
//! ```text
//! stranger 10.78.0.1 ── 10.78.0.2 server 10.77.0.2 ── 10.77.0.1 client
//! no proxy                        a proxy                       a proxy
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use underpass_config::{IdentityFiles, SpiffeId};
use underpass_hbone::{CertificateAuthority, Credentials, Identity, Trust};
use underpass_interception::{Namespace, PacketCapture, Sandbox, sandbox_folder};

use crate::demo::setup::{
    self, FOLDER, HTTP_PORT, METRICS_PORT, connect, create_namespace, enter_command, start_proxy,
};
use crate::demo::{DemoError, web::Server};
use crate::spawn::ChildProxy;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const SERVER_FOR_STRANGER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

/// The pods, with their proxies and the HTTP server.
pub(in crate::demo) struct Stage {
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
    pub(in crate::demo) async fn set_up() -> Result<Self, DemoError> {
        let client = create_namespace("client")?;
        let server = create_namespace("server")?;
        let stranger = create_namespace("stranger")?;
        connect((&client, "eth0", Some(CLIENT)), (&server, "eth0", Some(SERVER))).await?;
        let (there, here) = (Some(STRANGER), Some(SERVER_FOR_STRANGER));
        connect((&stranger, "eth0", there), (&server, "eth1", here)).await?;
        let folder = &sandbox_folder().join(FOLDER);
        let identities = write_files(folder)?;
        let web =
            Server::start(&server, HTTP_PORT).map_err(DemoError::io("start the HTTP server"))?;
        let proxies =
            vec![start(&client, "client", folder).await?, start(&server, "server", folder).await?];
        let client_credentials = read_credentials(folder, "client")?;
        let token = setup::token();
        Ok(Self { client, server, stranger, proxies, web, identities, token, client_credentials })
    }

    /// Stops the proxies. The namespaces end with the process.
    pub(in crate::demo) async fn take_down(&mut self) {
        for proxy in &mut self.proxies {
            setup::stop(proxy).await;
        }
    }

    /// Starts a packet capture between client and server.
    pub(super) fn capture(&self) -> Result<PacketCapture, DemoError> {
        setup::capture(&self.client, "eth0")
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

    /// The identities that the proxies must have authenticated: source and destination.
    pub(super) fn identities(&self) -> &(SpiffeId, SpiffeId) {
        &self.identities
    }

    /// The unique token in the request.
    pub(super) fn token(&self) -> &str {
        &self.token
    }

    /// The number of connections that have reached the HTTP server.
    pub(super) fn requests(&self) -> usize {
        self.web.requests()
    }

    /// The identity and the trust bundle of the client pod.
    pub(super) fn client_credentials(&self) -> &Credentials {
        &self.client_credentials
    }

    /// The commands to enter the pods.
    pub(in crate::demo) fn enter_commands(&self, sandbox: Sandbox) -> String {
        let [client, server] = [&self.client, &self.server].map(|pod| enter_command(sandbox, pod));
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

/// Writes certificates, the mesh file and the settings of both pods. Returns the identities of
/// client and server.
fn write_files(folder: &Path) -> Result<(SpiffeId, SpiffeId), DemoError> {
    let failed = |source| DemoError::Io { doing: "write the settings", source };
    let ca = CertificateAuthority::init(folder, setup::trust_domain()?)
        .map_err(DemoError::Certificates)?;
    let issue = |pod: &str| -> Result<SpiffeId, DemoError> {
        let id = setup::identity(pod)?;
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

async fn start(
    namespace: &Namespace,
    pod: &'static str,
    folder: &Path,
) -> Result<ChildProxy, DemoError> {
    let arguments = ["--config".into(), settings_of(folder, pod).into_os_string()];
    start_proxy(namespace, pod, "run", &arguments).await
}
