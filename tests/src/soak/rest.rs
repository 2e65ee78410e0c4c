//! Measures the resources that proxies and pods hold at rest.

use std::fs;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::pause;
use super::scene::SoakScene;
use crate::or_fail::OrFail;
use crate::pods::Pod;
use crate::proxy::Proxy;

/// The resources of a pod and its proxy.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Resources {
    /// The proxy's file descriptors.
    pub(super) descriptors: usize,
    /// TCP sockets of the pod that are neither listening nor in TIME_WAIT.
    pub(super) sockets: usize,
    /// Open connections in conntrack.
    pub(super) tracked: usize,
    /// The proxy's resident memory, in KiB.
    pub(super) resident: usize,
    /// Open connections according to the proxy's metrics.
    pub(super) open: f64,
    pub(super) tunnels: f64,
    pub(super) rules_intact: bool,
}

/// Waits until `wanted` accepts the resources of both pods, for up to `limit`. Returns the last
/// resources.
pub(super) async fn settled(
    scene: &SoakScene,
    wanted: impl Fn([Resources; 2]) -> bool,
    limit: Duration,
) -> [Resources; 2] {
    let began = Instant::now();
    loop {
        let resources = all(scene).await;
        if wanted(resources) || began.elapsed() > limit {
            return resources;
        }
        pause(Duration::from_millis(200)).await;
    }
}

async fn all(scene: &SoakScene) -> [Resources; 2] {
    let [(client, client_proxy), (server, server_proxy)] = scene.proxies();
    [resources(client, client_proxy).await, resources(server, server_proxy).await]
}

async fn resources(pod: &Pod, proxy: &Proxy) -> Resources {
    let pid = proxy.pid();
    let metrics = timeout(Duration::from_secs(10), pod.metrics()).await.or_fail("read metrics");
    let sum = |name: &str| metrics.sum(name, &[]).unwrap_or_default();
    let (sockets, tracked) = pod.run(|| (sockets(), tracked()));
    Resources {
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))
            .or_fail("count the proxy's descriptors")
            .count(),
        sockets,
        tracked,
        resident: resident(pid),
        open: sum("istio_tcp_sockets_open"),
        tunnels: sum("underpass_tunnels_open"),
        rules_intact: sum("underpass_rules_intact") > 0.5,
    }
}

/// TCP sockets of the current namespace, except LISTEN (0A) and TIME_WAIT (06).
fn sockets() -> usize {
    let of = |file: &str| {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        let state = |line: &str| line.split_whitespace().nth(3).map(str::to_owned);
        let states = text.lines().skip(1).filter_map(state);
        states.filter(|state| !["0A", "06"].contains(&state.as_str())).count()
    };
    of("tcp") + of("tcp6")
}

/// Open connections in conntrack. An ended one is in TIME_WAIT or CLOSE.
fn tracked() -> usize {
    let text = fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap_or_default();
    let has_ended = |line: &str| line.contains(" TIME_WAIT ") || line.contains(" CLOSE ");
    text.lines().filter(|line| line.contains(" tcp ") && !has_ended(line)).count()
}

fn resident(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).or_fail("read its memory");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}
