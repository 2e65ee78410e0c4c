//! Tests of services: addresses, ports, and the selection of endpoints.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use underpass_tests::{APP, Family, Mesh, Scene, Server, Suite, exchange};

use crate::{proxies, with_server};

/// The port of the service. Its endpoints listen on [`APP`].
const PORT: u16 = 80;
const SERVICE: &str = "name: web, hostname: web.example, vips: [\"/10.96.0.1\", \"/fd96::1\"], \
                       cidrVips: [\"/10.97.0.0/16\"], ports: {80: 8080}";
const ENDPOINT: &str = ", services: {default/web.example: {80: 8080}}";

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both("a service's address leads through the tunnel to its endpoint's port", vip);
    suite.test("any address in a service's CIDR leads to its endpoint", cidr_vip);
    suite.test("a connection to an undefined port of a service gets RST", undefined_port);
    suite.test("an unhealthy endpoint gets no connection", unhealthy);
    suite.test("an unreachable endpoint is ejected without a failed connection", ejected);
    suite.test("a workload without an address is reached by its hostname", hostname);
}

fn service(family: Family, port: u16) -> SocketAddr {
    let address = match family {
        Family::V4 => "10.96.0.1",
        Family::V6 => "fd96::1",
    };
    SocketAddr::new(address.parse().expect("an address"), port)
}

fn mesh(scene: &Scene) -> Mesh {
    with_server(scene, ENDPOINT).service(SERVICE)
}

async fn vip(family: Family) {
    let (scene, mut proxy, mut at_server) = proxies(mesh).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, service(family, PORT)).await;
    exchange(&mut client, &mut server).await;
    drop((client, server));
    let tunnelled = format!("dst.hbone_addr={}", scene.app(family));
    let known = ["dst.service=\"web.example\"", "dst.workload=\"server\"", &tunnelled];
    proxy.line(&known).await;
    at_server.line(&["direction=\"inbound\"", &tunnelled]).await;
}

async fn cidr_vip() {
    let (scene, mut proxy, _server) = proxies(mesh).await;
    let app = scene.server.listen(APP);
    let to = "10.97.3.4:80".parse().expect("an address");
    let (mut client, mut server, _) = scene.client.meet(&app, to).await;
    exchange(&mut client, &mut server).await;
    drop((client, server));
    proxy.line(&["dst.service=\"web.example\"", "dst.workload=\"server\""]).await;
}

async fn undefined_port() {
    let (scene, mut proxy, _server) = proxies(mesh).await;
    let app = scene.server.listen(APP);
    scene.client.dial_and_see_reset(service(Family::V4, 81)).await;
    proxy.line(&["connection failed", "web.example", "81"]).await;
    assert!(!app.is_reached(), "the application was reached");
}

async fn unhealthy() {
    let sick = |scene: &Scene| {
        with_server(scene, &format!("{ENDPOINT}, status: Unhealthy")).service(SERVICE)
    };
    let (scene, mut proxy, _server) = proxies(sick).await;
    let app = scene.server.listen(APP);
    scene.client.dial_and_see_reset(service(Family::V4, PORT)).await;
    proxy.line(&["connection failed", "web.example"]).await;
    assert!(!app.is_reached(), "the application was reached");
    // The workload stays reachable by its own address.
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
}

async fn ejected() {
    let mut scene = Scene::new().await;
    // Without a listener, the kernel refuses connections.
    let mut gone = scene.world.pod("gone").await;
    scene.world.wire(&mut scene.client, &mut gone).await;
    let mesh = mesh(&scene).workload_with("gone", &gone.ips(), "HBONE", ENDPOINT);
    scene.set_mesh(&mesh);
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    let _at_server = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    for _ in 0..32 {
        let to = service(Family::V4, PORT);
        let (mut client, mut server, _) = scene.client.meet(&app, to).await;
        exchange(&mut client, &mut server).await;
    }
    // The first endpoint is random: all 32 connections avoid the missing one in one of 2^32 runs.
    proxy.line(&["ejected", "gone"]).await;
    // The ejection outlasts the test: each worker tries the endpoint at most once.
    assert!(proxy.count(&["ejected", "gone"]) <= 8, "{}", proxy.log());
}

async fn hostname() {
    // A name that the system's resolver knows without a name server.
    let local = |scene: &Scene| {
        Mesh::default()
            .hbone(&scene.client)
            .workload_with("outside", &[], "TCP", ", hostname: localhost, services: {default/out.example: {80: 8080}}")
            .service("name: out, hostname: out.example, vips: [\"/10.96.0.9\"], ports: {80: 8080}, ipFamilies: IPv4")
    };
    let (scene, mut proxy, _server) = proxies(local).await;
    let app = Server::echo(&scene.client, APP);
    scene.echoed_at("10.96.0.9:80".parse().expect("an address")).await;
    proxy.line(&["dst.service=\"out.example\"", "127.0.0.1:8080"]).await;
    let seen: BTreeSet<_> = app.peers().iter().map(SocketAddr::ip).collect();
    assert_eq!(seen.len(), 1, "{seen:?}");
}
