//! Tests of connections within a pod with BBR as the congestion control: the proxy's sockets are
//! not paced.

use std::fs;

use underpass_tests::{APP, Family, Pod, Scene, Suite, tool};

const AVAILABLE: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both("connections within a pod are not paced", async |family| {
        local_connections(family, "distant", &["cubic", "reno"]).await;
    });
    suite.test_both("connections within a pod are paced with proxy.pacing: all", async |family| {
        local_connections(family, "all", &["bbr"]).await;
    });
}

/// Opens a connection through a tunnel. The proxies' connections with client and application must
/// use one of the `expected` congestion controls.
async fn local_connections(family: Family, pacing: &str, expected: &[&str]) {
    let available = fs::read_to_string(AVAILABLE).expect("a kernel with TCP");
    if !available.split_whitespace().any(|name| name == "bbr") {
        // This kernel has no BBR, so it paces nothing.
        return;
    }
    let scene = Scene::new().await;
    for pod in [&scene.client, &scene.server] {
        pod.sysctl("net/ipv4/tcp_congestion_control", "bbr");
    }
    let pacing = format!("proxy.pacing={pacing}");
    let _client = scene.client.proxy(&scene.client_settings().set(&pacing)).await;
    let _server = scene.server.proxy(&scene.server_settings().set(&pacing)).await;
    let (_client_app, _server_app) = scene.connected(family).await;
    assert_uses(&scene.client, "sport = :15001", expected).await;
    assert_uses(&scene.server, &format!("dport = :{APP}"), expected).await;
}

/// Asserts the congestion control of the pod's connections with this port.
async fn assert_uses(pod: &Pod, port: &str, expected: &[&str]) {
    let arguments = ["--tcp", "--info", "--numeric", "--no-header", "state", "established", port];
    let connections = tool(pod, "ss", &arguments).await.ok();
    let uses = connections.split_whitespace().any(|word| expected.contains(&word));
    assert!(uses, "{port} of pod {} does not use {expected:?}:\n{connections}", pod.name());
}
