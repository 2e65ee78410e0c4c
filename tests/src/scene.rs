//! The usual scene: two pods on one wire, both in the mesh as HBONE, a certificate for each. Proxies start when told.

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use underpass_config::IdentityFiles;

use crate::OrFail;
use crate::mesh::Mesh;
use crate::peers::{exchange, within};
use crate::pki::Pki;
use crate::pods::{Family, Pod, World};
use crate::proxy::Proxy;
use crate::settings::Settings;

/// Where applications listen.
pub const APP: u16 = 8080;
/// Where proxies listen for tunnels.
pub const HBONE: u16 = 15008;
/// The name of the pod that connects.
pub const CLIENT: &str = "client";
/// The name of the pod that is connected to.
pub const SERVER: &str = "server";

/// Two pods, their certificates and the mesh file that has both.
#[derive(Debug)]
pub struct Scene {
    /// The pod that connects.
    pub client: Pod,
    /// The pod that is connected to.
    pub server: Pod,
    /// Whom both trust.
    pub pki: Pki,
    /// The mesh file.
    pub mesh: PathBuf,
    /// The client's certificate.
    pub client_files: IdentityFiles,
    /// The server's certificate.
    pub server_files: IdentityFiles,
    /// Where more pods come from.
    pub world: World,
}

impl Scene {
    /// The scene without proxies.
    pub async fn new() -> Self {
        let mut world = World::new();
        let (mut client, mut server) = (world.pod(CLIENT).await, world.pod(SERVER).await);
        world.wire(&mut client, &mut server).await;
        let pki = Pki::new(world.folder());
        let mesh = Mesh::default().hbone(&client).hbone(&server).write(&client, "mesh");
        let (client_files, server_files) = (pki.issue(CLIENT), pki.issue(SERVER));
        Self { client, server, pki, mesh, client_files, server_files, world }
    }

    /// The scene with a proxy in each pod: client's, server's.
    pub async fn with_proxies() -> (Self, Proxy, Proxy) {
        let scene = Self::new().await;
        let (client, server) = (scene.client_settings(), scene.server_settings());
        let (client, server) =
            tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
        (scene, client, server)
    }

    /// The scene with a proxy in the client's pod alone, which passes everything through in plain, and has these settings besides.
    pub async fn with_plain_client(settings: &[&str]) -> (Self, Proxy) {
        let scene = Self::new().await;
        let mesh = format!("mesh.file={}", scene.empty_mesh().display());
        let all = settings.iter().fold(scene.client_settings().set(&mesh), |all, one| all.set(one));
        let proxy = scene.client.proxy(&all).await;
        (scene, proxy)
    }

    /// A connection between the pods' applications over which bytes have gone both ways.
    pub async fn connected(&self, family: Family) -> (TcpStream, TcpStream) {
        let app = self.server.listen(APP);
        let (mut client, mut server, _) = self.client.meet(&app, self.app(family)).await;
        exchange(&mut client, &mut server).await;
        (client, server)
    }

    /// What the client's proxy is told: certificate and mesh.
    #[must_use]
    pub fn client_settings(&self) -> Settings {
        Settings::new(CLIENT).identity(&self.client_files).mesh(&self.mesh)
    }

    /// What the server's proxy is told: certificate and mesh.
    #[must_use]
    pub fn server_settings(&self) -> Settings {
        Settings::new(SERVER).identity(&self.server_files).mesh(&self.mesh)
    }

    /// Replaces the mesh file.
    pub fn set_mesh(&self, mesh: &Mesh) {
        let file = mesh.write(&self.client, "mesh");
        assert_eq!(file, self.mesh, "it is the scene's");
    }

    /// One connection to an echo in the server's pod: bytes there, FIN, all of them back, FIN.
    pub async fn echoed(&self) {
        self.echoed_at(self.app(Family::V4)).await;
    }

    /// The same with an echo that is reached at `to`.
    pub async fn echoed_at(&self, to: SocketAddr) {
        let sent = b"there and back".repeat(100);
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

    /// The mesh file of a mesh without members: everything is passed through in plain.
    #[must_use]
    pub fn empty_mesh(&self) -> PathBuf {
        Mesh::default().write(&self.client, "empty-mesh")
    }

    /// Where the server's application listens.
    #[must_use]
    pub fn app(&self, family: Family) -> SocketAddr {
        self.server.at(family, APP)
    }
}
