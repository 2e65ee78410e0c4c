//! Tests of the exhaustion of file descriptors: before none are left, accepting pauses and the
//! proxy is unready, and it recovers.

use std::fs;
use std::net::Ipv4Addr;

use underpass_tests::{
    APP, Dial, Family, Pod, Proxy, Scene, Server, Settings, Suite, exchange, http_get, tool, until,
};

use crate::sources::add_address;
use crate::{refused, served, served_until_full};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test(
        "a proxy short of file descriptors pauses accepting, logs it, and recovers",
        accepting_pauses,
    );
    suite.test(
        "a stream beyond its source's share of descriptors gets status 503, and the proxy stays ready",
        streams,
    );
    suite.test(
        "one source leaves descriptors to other sources and to outbound connections",
        source_leaves_descriptors,
    );
    suite.test(
        "a connection that fails without a free descriptor is logged with the reason",
        cannot_dial,
    );
    suite.test(
        "a tunnel that fails without a free descriptor is logged with the reason",
        cannot_tunnel,
    );
    suite
        .test("accepting pauses and resumes when the system has no free descriptor", cannot_accept);
}

/// A proxy with this limit of open files.
async fn proxy_with_file_limit(pod: &Pod, files: usize, settings: &Settings) -> Proxy {
    let script = format!("ulimit -n {files}\nexec \"$UNDERPASS\" \"$@\"");
    pod.try_proxy_through(&script, settings).await.expect("the proxy starts")
}

async fn readiness(pod: &Pod) -> (u16, String) {
    http_get(pod, (Ipv4Addr::LOCALHOST, 15021).into(), "/healthz/ready").await
}

async fn is_unready(pod: &Pod) {
    let (status, why) = readiness(pod).await;
    assert_eq!((status, why.trim()), (503, "not ready: out of file descriptors"));
}

async fn becomes_ready(pod: &Pod) {
    until("the proxy is ready again", async || readiness(pod).await.0 == 200).await;
}

/// The number of pauses of accepting for lack of descriptors, from the metrics.
async fn pauses(pod: &Pod) -> Option<f64> {
    let labels = [("reason", "descriptors")];
    pod.metrics().await.sum("underpass_accept_paused_total", &labels)
}

async fn accepting_pauses() {
    const BURST: usize = 100;
    let scene = Scene::new().await;
    let settings =
        scene.client_settings().set(&format!("mesh.file={}", scene.empty_mesh().display()));
    let mut proxy = proxy_with_file_limit(&scene.client, 100, &settings).await;
    let echo = Server::echo(&scene.server, APP);
    let mut burst = Vec::new();
    for _ in 0..BURST {
        // Connections wait in the accept queue.
        burst.push(scene.client.dial(scene.app(Family::V4)).await.expect("it listens"));
    }
    let warning = proxy.line(&["WARN", "accepting pauses", "ulimit -n", "LimitNOFILE"]).await;
    is_unready(&scene.client).await;
    assert!(pauses(&scene.client).await >= Some(1.0));
    let reached = echo.peers().len();
    assert!((5..BURST / 2).contains(&reached), "{reached} were accepted: {warning}");
    assert!(fs::read_dir(format!("/proc/{}/fd", proxy.pid())).expect("it runs").count() < 100);
    drop(burst);
    becomes_ready(&scene.client).await;
    proxy.line(&["INFO", "accepting resumes"]).await;
    // No connection was refused: all were served eventually.
    proxy.access_lines(BURST).await;
    assert_eq!(proxy.count(&["connection complete"]), BURST, "{}", proxy.log());
    assert_eq!(proxy.count(&["accepting pauses"]), proxy.count(&["accepting resumes"]));
    let app = scene.server.listen(APP + 1);
    let to = scene.server.at(Family::V4, APP + 1);
    let (mut client, mut server, _) = scene.client.meet(&app, to).await;
    exchange(&mut client, &mut server).await;
    drop((client, server));
    assert!(proxy.stop().await.success(), "the proxy did not stop:\n{}", proxy.log());
}

async fn streams() {
    let scene = Scene::new().await;
    let mut proxy = proxy_with_file_limit(&scene.server, 100, &scene.server_settings()).await;
    let mut client = scene.client.proxy(&scene.client_settings()).await;
    let _echo = Server::echo(&scene.server, APP);
    let to = scene.app(Family::V4);
    let open = served_until_full(&scene.client, to).await;
    assert!(open.len() > 10, "{} streams", open.len());
    proxy.line(&["connection failed", "reason=\"out_of_descriptors\"", "ulimit -n"]).await;
    client.line(&["connection failed", "reason=\"refused\"", "503"]).await;
    let counted = refused(&scene.server, "descriptors_share", "hbone").await;
    assert_eq!(counted, Some(1.0));
    assert_eq!(readiness(&scene.server).await.0, 200, "others are served");
    drop(open);
    until("streams are served again", async || {
        served(&scene.client, to, Dial::default()).await.is_some()
    })
    .await;
}

