//! Runs one load on one path, and returns its figures.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::clients::{prepare_storm, storm};
use crate::load::{BulkDirection, RequestMode, Traffic, idle, stalled};
use crate::options::{Options, PathName, WorkloadGroup};
use crate::paths::Path;
use crate::process::{cpu_seconds, open_files, resident_kib};
use crate::server::{ANSWER, ANSWER_ONCE, SINK, SOURCE, STALL};

/// The time for TCP windows, and the proxies' tunnels, buffers and caches to grow.
pub(crate) const WARM_UP: Duration = Duration::from_millis(500);
/// The timeout until data in the buffers of a stopped load has arrived.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The time after which a proxy has released the memory of ended connections.
const RELEASE_DELAY: Duration = Duration::from_secs(2);
const IDLE_CONNECTIONS: usize = 2000;
const STORM_CONNECTIONS: usize = 10_000;

// The names of figures with goals.
pub(crate) const BITS: &str = "Gbit/s";
pub(crate) const CPU_PER_BYTE: &str = "CPU-s/GB";
pub(crate) const MEDIAN: &str = "p50 µs";
pub(crate) const REQUESTS: &str = "requests/s";
pub(crate) const CONNECTIONS: &str = "connections/s";
pub(crate) const CPU_EACH: &str = "CPU µs each";
/// The common prefix of both sides' figures.
pub(crate) const KIB_PER_IDLE_CONNECTION: &str = "KiB each";
pub(crate) const AT_REST: &str = "MiB at rest";
/// The time after which a process is at rest: by then, the proxy has released memory that only its
/// start needed.
pub(crate) const REST_DELAY: Duration = Duration::from_secs(4);

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bulk(BulkDirection, usize),
    Latency,
    Requests(usize),
    Connections(usize),
    Storm(usize),
    Idle(usize),
    Stalls(usize),
}

/// One figure of a workload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    /// The name with its unit.
    pub name: &'static str,
    /// The value; `None` if the path has none: a direct path has no proxies.
    pub value: Option<f64>,
}

impl Workload {
    /// The loads of a group in their order.
    #[must_use]
    pub fn of(what: WorkloadGroup) -> Vec<Self> {
        let kinds: &[Kind] = match what {
            WorkloadGroup::Bulk => &[
                Kind::Bulk(BulkDirection::Up, 1),
                Kind::Bulk(BulkDirection::Up, 8),
                Kind::Bulk(BulkDirection::Down, 1),
            ],
            WorkloadGroup::Rtt => &[Kind::Latency],
            WorkloadGroup::Rps => &[Kind::Requests(64)],
            WorkloadGroup::Conn => &[Kind::Connections(16)],
            WorkloadGroup::Storm => &[Kind::Storm(STORM_CONNECTIONS)],
            WorkloadGroup::Idle => &[Kind::Idle(IDLE_CONNECTIONS)],
            WorkloadGroup::Stalls => &[0, 1, 4, 20, 99].map(Kind::Stalls),
        };
        kinds.iter().copied().map(Self).collect()
    }

    /// Whether the workload has figures on this path: memory is measured only with proxies.
    #[must_use]
    pub fn measures(self, path: PathName) -> bool {
        !self.needs_fresh_proxies() || path.has_proxies()
    }

    /// Whether the workload needs a separate path with unused proxies.
    #[must_use]
    pub fn needs_fresh_proxies(self) -> bool {
        matches!(self.0, Kind::Idle(_) | Kind::Stalls(_))
    }

    /// Runs the load on the path for the duration in the options.
    pub async fn run(self, path: &Path, options: &Options) -> Vec<Figure> {
        let window = options.window();
        match self.0 {
            Kind::Bulk(direction, streams) => bulk(path, window, direction, streams).await,
            Kind::Latency => latency(&requests(path, window, RequestMode::KeepAlive, 1).await),
            Kind::Requests(connections) => {
                rate(REQUESTS, &requests(path, window, RequestMode::KeepAlive, connections).await)
            }
            Kind::Connections(connections) => {
                rate(CONNECTIONS, &requests(path, window, RequestMode::Once, connections).await)
            }
            Kind::Storm(connections) => burst(path, connections).await,
            Kind::Idle(connections) => memory(path, connections).await,
            Kind::Stalls(readers) => stalls(path, window, readers).await,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Bulk(BulkDirection::Up, streams) => write!(f, "bulk x{streams}"),
            Kind::Bulk(BulkDirection::Down, streams) => write!(f, "bulk reverse x{streams}"),
            Kind::Latency => f.write_str("requests x1"),
            Kind::Requests(connections) => write!(f, "requests x{connections}"),
            Kind::Connections(connections) => write!(f, "new connections x{connections}"),
            Kind::Storm(connections) => write!(f, "storm x{connections}"),
            Kind::Idle(connections) => write!(f, "idle x{connections}"),
            Kind::Stalls(readers) => write!(f, "stalled readers x{readers}"),
        }
    }
}

