//! End-to-end tests of connections: the accepting side, the client address, the deciding rules and
//! the data.
//!
//! Flows are named as in Istio's ambient scheme: A1 leaves a pod, A2 arrives in plaintext, A3
//! arrives as HBONE, A5 stays in the pod. A6 and A7 are the proxy's own connections to peers and to
//! the application.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod bytes;
mod pacing;
mod refusals;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use underpass_interception::{KUBELET_PROBE_V4, KUBELET_PROBE_V6, PROXY_MARK, TcpSegment};
use underpass_tests::{
    APP, Counters, Dial, Family, HBONE, Mesh, Pod, Scene, Server, Suite, exchange, tool,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both(
        "A1, A3, A7: an application behind the tunnel sees the client's address",
        through_the_tunnel,
    );
    suite.test_both(
        "A2, A7: a plaintext connection to a pod is captured and keeps its source",
        plaintext_inbound,
    );
    suite.test_both(
        "A1, A6: connections to destinations outside of the mesh pass in plaintext",
        unknown_destination,
    );
    suite.test_both("a member without HBONE is reached in plaintext", member_without_hbone);
    suite.test_both("A4: an exempt kubelet probe reaches the application directly", kubelet_probe);
    suite.test_both(
        "a client's connection is captured even if the proxy uses the same address and port",
        preserved_port,
    );
    suite.test_both(
        "A6: connections with the proxy's mark are not captured",
        proxy_mark_is_not_captured,
    );
    suite.test_both("A5: a pod reaches itself without the proxy", own_pod);
    suite.test_both("curl gets its page through the tunnel", curl_through_the_tunnel);
    suite.test_both("curl gets its page in plaintext", curl_in_plain);
    bytes::add_tests(&mut suite);
    pacing::add_tests(&mut suite);
    refusals::add_tests(&mut suite);
    suite.run()
}

/// The deciding rules, each with one connection.
fn one_connection_each(rules: &[String]) -> Vec<(String, u64)> {
    let mut rules: Vec<_> = rules.iter().map(|rule| (rule.clone(), 1)).collect();
    rules.sort();
    rules
}

async fn through_the_tunnel(family: Family) {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let before = (scene.client.counters(), scene.server.counters());
    let to = scene.app(family);
    let mut wire = scene.server.capture();
    let (mut client, mut server, peer) = scene.client.meet(&app, to).await;
    exchange(&mut client, &mut server).await;
    refusals::assert_nothing_in_plain(&wire.drain().expect("the capture is read"));
    assert_eq!(peer.ip(), scene.client.ip(family), "the client that the application sees");
    assert_eq!(canonical_address(server.local_addr().expect("an address")), to);
    assert_eq!(client.peer_addr().expect("an address"), to, "the server that the client sees");
    assert_eq!(
        scene.client.connections_since(&before.0),
        one_connection_each(&[family.rule("capture-outbound")])
    );
    assert_eq!(
        scene.server.connections_since(&before.1),
        one_connection_each(&["hbone-in".to_owned(), family.rule("own-pod")])
    );
    let returned = |pod: &Pod, before: &Counters| {
        pod.counters().get("return-to-proxy") - before.get("return-to-proxy")
    };
    let to_proxy = returned(&scene.server, &before.1);
    assert!(to_proxy > 0, "the application's answer went back to the proxy");
    assert_eq!(returned(&scene.client, &before.0), 0);
}

async fn plaintext_inbound(family: Family) {
    let scene = Scene::new().await;
    let mut proxy = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let before = scene.server.counters();
    let to = scene.app(family);
    let (mut client, mut server, peer) = scene.client.meet(&app, to).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), scene.client.ip(family));
    assert_eq!(canonical_address(server.local_addr().expect("an address")), to);
    assert_eq!(
        scene.server.connections_since(&before),
        one_connection_each(&[family.rule("capture-inbound"), family.rule("own-pod")])
    );
    drop((client, server));
    proxy.line(&["connection complete", "direction=\"inbound\"", &format!("dst.addr={to}")]).await;
}

/// The proxy connects to the application from the client's address and a port that the kernel
/// chooses. The client's kernel may choose the same port.
async fn preserved_port(family: Family) {
    let scene = Scene::new().await;
    let _proxy = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    let to = scene.app(family);
    let (mut first, mut first_server, proxy_source) = scene.client.meet(&app, to).await;
    exchange(&mut first, &mut first_server).await;
    assert_ne!(
        first.local_addr().expect("an address"),
        proxy_source,
        "the port is the proxy's choice"
    );
    let before = scene.server.counters();
    let dial = Dial { source: Some(proxy_source), ..Dial::default() };
    let (second, (mut second_server, _)) =
        tokio::join!(scene.client.dial_as(to, dial), app.accept());
    let mut second = second.expect("the second connection opens");
    exchange(&mut second, &mut second_server).await;
    exchange(&mut first, &mut first_server).await;
    assert_eq!(
        scene.server.connections_since(&before),
        one_connection_each(&[family.rule("capture-inbound"), family.rule("own-pod")])
    );
}