async fn source_leaves_descriptors() {
    let scene = Scene::new().await;
    let mut proxy = proxy_with_file_limit(&scene.server, 200, &scene.server_settings()).await;
    let _echo = Server::echo(&scene.server, APP);
    let to = scene.app(Family::V4);
    let attacker = add_address(&scene.client, "10.1.0.77/24").await;
    let mut open = Vec::new();
    while let Some(stream) = served(&scene.client, to, attacker).await {
        open.push(stream);
        assert!(open.len() < 100, "there is no limit");
    }
    assert!(open.len() > 10, "{} connections", open.len());
    proxy.line(&["WARN", "connections are refused", "ulimit -n", "last=10.1.0.77"]).await;
    assert_eq!(refused(&scene.server, "descriptors_share", "inbound").await, Some(1.0));
    // Other sources are served in plaintext and through tunnels, and so are the pod's applications.
    let _client = scene.client.proxy(&scene.client_settings()).await;
    let plain = Dial { mark: Some(0x539), ..Dial::default() };
    for dial in [plain, Dial::default()] {
        served(&scene.client, to, dial).await.expect("another source is served");
    }
    let back = Server::echo(&scene.client, APP);
    served(&scene.server, scene.client.at(Family::V4, APP), Dial::default())
        .await
        .expect("outbound");
    assert_eq!(back.peers().len(), 1);
    assert_eq!(readiness(&scene.server).await.0, 200);
    assert_eq!(pauses(&scene.server).await, None);
}

/// Limits a running proxy to `free` unused descriptors.
async fn leave_free(pod: &Pod, proxy: &Proxy, free: usize) {
    let folder = format!("/proc/{}/fd", proxy.pid());
    let names = fs::read_dir(folder).expect("it runs").flatten();
    let numbers: Vec<usize> =
        names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // The kernel assigns the lowest unused number below the limit.
    let unused: Vec<_> = (0..).filter(|number| !numbers.contains(number)).take(free + 1).collect();
    set_limit(pod, proxy, *unused.last().expect("one at least")).await;
}

async fn set_limit(pod: &Pod, proxy: &Proxy, files: usize) {
    let (pid, limit) = (proxy.pid().to_string(), format!("--nofile={files}:"));
    tool(pod, "prlimit", &["--pid", &pid, &limit]).await.ok();
}

/// Connects repeatedly with `free` unused descriptors until the proxy logs `parts`. Several
/// attempts are needed, because the proxy itself may open or close one, for example to verify its
/// rules.
async fn connect_until_logged(scene: &Scene, proxy: &Proxy, free: usize, parts: &[&str]) {
    let mut open = Vec::new();
    until("the proxy has logged it", async || {
        leave_free(&scene.client, proxy, free).await;
        // The proxy may reset an accepted connection at once.
        open.extend(scene.client.dial(scene.app(Family::V4)).await);
        proxy.count(parts) > 0
    })
    .await;
    set_limit(&scene.client, proxy, 1024).await;
}

async fn is_served_again(scene: &Scene) {
    until("it recovers", async || {
        served(&scene.client, scene.app(Family::V4), Dial::default()).await.is_some()
    })
    .await;
}

const NO_DESCRIPTOR_LEFT: [&str; 4] =
    ["connection failed", "reason=\"out_of_descriptors\"", "ulimit -n", "LimitNOFILE"];

async fn cannot_dial() {
    let (scene, proxy) = Scene::with_plain_client(&[]).await;
    let _echo = Server::echo(&scene.server, APP);
    // One descriptor is for the accepted connection.
    connect_until_logged(&scene, &proxy, 1, &NO_DESCRIPTOR_LEFT).await;
    is_served_again(&scene).await;
}

async fn cannot_tunnel() {
    let scene = Scene::new().await;
    // Each attempt needs a tunnel of its own, even if an earlier one has found a free descriptor.
    let settings = scene.client_settings().set("tunnels.streams=1");
    let client = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let _echo = Server::echo(&scene.server, APP);
    connect_until_logged(&scene, &client, 1, &NO_DESCRIPTOR_LEFT).await;
    is_served_again(&scene).await;
}

async fn cannot_accept() {
    let (scene, mut proxy) = Scene::with_plain_client(&[]).await;
    let _echo = Server::echo(&scene.server, APP);
    let warning = ["WARN", "accepting pauses", "Too many open files", "LimitNOFILE"];
    connect_until_logged(&scene, &proxy, 0, &warning).await;
    is_unready(&scene.client).await;
    is_served_again(&scene).await;
    becomes_ready(&scene.client).await;
    proxy.line(&["INFO", "accepting resumes"]).await;
    assert_eq!(proxy.count(&["accepting pauses"]), 1, "{}", proxy.log());
    let labels = [("listener", "outbound"), ("reason", "system")];
    let paused = scene.client.metrics().await.sum("underpass_accept_paused_total", &labels);
    assert!(paused >= Some(1.0), "{paused:?}");
}
