//! One load on one path, and what it measured.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::crowd::{prepare_storm, storm};
use crate::load::{Asking, Traffic, Way, idle, stalled};
use crate::options::{Options, PathName, What};
use crate::paths::Path;
use crate::process::{cpu_seconds, open_files, resident_kib};
use crate::server::{ANSWER, ANSWER_ONCE, SINK, SOURCE, STALL};

/// For TCP to find its windows, and the proxies their tunnels, buffers and caches.
pub(crate) const WARM_UP: Duration = Duration::from_millis(500);
/// For what the last load left in buffers and proxies.
const SETTLE: Duration = Duration::from_secs(10);
/// For a proxy to give back what ended connections had.
const AFTERWARDS: Duration = Duration::from_secs(2);
const IDLE_CONNECTIONS: usize = 2000;
const STORM_CONNECTIONS: usize = 10_000;

// The names of figures that goals are set for.
pub(crate) const BITS: &str = "Gbit/s";
pub(crate) const CPU_PER_BYTE: &str = "CPU-s/GB";
pub(crate) const MEDIAN: &str = "p50 µs";
pub(crate) const REQUESTS: &str = "requests/s";
pub(crate) const CONNECTIONS: &str = "connections/s";
pub(crate) const CPU_EACH: &str = "CPU µs each";
/// What the names of both sides' figures begin with.
pub(crate) const PER_IDLE: &str = "KiB each";
pub(crate) const AT_REST: &str = "MiB at rest";
/// How long after its start a process is at rest: ours gives back what only the start needed.
pub(crate) const RESTED: Duration = Duration::from_secs(4);

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bulk(Way, usize),
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
    /// What it is, with its unit.
    pub name: &'static str,
    /// The figure; `None` if there is nothing to measure: a direct path has no proxies.
    pub value: Option<f64>,
}

impl Workload {
    /// The loads of a group, in the order in which they are to be run.
    #[must_use]
    pub fn of(what: What) -> Vec<Self> {
        let kinds: &[Kind] = match what {
            What::Bulk => {
                &[Kind::Bulk(Way::Up, 1), Kind::Bulk(Way::Up, 8), Kind::Bulk(Way::Down, 1)]
            }
            What::Rtt => &[Kind::Latency],
            What::Rps => &[Kind::Requests(64)],
            What::Conn => &[Kind::Connections(16)],
            What::Storm => &[Kind::Storm(STORM_CONNECTIONS)],
            What::Idle => &[Kind::Idle(IDLE_CONNECTIONS)],
            What::Stalls => &[0, 1, 4, 20, 99].map(Kind::Stalls),
        };
        kinds.iter().copied().map(Self).collect()
    }

    /// Whether there is anything to measure on such a path: memory is the proxies'.
    #[must_use]
    pub fn measures(self, path: PathName) -> bool {
        !self.needs_fresh_proxies() || path.has_proxies()
    }

    /// Whether it looks at proxies that have not done anything yet, on a path of its own.
    #[must_use]
    pub fn needs_fresh_proxies(self) -> bool {
        matches!(self.0, Kind::Idle(_) | Kind::Stalls(_))
    }

    /// Puts the load on the path, and measures for as long as the options say.
    pub async fn run(self, path: &Path, options: &Options) -> Vec<Figure> {
        let window = options.window();
        match self.0 {
            Kind::Bulk(way, streams) => bulk(path, window, way, streams).await,
            Kind::Latency => latency(&requests(path, window, Asking::KeepAlive, 1).await),
            Kind::Requests(connections) => {
                rate(REQUESTS, &requests(path, window, Asking::KeepAlive, connections).await)
            }
            Kind::Connections(connections) => {
                rate(CONNECTIONS, &requests(path, window, Asking::Once, connections).await)
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
            Kind::Bulk(Way::Up, streams) => write!(f, "bulk x{streams}"),
            Kind::Bulk(Way::Down, streams) => write!(f, "bulk reverse x{streams}"),
            Kind::Latency => f.write_str("requests x1"),
            Kind::Requests(connections) => write!(f, "requests x{connections}"),
            Kind::Connections(connections) => write!(f, "new connections x{connections}"),
            Kind::Storm(connections) => write!(f, "storm x{connections}"),
            Kind::Idle(connections) => write!(f, "idle x{connections}"),
            Kind::Stalls(readers) => write!(f, "stalled readers x{readers}"),
        }
    }
}

pub(crate) async fn bulk(path: &Path, window: Duration, way: Way, streams: usize) -> Vec<Figure> {
    let port = if way == Way::Up { SINK } else { SOURCE };
    let traffic = Traffic::bulk(path.client(), path.target(port), way, streams);
    let counter = if way == Way::Up { path.received() } else { traffic.received.clone() };
    let bytes = || counter.load(Relaxed);
    sleep(WARM_UP).await;
    let (meter, before) = (Meter::start(path), bytes());
    sleep(window).await;
    let gigabytes = gigabytes(bytes() - before);
    let Used { seconds, cpu } = meter.read();
    traffic.stop();
    drop(traffic.latencies());
    timeout(SETTLE, path.sink_is_idle()).await.expect("what was sent arrives");
    vec![
        Figure { name: BITS, value: Some(gigabytes * 8.0 / seconds) },
        Figure { name: CPU_PER_BYTE, value: cpu.map(|cpu| cpu / gigabytes) },
    ]
}

/// What a path uses from one moment to another.
pub(crate) struct Meter<'a> {
    path: &'a Path,
    began: Instant,
    cpu: f64,
}

