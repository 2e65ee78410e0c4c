//! Tests of `limits.connections_per_source`: by listener, by address and /64, for streams and
//! handshakes.

use std::net::{IpAddr, SocketAddr};

use underpass_tests::{APP, Dial, Family, HBONE, Pod, Scene, Server, Suite, tool, until};

use crate::{refused, served, served_until_full};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both(
        "a client beyond limits.connections_per_source is reset while others are served",
        limit_of_clients,
    );
    suite.test("IPv6 addresses of one /64 are one source", limit_of_ipv6_prefix);
    suite.test(
        "an application that never closes connections is reset by its own proxy",
        limit_of_application,
    );
    suite.test("a stream counts for the source address of its tunnel", limit_of_streams);
    suite.test(
        "HBONE connections count for their source before their handshake",
        limit_of_handshakes,
    );
    suite.test("without limits.connections_per_source, one address is not limited", unlimited);
}

/// Adds an address to a pod.
pub(crate) async fn add_address(pod: &Pod, address: &str) -> Dial {
    let (ip, length) = address.split_once('/').expect("a length");
    let ip: IpAddr = ip.parse().expect("an address");
    // Without duplicate address detection, the address is usable at once.
    let nodad: &[_] = if ip.is_ipv6() { &["nodad"] } else { &[] };
    assert!(["24", "64"].contains(&length));
    let arguments = [&["address", "add", address, "dev", "eth0"], nodad].concat();
    tool(pod, "ip", &arguments).await.ok();
    Dial { source: Some(SocketAddr::new(ip, 0)), ..Dial::default() }
}

async fn limit_of_clients(family: Family) {
    let scene = Scene::new().await;
    let _echo = Server::echo(&scene.server, APP);
    let settings = scene.server_settings().set("limits.connections_per_source=3");
    let mut server = scene.server.proxy(&settings).await;
    let to = scene.app(family);
    let mut open = served_until_full(&scene.client, to).await;
    assert_eq!(open.len(), 3);
    let address = scene.client.ip(family).to_string();
    let last = format!("last={address}");
    server.line(&["connections are refused", "limits.connections_per_source", &last]).await;
    let counted = refused(&scene.server, "connections_per_source", "inbound").await;
    assert_eq!(counted, Some(1.0));
    let other = match family {
        Family::V4 => "10.1.0.77/24",
        // An address in another /64, which the server reaches by its default route.
        Family::V6 => "fd00:77::1/64",
    };
    let other = add_address(&scene.client, other).await;
    served(&scene.client, to, other).await.expect("another source is served");
    drop(open.pop());
    until("there is room again", async || {
        served(&scene.client, to, Dial::default()).await.is_some()
    })
    .await;
}

async fn limit_of_ipv6_prefix() {
    let scene = Scene::new().await;
    let _echo = Server::echo(&scene.server, APP);
    let settings = scene.server_settings().set("limits.connections_per_source=1");
    let _server = scene.server.proxy(&settings).await;
    let to = scene.app(Family::V6);
    let neighbour = add_address(&scene.client, "fd00:1::77/64").await;
    let open = served(&scene.client, to, neighbour).await.expect("the first one");
    assert!(served(&scene.client, to, Dial::default()).await.is_none());
    drop(open);
}

async fn limit_of_application() {
    let (scene, _proxy) = Scene::with_plain_client(&["limits.connections_per_source=3"]).await;
    let _echo = Server::echo(&scene.server, APP);
    let open = served_until_full(&scene.client, scene.app(Family::V4)).await;
    assert_eq!(open.len(), 3);
    let counted = refused(&scene.client, "connections_per_source", "outbound").await;
    assert_eq!(counted, Some(1.0));
}

async fn limit_of_streams() {
    let scene = Scene::new().await;
    let _echo = Server::echo(&scene.server, APP);
    let settings = scene.server_settings().set("limits.connections_per_source=3");
    let mut server = scene.server.proxy(&settings).await;
    let mut client = scene.client.proxy(&scene.client_settings()).await;
    let open = served_until_full(&scene.client, scene.app(Family::V4)).await;
    assert_eq!(open.len(), 2, "the tunnel counts too");
    let setting = "limits.connections_per_source";
    let address = scene.client.ip(Family::V4).to_string();
    server.line(&["connection failed", "reason=\"too_many_connections\"", setting, &address]).await;
    client.line(&["connection failed", "reason=\"refused\"", "503"]).await;
    let counted = refused(&scene.server, "connections_per_source", "hbone").await;
    assert_eq!(counted, Some(1.0));
}

async fn limit_of_handshakes() {
    let scene = Scene::new().await;
    let settings = scene.server_settings().set("limits.connections_per_source=2");
    let _server = scene.server.proxy(&settings).await;
    let hbone = scene.server.at(Family::V4, HBONE);
    let _silent = [
        scene.client.dial(hbone).await.expect("it listens"),
        scene.client.dial(hbone).await.expect("it listens"),
    ];
    scene.client.dial_and_see_reset(hbone).await;
    let counted = refused(&scene.server, "connections_per_source", "hbone").await;
    assert_eq!(counted, Some(1.0));
}

async fn unlimited() {
    let (scene, _proxy) = Scene::with_plain_client(&["limits.connections_per_source=off"]).await;
    let _echo = Server::echo(&scene.server, APP);
    let mut open = Vec::new();
    for _ in 0..100 {
        let stream = served(&scene.client, scene.app(Family::V4), Dial::default()).await;
        open.push(stream.expect("there is no limit"));
    }
}