pub(crate) async fn bulk(
    path: &Path,
    window: Duration,
    direction: BulkDirection,
    streams: usize,
) -> Vec<Figure> {
    let port = if direction == BulkDirection::Up { SINK } else { SOURCE };
    let traffic = Traffic::bulk(path.client(), path.target(port), direction, streams);
    let counter =
        if direction == BulkDirection::Up { path.received() } else { traffic.received.clone() };
    let bytes = || counter.load(Relaxed);
    sleep(WARM_UP).await;
    let (meter, before) = (Meter::start(path), bytes());
    sleep(window).await;
    let gigabytes = gigabytes(bytes() - before);
    let Used { seconds, cpu } = meter.read();
    traffic.stop();
    drop(traffic.latencies());
    timeout(SETTLE_TIMEOUT, path.sink_is_idle()).await.expect("what was sent arrives");
    vec![
        Figure { name: BITS, value: Some(gigabytes * 8.0 / seconds) },
        Figure { name: CPU_PER_BYTE, value: cpu.map(|cpu| cpu / gigabytes) },
    ]
}

/// Measures the resources of a path between two points in time.
pub(crate) struct Meter<'a> {
    path: &'a Path,
    began: Instant,
    cpu: f64,
}

/// The time and CPU time between two readings.
pub(crate) struct Used {
    pub(crate) seconds: f64,
    /// The CPU seconds of the processes between the pods, if there are any.
    pub(crate) cpu: Option<f64>,
}

impl<'a> Meter<'a> {
    pub(crate) fn start(path: &'a Path) -> Self {
        Self { path, began: Instant::now(), cpu: cpu_seconds(&path.processes()) }
    }

    pub(crate) fn read(&self) -> Used {
        let processes = self.path.processes();
        let cpu = (!processes.is_empty()).then(|| cpu_seconds(&processes) - self.cpu);
        Used { seconds: self.began.elapsed().as_secs_f64(), cpu }
    }
}

#[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 bytes")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// The result of requests: sorted latencies in microseconds.
pub(crate) struct Requests {
    latencies: Vec<u32>,
    seconds: f64,
    pub(crate) cpu_each: Option<f64>,
}

pub(crate) async fn requests(
    path: &Path,
    window: Duration,
    asking: RequestMode,
    connections: usize,
) -> Requests {
    let port = if asking == RequestMode::KeepAlive { ANSWER } else { ANSWER_ONCE };
    let traffic = Traffic::requests(path.client(), path.target(port), asking, connections);
    sleep(WARM_UP).await;
    let meter = Meter::start(path);
    traffic.measure();
    sleep(window).await;
    traffic.stop();
    let Used { seconds, cpu } = meter.read();
    let mut latencies = traffic.latencies();
    latencies.sort_unstable();
    let cpu_each = cpu.map(|cpu| cpu * 1e6 / count(&latencies));
    Requests { latencies, seconds, cpu_each }
}

#[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 requests")]
fn count(latencies: &[u32]) -> f64 {
    latencies.len() as f64
}

fn latency(requests: &Requests) -> Vec<Figure> {
    vec![
        Figure { name: MEDIAN, value: Some(percentile(&requests.latencies, 50)) },
        Figure { name: "p99 µs", value: Some(percentile(&requests.latencies, 99)) },
        Figure { name: CPU_EACH, value: requests.cpu_each },
    ]
}

fn rate(name: &'static str, requests: &Requests) -> Vec<Figure> {
    vec![
        Figure { name, value: Some(count(&requests.latencies) / requests.seconds) },
        Figure { name: "p99 µs", value: Some(percentile(&requests.latencies, 99)) },
        Figure { name: CPU_EACH, value: requests.cpu_each },
    ]
}

/// The smallest latency that `percent` of the requests do not exceed.
fn percentile(sorted: &[u32], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(rank).copied().map(f64::from).expect("there were requests")
}