pub(crate) struct Used {
    pub(crate) seconds: f64,
    /// CPU seconds of what stands between the pods, if anything does.
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

#[expect(clippy::cast_precision_loss, reason = "nobody moves more than 2^53 bytes here")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// What requests took: latencies in microseconds, sorted.
pub(crate) struct Requests {
    latencies: Vec<u32>,
    seconds: f64,
    pub(crate) cpu_each: Option<f64>,
}

pub(crate) async fn requests(
    path: &Path,
    window: Duration,
    asking: Asking,
    connections: usize,
) -> Requests {
    let port = if asking == Asking::KeepAlive { ANSWER } else { ANSWER_ONCE };
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

#[expect(clippy::cast_precision_loss, reason = "nobody asks more than 2^53 times here")]
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

/// The smallest latency that `percent` of them do not exceed.
fn percentile(sorted: &[u32], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(rank).copied().map(f64::from).expect("there were requests")
}

/// So many connections at once, each for one request.
async fn burst(path: &Path, connections: usize) -> Vec<Figure> {
    let part = prepare_storm(path.client(), path.target(ANSWER_ONCE), connections);
    let meter = Meter::start(path);
    let blown = tokio::task::spawn_blocking(|| storm(part)).await;
    let storm = blown.expect("the storm met no error");
    let Used { cpu, .. } = meter.read();
    let mut latencies = storm.latencies;
    latencies.sort_unstable();
    vec![
        Figure { name: "s until the last", value: Some(storm.seconds) },
        Figure { name: MEDIAN, value: Some(percentile(&latencies, 50)) },
        Figure { name: "p99 µs", value: Some(percentile(&latencies, 99)) },
        Figure { name: "most µs", value: Some(percentile(&latencies, 100)) },
        Figure { name: CPU_EACH, value: cpu.map(|cpu| cpu * 1e6 / count(&latencies)) },
        Figure { name: "failed", value: Some(f64::from(storm.failed)) },
    ]
}

/// Resident memory of both proxies: at rest, for each of many idle connections, and after those have ended.
async fn memory(path: &Path, connections: usize) -> Vec<Figure> {
    let of_all =
        |of: fn(u32) -> f64| -> Vec<f64> { path.processes().into_iter().map(of).collect() };
    let resident = || of_all(resident_kib);
    sleep(RESTED).await;
    let at_rest = resident();
    // The tunnel, and what the first connection of all needs, is not what an idle one holds.
    let first = idle(path.client(), path.target(ANSWER), 1);
    let before = resident();
    let files = of_all(open_files);
    let held = idle(path.client(), path.target(ANSWER), connections);
    let each = f64::from(u32::try_from(connections).expect("a few thousand"));
    let during = resident();
    drop(held);
    // Tunnels may stay, of which there are fewer by far.
    let is_open = |(now, before): (&f64, &f64)| now > &(before + each / 10.0);
    let ended = async {
        while of_all(open_files).iter().zip(&files).any(is_open) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SETTLE, ended).await.expect("the proxies close what the client has closed");
    sleep(AFTERWARDS).await;
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

/// What others get while readers have stopped, and what those hold in each proxy.
async fn stalls(path: &Path, window: Duration, readers: usize) -> Vec<Figure> {
    let resident = || -> Vec<f64> { path.processes().into_iter().map(resident_kib).collect() };
    let first = idle(path.client(), path.target(ANSWER), 1);
    let before = resident();
    let held = stalled(path.client(), path.target(STALL), readers);
    let after = resident();
    let growth = |side: usize| Some((after.get(side)? - before.get(side)?) / 1024.0);
    let asked = requests(path, window, Asking::KeepAlive, 1).await;
    let moved = bulk(path, window, Way::Up, 1).await;
    drop((first, held));
    let rate = moved.first().and_then(|rate| rate.value);
    vec![
        Figure { name: "Gbit/s beside them", value: rate },
        Figure { name: MEDIAN, value: Some(percentile(&asked.latencies, 50)) },
        Figure { name: "p99 µs", value: Some(percentile(&asked.latencies, 99)) },
        Figure { name: "MiB, client's side", value: growth(0) },
        Figure { name: "MiB, server's side", value: growth(1) },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_latencies_that_occurred() {
        let sorted: Vec<u32> = (1..=100).collect();
        assert_eq!(percentile(&sorted, 50), 50.0);
        assert_eq!(percentile(&sorted, 99), 99.0);
        assert_eq!(percentile(&[7], 99), 7.0);
        assert_eq!(percentile(&[1, 2, 3], 50), 2.0);
    }
}
