//! The soak test: many streams on all paths during faults. No data may be lost, altered or leaked.
//!
//! In reading order: `plan` defines a stream, `stream` executes it and checks every byte, `scene`
//! sets up pods and proxies, `faults` injects faults, and `rest` measures the resources at the end.
//! The test checks that
//!
//! * received data equals the sent data, and a FIN means that everything was received;
//! * streams that no fault can have broken follow their plan at both ends;
//! * every stream ends;
//! * in the end, proxies and pods hold the same resources as before.
//!
//! `examples/soak.rs` runs it for minutes, `tests/soak.rs` for a few seconds.

mod faults;
mod plan;
mod rest;
mod scene;
mod stream;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::future::pending;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fastrand::Rng;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use self::faults::Event;
pub use self::faults::Fault;
use self::plan::{Kind, Plan};
use self::rest::{Resources, settled};
use self::scene::{PORTS, Pods, Route, SoakScene};
use self::stream::Ended;
use crate::peers::{Dial, Server, socket};

const STREAM_TIMEOUT: Duration = Duration::from_secs(120);
/// The time after a fault in which streams may still break, because retransmissions are seconds
/// apart.
const FAULT_TAIL: Duration = Duration::from_secs(15);
/// The maximum back-off of a proxy after a failed connection, plus a second.
const MAX_BACKOFF: Duration = Duration::from_secs(3);
/// Timeout for the TCP connect of an application.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(40);
/// Timeout for the release of resources after the last stream.
const REST_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for conntrack's entries, because conntrack keeps an aborted connection for two minutes.
const CONNTRACK_TIMEOUT: Duration = Duration::from_secs(150);

/// Options of a soak test.
#[derive(Debug, Clone)]
pub struct SoakOptions {
    /// The time during which streams and faults are started.
    pub length: Duration,
    /// The seed of all random choices. Only timing is not reproducible.
    pub seed: u64,
    /// The number of concurrent streams.
    pub connections: usize,
    /// The kinds of faults.
    pub faults: Vec<Fault>,
    /// Whether to wait until conntrack has removed ended connections.
    pub wait_for_conntrack: bool,
}

/// The result of a soak test.
#[derive(Debug, Default)]
pub struct SoakSummary {
    seed: u64,
    streams: u64,
    bytes: u64,
    well: u64,
    planned_resets: u64,
    /// The number of streams that each kind of fault may have broken.
    broken: BTreeMap<&'static str, u64>,
    fault_counts: BTreeMap<&'static str, u64>,
    resources_before: [Resources; 2],
    resources_after: [Resources; 2],
    /// Violations of the invariants.
    pub violations: Vec<String>,
}

/// The state that all streams share.
#[derive(Debug)]
struct SoakRun {
    pods: Arc<Pods>,
    summary: Mutex<SoakSummary>,
    /// The faults, with their start and end.
    faults: Mutex<Vec<(Event, Instant, Option<Instant>)>>,
    served: Mutex<HashMap<u64, Ended>>,
}

/// Runs the soak test in the current sandbox.
pub async fn soak(options: &SoakOptions) -> SoakSummary {
    let mut scene = SoakScene::new().await;
    let summary = SoakSummary { seed: options.seed, ..SoakSummary::default() };
    let run = Arc::new(SoakRun {
        pods: scene.pods.clone(),
        summary: Mutex::new(summary),
        faults: Mutex::default(),
        served: Mutex::default(),
    });
    let servers = run.serve();
    // Warm-up: the baseline is a proxy that has used every path once.
    let mut rng = Rng::with_seed(options.seed);
    let calm = options.length.min(Duration::from_secs(3)) / 3;
    run.clone().streams(rng.fork(), options.connections, calm).await;
    let before = settled(
        &scene,
        |held| held.iter().all(|held| held.open < 0.5 && held.tunnels < 0.5),
        REST_TIMEOUT,
    )
    .await;
    let streams = run.clone().streams(rng.fork(), options.connections, options.length);
    tokio::join!(streams, run.inject_faults(rng.fork(), options, &mut scene));
    let is_at_rest = |held: [Resources; 2]| {
        held.iter()
            .zip(&before)
            .all(|(now, before)| now.excess(before, options.wait_for_conntrack).is_empty())
    };
    if timeout(REST_TIMEOUT, scene.await_outgoing()).await.is_err() {
        run.violation("a proxy did not exit after the takeover".to_owned());
    }
    let rest_timeout = if options.wait_for_conntrack { CONNTRACK_TIMEOUT } else { REST_TIMEOUT };
    let after = settled(&scene, is_at_rest, rest_timeout).await;
    drop(servers);
    for (now, (was, (pod, _))) in after.iter().zip(before.iter().zip(scene.proxies())) {
        for excess in now.excess(was, options.wait_for_conntrack) {
            run.violation(format!("at rest, {}: {excess}", pod.name()));
        }
    }
    if !run.summary().violations.is_empty() {
        scene.keep_logs();
    }
    let mut summary = std::mem::take(&mut *run.summary());
    (summary.resources_before, summary.resources_after) = (before, after);
    summary
}

