//! Tests of intermediate proxies: waypoints, and the gateway of another network.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, copy_bidirectional};
use tokio::net::TcpStream;
use underpass_interception::PROXY_MARK;
use underpass_tests::{
    APP, Dial, Family, HBONE, Mesh, SERVER, Scene, Server, Suite, exchange, within,
};

use crate::{proxies, with_server};

/// The waypoint's port for the content of tunnels.
const TUNNEL_PORT: u16 = 15088;
const WAYPOINT: &str = ", applicationTunnel: {protocol: PROXY, port: 15088}";

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both(
        "a service's waypoint receives client and destination in a PROXY header",
        service_waypoint,
    );
    suite.test(
        "a workload's waypoint that is named by its hostname receives a PROXY header",
        workload_waypoint,
    );
    suite.test(
        "a pod in another network is reached through its gateway by a nested tunnel",
        other_network,
    );
}

/// The content of a PROXY protocol header, version 2.
#[derive(Debug, PartialEq, Eq)]
struct ProxyHeader {
    source: SocketAddr,
    destination: SocketAddr,
    identity: String,
}

impl ProxyHeader {
    async fn read(stream: &mut TcpStream) -> Self {
        let mut fixed = [0; 16];
        within("a PROXY header", stream.read_exact(&mut fixed)).await.expect("16 bytes");
        let [signature @ .., command, family, high, low] = fixed;
        assert_eq!(&signature, b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(command, 0x21, "version 2, PROXY");
        let mut rest = vec![0; usize::from(u16::from_be_bytes([high, low]))];
        within("a PROXY header", stream.read_exact(&mut rest)).await.expect("the announced length");
        let width = match family {
            0x11 => 4,
            0x21 => 16,
            other => panic!("family {other:#x}"),
        };
        let ip = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
            Ok(v4) => v4.into(),
            Err(_) => <[u8; 16]>::try_from(bytes).expect("an address").into(),
        };
        let port = |bytes: &[u8]| u16::from_be_bytes(bytes.try_into().expect("two bytes"));
        let (addresses, tlv) = rest.split_at(2 * width + 4);
        let (ips, ports) = addresses.split_at(2 * width);
        let ((source, destination), (from, to)) = (ips.split_at(width), ports.split_at(2));
        let (kind, tlv) = tlv.split_first().expect("a TLV");
        assert_eq!(*kind, 0xd0);
        let (length, value) = tlv.split_at(2);
        assert_eq!(usize::from(port(length)), value.len(), "there is a single TLV");
        Self {
            source: SocketAddr::new(ip(source), port(from)),
            destination: SocketAddr::new(ip(destination), port(to)),
            identity: String::from_utf8(value.to_vec()).expect("text"),
        }
    }
}

async fn service_waypoint(family: Family) {
    let mesh = |scene: &Scene| {
        let waypoint = scene.server.ip(Family::V4);
        with_server(scene, WAYPOINT).service(&format!(
            "name: web, hostname: web.example, vips: [\"/10.96.0.1\", \"/fd96::1\"], ports: {{80: 8080}}, \
             waypoint: {{destination: \"/{waypoint}\", hboneMtlsPort: {HBONE}}}"
        ))
    };
    let (scene, _client, _server) = proxies(mesh).await;
    let waypoint = scene.server.listen(TUNNEL_PORT);
    let vip = match family {
        Family::V4 => "10.96.0.1:80",
        Family::V6 => "[fd96::1]:80",
    };
    let vip = vip.parse().expect("an address");
    let (mut client, mut server, peer) = scene.client.meet(&waypoint, vip).await;
    assert!(peer.ip().is_loopback(), "the waypoint receives it from loopback: {peer}");
    let header = ProxyHeader::read(&mut server).await;
    assert_eq!(header.destination.port(), 80);
    assert_eq!(header.destination.ip().to_canonical(), vip.ip());
    assert_eq!(header.source.ip().to_canonical(), scene.client.ip(Family::V4));
    assert_eq!(header.identity, "spiffe://cluster.local/ns/default/sa/client");
    exchange(&mut client, &mut server).await;
}