/// Opens connections at once, each for one request.
async fn burst(path: &Path, connections: usize) -> Vec<Figure> {
    let child_process = prepare_storm(path.client(), path.target(ANSWER_ONCE), connections);
    let meter = Meter::start(path);
    let result = tokio::task::spawn_blocking(|| storm(child_process)).await;
    let storm = result.expect("the storm met no error");
    let Used { cpu, .. } = meter.read();
    let mut latencies = storm.latencies;
    latencies.sort_unstable();
    vec![
        Figure { name: "s until the last", value: Some(storm.seconds) },
        Figure { name: MEDIAN, value: Some(percentile(&latencies, 50)) },
        Figure { name: "p99 µs", value: Some(percentile(&latencies, 99)) },
        Figure { name: "max µs", value: Some(percentile(&latencies, 100)) },
        Figure { name: CPU_EACH, value: cpu.map(|cpu| cpu * 1e6 / count(&latencies)) },
        Figure { name: "failed", value: Some(f64::from(storm.failed)) },
    ]
}

/// The sum of a figure over the processes of each side, the client's side first.
fn of_sides(path: &Path, figure: fn(u32) -> f64) -> Vec<f64> {
    let sum = |side: Vec<u32>| side.into_iter().map(figure).sum::<f64>();
    path.sides().into_iter().map(sum).collect()
}

/// The resident memory of both proxies: at rest, per idle connection, and after their end.
async fn memory(path: &Path, connections: usize) -> Vec<Figure> {
    let resident = || of_sides(path, resident_kib);
    sleep(REST_DELAY).await;
    let at_rest = resident();
    // Exclude the tunnel and other resources of the first connection.
    let first = idle(path.client(), path.target(ANSWER), 1);
    let before = resident();
    let files = of_sides(path, open_files);
    let idle_connections = idle(path.client(), path.target(ANSWER), connections);
    let each = f64::from(u32::try_from(connections).expect("a few thousand"));
    let during = resident();
    drop(idle_connections);
    // Tunnels may stay open, but they are far fewer than connections.
    let is_open = |(now, before): (&f64, &f64)| now > &(before + each / 10.0);
    let ended = async {
        while of_sides(path, open_files).iter().zip(&files).any(is_open) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SETTLE_TIMEOUT, ended).await.expect("the proxies close what the client has closed");
    sleep(RELEASE_DELAY).await;
    let after = resident();
    drop(first);
    let mebibytes = |figures: &[f64], side: usize| figures.get(side).map(|kib| kib / 1024.0);
    let growth = |side: usize| Some((during.get(side)? - before.get(side)?) / each);
    vec![
        Figure { name: "KiB each, client's side", value: growth(0) },
        Figure { name: "KiB each, server's side", value: growth(1) },
        Figure { name: "MiB at rest, client's side", value: mebibytes(&at_rest, 0) },
        Figure { name: "MiB at rest, server's side", value: mebibytes(&at_rest, 1) },
        Figure { name: "MiB after their end, client's side", value: mebibytes(&after, 0) },
        Figure { name: "MiB after their end, server's side", value: mebibytes(&after, 1) },
    ]
}

/// The throughput of other streams while readers are stalled, and the memory of the stalled ones in
/// each proxy.
async fn stalls(path: &Path, window: Duration, readers: usize) -> Vec<Figure> {
    let resident = || of_sides(path, resident_kib);
    let first = idle(path.client(), path.target(ANSWER), 1);
    let before = resident();
    let stalled_connections = stalled(path.client(), path.target(STALL), readers);
    let after = resident();
    let growth = |side: usize| Some((after.get(side)? - before.get(side)?) / 1024.0);
    let requests = requests(path, window, RequestMode::KeepAlive, 1).await;
    let bulk_figures = bulk(path, window, BulkDirection::Up, 1).await;
    drop((first, stalled_connections));
    let rate = bulk_figures.first().and_then(|rate| rate.value);
    vec![
        Figure { name: "Gbit/s of others", value: rate },
        Figure { name: MEDIAN, value: Some(percentile(&requests.latencies, 50)) },
        Figure { name: "p99 µs", value: Some(percentile(&requests.latencies, 99)) },
        Figure { name: "MiB, client's side", value: growth(0) },
        Figure { name: "MiB, server's side", value: growth(1) },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_latencies() {
        let sorted: Vec<u32> = (1..=100).collect();
        assert_eq!(percentile(&sorted, 50), 50.0);
        assert_eq!(percentile(&sorted, 99), 99.0);
        assert_eq!(percentile(&[7], 99), 7.0);
        assert_eq!(percentile(&[1, 2, 3], 50), 2.0);
    }
}