impl SoakRun {
    /// Starts the applications in every pod.
    fn serve(self: &Arc<Self>) -> Vec<Server> {
        let pods = self.pods.all();
        let places = pods.into_iter().flat_map(|pod| PORTS.map(|port| (pod, port)));
        let serve = |(pod, port)| {
            let run = self.clone();
            Server::start(pod, port, move |stream, _| {
                let run = run.clone();
                async move {
                    enable_keepalive(&stream)?;
                    if let Some((seed, ended)) = stream::server(stream).await {
                        run.served(seed, ended);
                    }
                    Ok(())
                }
            })
        };
        places.map(serve).collect()
    }

    /// Keeps `connections` streams open for `length`, and waits for the last one.
    async fn streams(self: Arc<Self>, mut rng: Rng, connections: usize, length: Duration) {
        let end = Instant::now() + length;
        let mut streams = JoinSet::new();
        while Instant::now() < end && self.summary().violations.is_empty() {
            while streams.len() < connections {
                let (run, plan, route) =
                    (self.clone(), Plan::new(rng.u64(..)), Route::new(&mut rng));
                // Spread the start of streams.
                let begin = Duration::from_millis(rng.u64(0..500));
                streams.spawn(async move {
                    pause(begin).await;
                    run.stream(plan, route).await;
                });
            }
            let next = timeout(Duration::from_millis(100), streams.join_next()).await;
            if let Ok(Some(Err(failed))) = next {
                self.violation(failed.to_string());
            }
        }
        while let Some(ended) = streams.join_next().await {
            if let Err(failed) = ended {
                self.violation(failed.to_string());
            }
        }
    }

    async fn stream(&self, plan: Plan, route: Route) {
        let began = Instant::now();
        let ended = match timeout(STREAM_TIMEOUT, self.attempt(&plan, route)).await {
            Ok(ended) => ended,
            Err(_) => Ended::Violation(format!("timed out after {STREAM_TIMEOUT:?}")),
        };
        let description = format!("{:?} from {:?}, {plan:?}, {route:?}", ended, began.elapsed());
        let mut server = None;
        if ended == Ended::Well && plan.kind != Kind::Unused {
            server = self.server_of(plan.seed).await;
        }
        // Determine this after the server's end: data from the client may arrive after the client
        // has ended.
        let fault = self.affecting_fault(route, began);
        let mut summary = self.summary();
        summary.streams += 1;
        match (&ended, server) {
            (Ended::Violation(_), _) => summary.violations.push(description),
            (Ended::Well, Some(Ended::Well)) => {
                summary.well += 1;
                summary.bytes += plan.up + plan.down;
            }
            (Ended::Well, None) if plan.kind == Kind::Unused => summary.well += 1,
            _ if !plan.ends_with_fin() => summary.planned_resets += 1,
            (_, server) => match fault {
                Some(fault) => *summary.broken.entry(fault.name()).or_default() += 1,
                None => summary
                    .violations
                    .push(format!("broken without a fault: {description}; its server: {server:?}")),
            },
        }
    }

    async fn attempt(&self, plan: &Plan, route: Route) -> Ended {
        let (pod, to) = self.pods.dial(route);
        let connect = async {
            let socket = pod.run(|| socket(to, Dial::default()))?;
            let stream = TcpSocket::from_std_stream(socket.into()).connect(to).await?;
            enable_keepalive(&stream)?;
            io::Result::Ok(stream)
        };
        match timeout(CONNECT_TIMEOUT, connect).await {
            Ok(Ok(stream)) => stream::client(plan, stream).await,
            Ok(Err(error)) => Ended::Broken(error.kind()),
            Err(_) => Ended::Broken(io::ErrorKind::TimedOut),
        }
    }

    /// The end of a stream for its server. It may still have data to read after the client has
    /// ended.
    async fn server_of(&self, seed: u64) -> Option<Ended> {
        let began = Instant::now();
        while began.elapsed() < STREAM_TIMEOUT {
            if let Some(ended) = self.lock(&self.served).remove(&seed) {
                return Some(ended);
            }
            pause(Duration::from_millis(10)).await;
        }
        None
    }

    fn served(&self, seed: u64, ended: Ended) {
        if let Ended::Violation(violation) = &ended {
            self.violation(format!("at the server: {violation}, {:?}", Plan::new(seed)));
        }
        self.lock(&self.served).insert(seed, ended);
    }

    /// Injects one fault after another.
    async fn inject_faults(&self, mut rng: Rng, options: &SoakOptions, scene: &mut SoakScene) {
        let end = Instant::now() + options.length;
        while !options.faults.is_empty() && self.summary().violations.is_empty() {
            pause(Duration::from_millis(rng.u64(100..2000))).await;
            if Instant::now() > end {
                break;
            }
            let event = Event::new(&mut rng, &options.faults);
            let index = {
                let mut faults = self.lock(&self.faults);
                faults.push((event, Instant::now(), None));
                faults.len() - 1
            };
            event.inject(scene).await;
            if let Some((.., over)) = self.lock(&self.faults).get_mut(index) {
                *over = Some(Instant::now());
            }
            *self.summary().fault_counts.entry(event.fault.name()).or_default() += 1;
        }
    }

