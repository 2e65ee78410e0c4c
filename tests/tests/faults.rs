//! End-to-end tests of faults: a reset stays a reset, silence ends at a timeout, and the proxy
//! keeps running.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::process::ExitCode;

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use underpass_tests::{
    APP, End, Family, HBONE, Pod, Scene, Suite, abort, exchange, read_to_end, tool,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both(
        "an application's RST arrives as RST through the tunnel",
        rst_through_the_tunnel,
    );
    suite.test_both("an application's RST arrives as RST in plaintext", rst_in_plaintext);
    suite.test("the client gets RST when the server's proxy is killed", server_proxy_killed);
    suite.test("the server gets RST when the client's proxy is killed", client_proxy_killed);
    suite.test(
        "the tunnel's client gets RST and the logs have the reason when an application refuses",
        refused_in_tunnel,
    );
    suite.test("a plaintext client gets RST when the destination refuses", refused_in_plaintext);
    suite.test("a connection to a silent destination fails after timeouts.connect", unreachable);
    suite.test("a tunnel to a silent peer fails after timeouts.connect", peer_unreachable);
    suite.test("a peer without a proxy is reported with the expected protocol", peer_without_proxy);
    suite.test("a peer without HBONE is reported with the expected protocol", peer_without_hbone);
    suite.test("a silent HBONE client is disconnected after timeouts.handshake", silent_client);
    suite.test("a tunnel to a silent HBONE server fails after timeouts.handshake", silent_peer);
    suite.test(
        "a client gets RST when the peer resets during the handshake",
        peer_resets_during_handshake,
    );
    suite.test(
        "an application that does not read does not block others in the same tunnel",
        no_head_of_line_blocking,
    );
    suite.run()
}

async fn rst_through_the_tunnel(family: Family) {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    rst_arrives(&scene, family).await;
    for (proxy, reasons) in [
        (&mut client_proxy, ["client_reset", "reset"]),
        (&mut server_proxy, ["upstream_reset", "reset"]),
    ] {
        for reason in reasons {
            proxy.line(&["connection failed", &format!("reason=\"{reason}\"")]).await;
        }
    }
}

async fn rst_in_plaintext(family: Family) {
    let (scene, mut client_proxy) = Scene::with_plain_client(&[]).await;
    let _server_proxy = scene.server.proxy(&scene.server_settings()).await;
    rst_arrives(&scene, family).await;
    for reason in ["client_reset", "upstream_reset"] {
        client_proxy.line(&["connection failed", &format!("reason=\"{reason}\"")]).await;
    }
}

async fn rst_arrives(scene: &Scene, family: Family) {
    let (client, mut server) = scene.connected(family).await;
    abort(client);
    assert_eq!(read_to_end(&mut server).await, (vec![], End::Reset), "the client's RST");
    let (mut client, server) = scene.connected(family).await;
    abort(server);
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Reset), "the server's RST");
}

async fn server_proxy_killed() {
    let (scene, _client_proxy, mut server_proxy) = Scene::with_proxies().await;
    let (mut client, _server) = scene.connected(Family::V4).await;
    server_proxy.signal(Signal::SIGKILL);
    server_proxy.ended().await;
    assert_eq!(read_to_end(&mut client).await, (vec![], End::Reset));
}

async fn client_proxy_killed() {
    let (scene, mut client_proxy, _server_proxy) = Scene::with_proxies().await;
    let (_client, mut server) = scene.connected(Family::V4).await;
    client_proxy.signal(Signal::SIGKILL);
    client_proxy.ended().await;
    assert_eq!(read_to_end(&mut server).await, (vec![], End::Reset));
}

async fn refused_in_tunnel() {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    client_proxy.line(&["connection failed", "reason=\"refused\"", "503"]).await;
    server_proxy.line(&["connection failed", "reason=\"connect\"", "Connection refused"]).await;
}

async fn refused_in_plaintext() {
    let (scene, mut proxy) = Scene::with_plain_client(&[]).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    proxy.line(&["connection failed", "reason=\"connect\"", "Connection refused"]).await;
}

/// Drops all packets to a port of the pod.
async fn drop_port(pod: &Pod, port: u16) {
    let rules = format!(
        "add table inet wall; add chain inet wall input {{ type filter hook input priority 0; }}; \
         add rule inet wall input tcp dport {port} drop"
    );
    tool(pod, "nft", &[&rules]).await.ok();
}

async fn unreachable() {
    let (scene, mut proxy) = Scene::with_plain_client(&["timeouts.connect=500ms"]).await;
    drop_port(&scene.server, APP).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    proxy
        .line(&["connection failed", "reason=\"connect_timeout\"", "0.5 s", "timeouts.connect"])
        .await;
}

async fn peer_unreachable() {
    let scene = Scene::new().await;
    let mut proxy =
        scene.client.proxy(&scene.client_settings().set("timeouts.connect=500ms")).await;
    drop_port(&scene.server, HBONE).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    let line = ["connection failed", "reason=\"connect_timeout\"", "firewall", ":15008"];
    proxy.line(&line).await;
}

async fn peer_without_proxy() {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    proxy.line(&["reason=\"connect\"", "an HBONE proxy is expected", "Connection refused"]).await;
}

async fn peer_without_hbone() {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    let other = scene.server.listen(HBONE);
    let answer = async {
        let (mut stream, _) = other.accept().await;
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.expect("an answer");
        stream
    };
    tokio::join!(answer, scene.client.dial_and_see_reset(scene.app(Family::V4)));
    proxy.line(&["reason=\"tls\"", "HBONE (TLS 1.3 with h2) is expected at this port"]).await;
}

async fn silent_client() {
    let scene = Scene::new().await;
    let mut proxy =
        scene.server.proxy(&scene.server_settings().set("timeouts.handshake=300ms")).await;
    let mut client =
        scene.client.dial(scene.server.at(Family::V4, HBONE)).await.expect("it listens");
    let (received, _) = read_to_end(&mut client).await;
    assert_eq!(received, b"");
    proxy.line(&["connection failed", "reason=\"handshake_timeout\"", "timeouts.handshake"]).await;
}

async fn silent_peer() {
    let scene = Scene::new().await;
    let mut proxy =
        scene.client.proxy(&scene.client_settings().set("timeouts.handshake=300ms")).await;
    let peer = scene.server.listen(HBONE);
    let to = scene.app(Family::V4);
    let (_held, ()) = tokio::join!(peer.accept(), scene.client.dial_and_see_reset(to));
    proxy.line(&["connection failed", "reason=\"handshake_timeout\"", "timeouts.handshake"]).await;
}

async fn peer_resets_during_handshake() {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    let peer = scene.server.listen(HBONE);
    let reset = async {
        let (mut stream, _) = peer.accept().await;
        stream.read_u8().await.expect("the handshake begins");
        abort(stream);
    };
    let to = scene.app(Family::V4);
    tokio::join!(reset, scene.client.dial_and_see_reset(to));
    proxy.line(&["connection failed", "reason=\"tls\""]).await;
}

async fn no_head_of_line_blocking() {
    let (scene, _client_proxy, _server_proxy) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let (mut flooding, _unread, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    let flood = async {
        let block = vec![0; 1 << 20];
        loop {
            flooding.write_all(&block).await.expect("the connection holds");
        }
    };
    let others = async {
        for _ in 0..20 {
            let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
            exchange(&mut client, &mut server).await;
        }
    };
    tokio::select! {
        () = flood => {}
        () = others => {}
    }
}
