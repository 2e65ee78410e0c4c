//! What proxies and pods hold when nothing happens.

use std::fs;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::pause;
use super::scene::Stage;
use crate::OrFail;
use crate::pods::Pod;
use crate::proxy::Proxy;

/// What one pod and its proxy hold.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Held {
    /// The proxy's descriptors.
    pub(super) descriptors: usize,
    /// TCP sockets of the pod that are neither listening nor gone.
    pub(super) sockets: usize,
    /// Connections that conntrack takes for open.
    pub(super) tracked: usize,
    /// The proxy's resident memory, in KiB.
    pub(super) resident: usize,
    /// What the proxy says that is open.
    pub(super) open: f64,
    pub(super) tunnels: f64,
    pub(super) rules_intact: bool,
}

/// What is held by both proxies' pods, client's first, once it is no more than `wanted`, or when `patience` ends.
pub(super) async fn settled(
    stage: &Stage,
    wanted: impl Fn([Held; 2]) -> bool,
    patience: Duration,
) -> [Held; 2] {
    let began = Instant::now();
    loop {
        let held = all(stage).await;
        if wanted(held) || began.elapsed() > patience {
            return held;
        }
        pause(Duration::from_millis(200)).await;
    }
}

async fn all(stage: &Stage) -> [Held; 2] {
    let [(client, client_proxy), (server, server_proxy)] = stage.proxies();
    [held(client, client_proxy).await, held(server, server_proxy).await]
}

async fn held(pod: &Pod, proxy: &Proxy) -> Held {
    let pid = proxy.pid();
    let metrics = timeout(Duration::from_secs(10), pod.metrics()).await.or_fail("read metrics");
    let sum = |name: &str| metrics.sum(name, &[]).unwrap_or_default();
    let (sockets, tracked) = pod.run(|| (sockets(), tracked()));
    Held {
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

/// Those of the namespace that the thread is in, but for LISTEN (0A) and TIME_WAIT (06).
fn sockets() -> usize {
    let of = |file: &str| {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        let state = |line: &str| line.split_whitespace().nth(3).map(str::to_owned);
        let states = text.lines().skip(1).filter_map(state);
        states.filter(|state| !["0A", "06"].contains(&state.as_str())).count()
    };
    of("tcp") + of("tcp6")
}

/// Those whose end the kernel has not seen: one that has ended stays in TIME_WAIT or CLOSE.
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