    /// The fault that may have broken a stream on this route that started at `began`.
    fn affecting_fault(&self, route: Route, began: Instant) -> Option<Fault> {
        let faults = self.lock(&self.faults);
        let mut affecting = faults.iter().rev().filter(|(event, _, over)| {
            let late = if event.fault == Fault::Drop { FAULT_TAIL } else { MAX_BACKOFF };
            event.affects(route) && over.is_none_or(|over| over + late > began)
        });
        affecting.next().map(|(event, ..)| event.fault)
    }

    fn violation(&self, what: String) {
        self.summary().violations.push(what);
    }

    fn summary(&self) -> MutexGuard<'_, SoakSummary> {
        self.lock(&self.summary)
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().expect("no holder panics")
    }
}

impl Resources {
    /// The resources that exceed those in `before`.
    fn excess(&self, before: &Self, tracked: bool) -> Vec<String> {
        let mut excess = Vec::new();
        let mut compare = |what: &str, now: usize, allowed: usize| {
            if now > allowed {
                excess.push(format!("{now} {what}, at most {allowed} expected"));
            }
        };
        compare("descriptors", self.descriptors, before.descriptors);
        compare("sockets", self.sockets, before.sockets);
        if tracked {
            compare("tracked connections", self.tracked, before.tracked);
        }
        // The allocator keeps some freed memory.
        compare("KiB resident", self.resident, before.resident * 3 / 2 + (32 << 10));
        if self.open > 0.5 || self.tunnels > 0.5 {
            excess.push(format!("{} connections and {} tunnels open", self.open, self.tunnels));
        }
        if !self.rules_intact {
            excess.push("the rules are not intact".to_owned());
        }
        excess
    }
}

impl SoakSummary {
    /// The result as one line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let map = |map: &BTreeMap<&str, u64>| {
            let entries: Vec<_> =
                map.iter().map(|(key, count)| format!("\"{key}\":{count}")).collect();
            format!("{{{}}}", entries.join(","))
        };
        let held = |held: &Resources| {
            format!(
                "{{\"descriptors\":{},\"sockets\":{},\"tracked\":{},\"resident_kib\":{}}}",
                held.descriptors, held.sockets, held.tracked, held.resident
            )
        };
        let [client_before, server_before] = self.resources_before.each_ref().map(held);
        let [client_after, server_after] = self.resources_after.each_ref().map(held);
        format!(
            "{{\"seed\":{},\"streams\":{},\"bytes\":{},\"well\":{},\"planned_resets\":{},\"broken\":{},\"faults\":{},\
             \"before\":[{client_before},{server_before}],\"after\":[{client_after},{server_after}],\"violations\":{}}}",
            self.seed,
            self.streams,
            self.bytes,
            self.well,
            self.planned_resets,
            map(&self.broken),
            map(&self.fault_counts),
            self.violations.len()
        )
    }
}

/// Formats a table and the violations.
impl fmt::Display for SoakSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, streams, well, planned_resets, bytes, .. } = self;
        writeln!(f, "seed {seed}: {streams} streams, {} MiB", bytes >> 20)?;
        writeln!(f, "  {well} ended well, {planned_resets} with a planned reset")?;
        writeln!(f, "  | fault | happened | possibly broken streams |\n  |---|---:|---:|")?;
        for (fault, count) in &self.fault_counts {
            let broken = self.broken.get(fault).copied().unwrap_or_default();
            writeln!(f, "  | {fault} | {count} | {broken} |")?;
        }
        writeln!(
            f,
            "  | at rest | descriptors | sockets | tracked | resident, KiB |\n  |---|---:|---:|---:|---:|"
        )?;
        let rows = [("before", &self.resources_before), ("after", &self.resources_after)];
        for (when, held) in rows {
            for (side, held) in ["client", "server"].iter().zip(held) {
                let Resources { descriptors, sockets, tracked, resident, .. } = held;
                writeln!(
                    f,
                    "  | {when}, {side} | {descriptors} | {sockets} | {tracked} | {resident} |"
                )?;
            }
        }
        self.violations
            .iter()
            .take(10)
            .try_for_each(|violation| writeln!(f, "  WRONG: {violation}"))
    }
}

/// Enables TCP keepalive, so that an application detects a lost peer.
fn enable_keepalive(stream: &TcpStream) -> io::Result<()> {
    let probes = socket2::TcpKeepalive::new().with_time(Duration::from_secs(2));
    let probes = probes.with_interval(Duration::from_secs(2)).with_retries(5);
    socket2::SockRef::from(stream).set_tcp_keepalive(&probes)
}

/// Waits for a fixed time, which is part of a stream or a fault, or separates two checks. It must
/// not wait for an event.
async fn pause(length: Duration) {
    let _elapsed = timeout(length, pending::<()>()).await;
}