async fn workload_waypoint() {
    let mesh = |scene: &Scene| {
        with_server(scene, ", applicationTunnel: {protocol: PROXY, port: 15088}, services: {default/way.example: {15008: 15008}}")
            .service("name: way, hostname: way.example, vips: [], ports: {15008: 15008}")
            .workload_with(
                "behind",
                &["10.99.0.1".parse().expect("an address")],
                "HBONE",
                &format!(", waypoint: {{destination: default/way.example, hboneMtlsPort: {HBONE}}}"),
            )
    };
    let (scene, mut proxy, _server) = proxies(mesh).await;
    let waypoint = scene.server.listen(TUNNEL_PORT);
    let to = "10.99.0.1:9090".parse().expect("an address");
    let (mut client, mut server, _) = scene.client.meet(&waypoint, to).await;
    assert_eq!(ProxyHeader::read(&mut server).await.destination, to);
    exchange(&mut client, &mut server).await;
    drop((client, server));
    proxy.line(&["direction=\"outbound\"", "dst.hbone_addr=10.99.0.1:9090"]).await;
}

/// Builds a gateway from a proxy with an application tunnel and a program that forwards the bytes
/// to the server's proxy. The bytes are TLS records from end to end.
async fn other_network() {
    let mut scene = Scene::new().await;
    let mut gateway = scene.world.pod("gateway").await;
    let Scene { world, client, server, .. } = &mut scene;
    world.wire(client, &mut gateway).await;
    let at_client = gateway.ip(Family::V4);
    world.wire(&mut gateway, server).await;
    let behind = SocketAddr::new("10.3.0.2".parse().expect("an address"), HBONE);

    let service = "name: far, hostname: far.example, vips: [\"/10.96.0.7\"], ports: {80: 8080}, \
                   subjectAltNames: [\"spiffe://cluster.local/ns/default/sa/server\"]";
    let endpoint = ", services: {default/far.example: {80: 8080}}";
    let away = format!(
        "{endpoint}, network: far, networkGateway: {{destination: \"/{at_client}\", hboneMtlsPort: {HBONE}}}"
    );
    let client_mesh = Mesh::default()
        .hbone(&scene.client)
        .workload("gateway", &[at_client], "HBONE")
        .workload_with(SERVER, &["10.9.9.9".parse().expect("an address")], "HBONE", &away)
        .service(service);
    let gateway_mesh = Mesh::default()
        .workload_with("gateway", &gateway.ips(), "HBONE", &format!("{endpoint}{WAYPOINT}"))
        .service(service);
    // The connection comes from the gateway's address, with the client's identity.
    let gateway_at_server: IpAddr = "10.3.0.1".parse().expect("an address");
    let at_server = Mesh::default()
        .workload_with(SERVER, &[behind.ip()], "HBONE", endpoint)
        .workload("gateway", &[gateway_at_server], "HBONE")
        .service(service);
    scene.set_mesh(&client_mesh);
    let gateway_settings = underpass_tests::Settings::new("gateway")
        .identity(&scene.pki.issue("gateway"))
        .mesh(&gateway_mesh.write(&scene.client, "gateway-mesh"));
    let server_settings = underpass_tests::Settings::new(SERVER)
        .identity(&scene.server_files)
        .mesh(&at_server.write(&scene.client, "at-server"));
    let (mut proxy, _at_gateway, mut at_server) = tokio::join!(
        async { scene.client.proxy(&scene.client_settings()).await },
        async { gateway.proxy(&gateway_settings).await },
        async { scene.server.proxy(&server_settings).await }
    );
    let gateway = Arc::new(gateway);
    let inner = gateway.clone();
    let _relay = Server::start(&gateway, TUNNEL_PORT, move |mut stream, _| {
        let inner = inner.clone();
        async move {
            ProxyHeader::read(&mut stream).await;
            // The proxy's mark exempts the connection from capture.
            let dial = Dial { mark: Some(PROXY_MARK), ..Dial::default() };
            let mut onward = inner.dial_as(behind, dial).await?;
            copy_bidirectional(&mut stream, &mut onward).await.map(drop)
        }
    });
    let _app = Server::echo(&scene.server, APP);
    scene.echoed_at("10.96.0.7:80".parse().expect("an address")).await;
    proxy
        .line(&["direction=\"outbound\"", "dst.service=\"far.example\"", "connection complete"])
        .await;
    let line = at_server
        .line(&[
            "direction=\"inbound\"",
            &format!("src.addr={gateway_at_server}:"),
            "src.identity=\"spiffe://cluster.local/ns/default/sa/client\"",
            "src.claimed.workload=\"client\"",
            "connection complete",
        ])
        .await;
    assert!(!line.contains(" src.workload="), "{line}");
}