async fn unknown_destination(family: Family) {
    let scene = Scene::new().await;
    let settings =
        scene.client_settings().set(&format!("mesh.file={}", scene.empty_mesh().display()));
    let _proxy = scene.client.proxy(&settings).await;
    let app = scene.server.listen(APP);
    let mut wire = scene.server.capture();
    let before = scene.client.counters();
    let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), scene.client.ip(family));
    assert_eq!(
        scene.client.connections_since(&before),
        one_connection_each(&[family.rule("capture-outbound")])
    );
    let frames = wire.drain().expect("the capture is read");
    let ports: Vec<u16> = frames
        .iter()
        .filter_map(|frame| TcpSegment::parse(frame))
        .map(|s| s.destination.port())
        .collect();
    assert!(ports.contains(&APP) && !ports.contains(&HBONE), "ports on the wire: {ports:?}");
}

async fn member_without_hbone(family: Family) {
    let scene = Scene::new().await;
    let mesh = Mesh::default().hbone(&scene.client).tcp(&scene.server);
    let mesh = mesh.write(&scene.client, "tcp-mesh");
    let settings = scene.client_settings().set(&format!("mesh.file={}", mesh.display()));
    let mut proxy = scene.client.proxy(&settings).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut client, &mut server).await;
    drop((client, server));
    let line = proxy.line(&["connection complete", "dst.workload=\"server\""]).await;
    assert!(!line.contains("hbone"), "{line}");
}

async fn kubelet_probe(family: Family) {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("interception.kubelet_probes=on");
    let mut proxy = scene.server.proxy(&settings).await;
    proxy.line(&["exempt from mTLS and policies", "ports=\"all\""]).await;
    let probe = match family {
        Family::V4 => IpAddr::from(KUBELET_PROBE_V4),
        Family::V6 => IpAddr::from(KUBELET_PROBE_V6),
    };
    tool(&scene.client, "ip", &["address", "add", &probe.to_string(), "dev", "lo"]).await.ok();
    let app = scene.server.listen(APP);
    let before = scene.server.counters();
    let dial = Dial { source: Some(SocketAddr::new(probe, 0)), ..Dial::default() };
    let (client, (mut server, peer)) =
        tokio::join!(scene.client.dial_as(scene.app(family), dial), app.accept());
    let mut client = client.expect("it connects");
    exchange(&mut client, &mut server).await;
    assert_eq!(peer, client.local_addr().expect("an address"), "the connection is direct");
    let matched = scene.server.connections_since(&before);
    assert_eq!(matched, one_connection_each(&[family.rule("kubelet-probe-in")]));
}

async fn proxy_mark_is_not_captured(family: Family) {
    let scene = Scene::new().await;
    let _proxy = scene.client.proxy(&scene.client_settings()).await;
    let app = scene.server.listen(APP);
    let before = scene.client.counters();
    let dial = Dial { mark: Some(PROXY_MARK), ..Dial::default() };
    let (client, (_server, peer)) =
        tokio::join!(scene.client.dial_as(scene.app(family), dial), app.accept());
    let client = client.expect("it connects");
    assert_eq!(peer, client.local_addr().expect("an address"), "the connection is direct");
    assert_eq!(scene.client.connections_since(&before), vec![]);
}

async fn own_pod(family: Family) {
    let (scene, mut client_proxy, _server) = Scene::with_proxies().await;
    let app = scene.client.listen(APP);
    let own = scene.client.ip(family);
    let cases =
        [(family.loopback(), vec![]), (own, one_connection_each(&[family.rule("own-pod")]))];
    // The rules exempt 127.0.0.1. Other addresses of 127.0.0.0/8 are local too.
    let rest =
        [(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), one_connection_each(&["own-pod".to_owned()]))];
    for (ip, rules) in cases.into_iter().chain(rest) {
        let before = scene.client.counters();
        let (mut client, mut server, _) = scene.client.meet(&app, SocketAddr::new(ip, APP)).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(scene.client.connections_since(&before), rules, "{ip}");
    }
    client_proxy.stop().await;
    assert!(
        !client_proxy.log().contains(" access: "),
        "the proxy handled the connection:\n{}",
        client_proxy.log()
    );
}

fn canonical_address(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

async fn curl_through_the_tunnel(family: Family) {
    let (scene, mut client, _server) = Scene::with_proxies().await;
    curl(&scene, family).await;
    client.line(&["connection complete", "dst.hbone_addr="]).await;
}

async fn curl_in_plain(family: Family) {
    let scene = Scene::new().await;
    let settings =
        scene.client_settings().set(&format!("mesh.file={}", scene.empty_mesh().display()));
    let mut client = scene.client.proxy(&settings).await;
    curl(&scene, family).await;
    let line = client.line(&["connection complete"]).await;
    assert!(!line.contains("hbone_addr"), "{line}");
}

async fn curl(scene: &Scene, family: Family) {
    let http = Server::http(&scene.server, APP);
    let to = scene.app(family);
    let url = format!("http://{to}/");
    let page = tool(&scene.client, "curl", &["-sS", "--max-time", "8", &url]).await.ok();
    let peer: SocketAddr = page
        .lines()
        .find_map(|line| line.strip_prefix("peer ")?.parse().ok())
        .expect("the page contains the client's address");
    assert_eq!(peer.ip(), scene.client.ip(family));
    assert!(page.contains(&format!("local {to}\n")), "{page}");
    assert_eq!(http.peers(), [peer]);
}
