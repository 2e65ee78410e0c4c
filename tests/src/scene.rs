//! The usual scene: two connected pods in the mesh, with HBONE and a certificate each.

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use underpass_config::IdentityFiles;

use crate::mesh::Mesh;
use crate::or_fail::OrFail;
use crate::peers::{exchange, within};
use crate::pki::Pki;
use crate::pods::{Family, Pod, World};
use crate::proxy::Proxy;
use crate::settings::Settings;

/// The port of applications.
pub const APP: u16 = 8080;
/// The port for tunnels.
pub const HBONE: u16 = 15008;
/// The name of the client's pod.
pub const CLIENT: &str = "client";
/// The name of the server's pod.
pub const SERVER: &str = "server";

/// Two pods, their certificates and their mesh file.
#[derive(Debug)]
pub struct Scene {
    /// The client's pod.
    pub client: Pod,
    /// The server's pod.
    pub server: Pod,
    /// The certificate authority of both.
    pub pki: Pki,
    /// The mesh file.
    pub mesh: PathBuf,
    /// The client's certificate.
    pub client_files: IdentityFiles,
    /// The server's certificate.
    pub server_files: IdentityFiles,
    /// Creates additional pods.
    pub world: World,
}

impl Scene {
    /// Sets up the scene without proxies.
    pub async fn new() -> Self {
        let mut world = World::new();
        let (mut client, mut server) = (world.pod(CLIENT).await, world.pod(SERVER).await);
        world.wire(&mut client, &mut server).await;
        let pki = Pki::new(world.folder());
        let mesh = Mesh::default().hbone(&client).hbone(&server).write(&client, "mesh");
        let (client_files, server_files) = (pki.issue(CLIENT), pki.issue(SERVER));
        Self { client, server, pki, mesh, client_files, server_files, world }
    }

    /// Sets up the scene with a proxy in each pod. Returns the client's and the server's proxy.
    pub async fn with_proxies() -> (Self, Proxy, Proxy) {
        let scene = Self::new().await;
        let (client, server) = (scene.client_settings(), scene.server_settings());
        let (client, server) =
            tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
        (scene, client, server)
    }

    /// Sets up the scene with a proxy only in the client's pod. It has an empty mesh and additional
    /// settings.
    pub async fn with_plain_client(settings: &[&str]) -> (Self, Proxy) {
        let scene = Self::new().await;
        let mesh = format!("mesh.file={}", scene.empty_mesh().display());
        let all = settings.iter().fold(scene.client_settings().set(&mesh), |all, one| all.set(one));
        let proxy = scene.client.proxy(&all).await;
        (scene, proxy)
    }

    /// A connection between the applications, after an exchange of bytes.
    pub async fn connected(&self, family: Family) -> (TcpStream, TcpStream) {
        let app = self.server.listen(APP);
        let (mut client, mut server, _) = self.client.meet(&app, self.app(family)).await;
        exchange(&mut client, &mut server).await;
        (client, server)
    }

    /// The settings of the client's proxy: certificate and mesh.
    #[must_use]
    pub fn client_settings(&self) -> Settings {
        Settings::new(CLIENT).identity(&self.client_files).mesh(&self.mesh)
    }

    /// The settings of the server's proxy: certificate and mesh.
    #[must_use]
    pub fn server_settings(&self) -> Settings {
        Settings::new(SERVER).identity(&self.server_files).mesh(&self.mesh)
    }

    /// Replaces the mesh file.
    pub fn set_mesh(&self, mesh: &Mesh) {
        let file = mesh.write(&self.client, "mesh");
        assert_eq!(file, self.mesh, "the file belongs to the scene");
    }

    /// Exchanges bytes and FIN with an echo server in the server's pod.
    pub async fn echoed(&self) {
        self.echoed_at(self.app(Family::V4)).await;
    }

    /// Exchanges bytes and FIN with an echo server at `to`.
    pub async fn echoed_at(&self, to: SocketAddr) {
        let sent = b"request and echo".repeat(100);
        let connected = self.client.dial(to).await;
        let mut stream = connected.or_fail("connect to the echo");
        let (mut reader, mut writer) = stream.split();
        let mut received = Vec::new();
        let exchange = async {
            writer.write_all(&sent).await?;
            writer.shutdown().await?;
            reader.read_to_end(&mut received).await
        };
        within("an echo", exchange).await.or_fail("get an echo");
        assert!(received == sent, "{} of {} bytes came back", received.len(), sent.len());
    }

    /// Writes a mesh file without members. The proxy then passes all connections through in
    /// plaintext.
    #[must_use]
    pub fn empty_mesh(&self) -> PathBuf {
        Mesh::default().write(&self.client, "empty-mesh")
    }

    /// The address of the server's application.
    #[must_use]
    pub fn app(&self, family: Family) -> SocketAddr {
        self.server.at(family, APP)
    }
}
