//! The soak: streams of every shape on every path while everything goes wrong that can, and nothing may be lost, be made up, or stay.
//!
//! In reading order: `plan` is what a stream does, `stream` does it and looks at every byte, `scene` is where, `faults` is what goes
//! wrong, and `rest` is what is left when all is over. Judged is
//!
//! * always: whatever is received is what was sent, from the first byte on, and who reads a FIN has read all of it;
//! * of streams that no fault may have broken: that they do what they planned, at both ends;
//! * of all: that they end;
//! * in the end: that the proxies and their pods hold what they held before.
//!
//! Not here: `examples/soak.rs` runs it for as long as it is told, `tests/soak.rs` for a few seconds.

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
use self::rest::{Held, settled};
use self::scene::{PORTS, Pods, Stage, Way};
use self::stream::Ended;
use crate::peers::{Dial, Server, socket};

/// No stream takes so long, whatever happens to it.
const LONGEST: Duration = Duration::from_secs(120);
/// How long after a fault it may still show: retransmissions and probes are seconds apart by then.
const AFTERMATH: Duration = Duration::from_secs(15);
/// How long a proxy may hold against a peer that it was away, and a second.
const BACK_OFF: Duration = Duration::from_secs(3);
/// How long an application takes to connect at most.
const CONNECT: Duration = Duration::from_secs(40);
/// How long what is over may still be seen.
const SETTLE: Duration = Duration::from_secs(60);
/// The same for conntrack, which keeps a connection that ended in an unusual way for two minutes.
const FORGET: Duration = Duration::from_secs(150);

/// What is to be done.
#[derive(Debug, Clone)]
pub struct SoakOptions {
    /// For how long streams and faults begin.
    pub length: Duration,
    /// All that is random follows from it, but for the order in which things happen.
    pub seed: u64,
    /// How many streams there are at a time.
    pub connections: usize,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// Whether to wait for conntrack to forget.
    pub patient: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct SoakSummary {
    seed: u64,
    streams: u64,
    bytes: u64,
    well: u64,
    planned_resets: u64,
    /// Streams that a fault has broken, by its kind.
    broken: BTreeMap<&'static str, u64>,
    happened: BTreeMap<&'static str, u64>,
    held_before: [Held; 2],
    held_after: [Held; 2],
    /// What must not have been.
    pub violations: Vec<String>,
}

/// What all streams share.
#[derive(Debug)]
struct Course {
    pods: Arc<Pods>,
    summary: Mutex<SoakSummary>,
    /// What happened, and when it was over.
    faults: Mutex<Vec<(Event, Instant, Option<Instant>)>>,
    served: Mutex<HashMap<u64, Ended>>,
}

/// Runs it in the sandbox that the process is in.
pub async fn soak(options: &SoakOptions) -> SoakSummary {
    let mut stage = Stage::new().await;
    let summary = SoakSummary { seed: options.seed, ..SoakSummary::default() };
    let course = Arc::new(Course {
        pods: stage.pods.clone(),
        summary: Mutex::new(summary),
        faults: Mutex::default(),
        served: Mutex::default(),
    });
    let servers = course.serve();
    // Warm-up: what a proxy holds once it has done everything before.
    let mut rng = Rng::with_seed(options.seed);
    let calm = options.length.min(Duration::from_secs(3)) / 3;
    course.clone().streams(rng.fork(), options.connections, calm).await;
    let before = settled(
        &stage,
        |held| held.iter().all(|held| held.open < 0.5 && held.tunnels < 0.5),
        SETTLE,
    )
    .await;
    let streams = course.clone().streams(rng.fork(), options.connections, options.length);
    tokio::join!(streams, course.disturb(rng.fork(), options, &mut stage));
    let is_back = |held: [Held; 2]| {
        held.iter().zip(&before).all(|(now, before)| now.excess(before, options.patient).is_empty())
    };
    if timeout(SETTLE, stage.others_ended()).await.is_err() {
        course.violation("a proxy that was taken over from has not ended".to_owned());
    }
    let patience = if options.patient { FORGET } else { SETTLE };
    let after = settled(&stage, is_back, patience).await;
    drop(servers);
    for (now, (was, (pod, _))) in after.iter().zip(before.iter().zip(stage.proxies())) {
        for excess in now.excess(was, options.patient) {
            course.violation(format!("at rest, {}: {excess}", pod.name()));
        }
    }
    if !course.summary().violations.is_empty() {
        stage.keep_logs();
    }
    let mut summary = std::mem::take(&mut *course.summary());
    (summary.held_before, summary.held_after) = (before, after);
    summary
}

impl Course {
    /// Applications in every pod.
    fn serve(self: &Arc<Self>) -> Vec<Server> {
        let pods = self.pods.all();
        let places = pods.into_iter().flat_map(|pod| PORTS.map(|port| (pod, port)));
        let serve = |(pod, port)| {
            let course = self.clone();
            Server::start(pod, port, move |stream, _| {
                let course = course.clone();
                async move {
                    probed(&stream)?;
                    if let Some((seed, ended)) = stream::server(stream).await {
                        course.served(seed, ended);
                    }
                    Ok(())
                }
            })
        };
        places.map(serve).collect()
    }

    /// Keeps so many streams going for so long, and waits for the last to end.
    async fn streams(self: Arc<Self>, mut rng: Rng, connections: usize, length: Duration) {
        let end = Instant::now() + length;
        let mut streams = JoinSet::new();
        while Instant::now() < end && self.summary().violations.is_empty() {
            while streams.len() < connections {
                let (course, plan, way) =
                    (self.clone(), Plan::new(rng.u64(..)), Way::new(&mut rng));
                // Not all at once.
                let begin = Duration::from_millis(rng.u64(0..500));
                streams.spawn(async move {
                    pause(begin).await;
                    course.stream(plan, way).await;
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

    async fn stream(&self, plan: Plan, way: Way) {
        let began = Instant::now();
        let ended = match timeout(LONGEST, self.attempt(&plan, way)).await {
            Ok(ended) => ended,
            Err(_) => Ended::Lie(format!("it has not ended after {LONGEST:?}")),
        };
        let told = format!("{:?} from {:?}, {plan:?}, {way:?}", ended, began.elapsed());
        let mut server = None;
        if ended == Ended::Well && plan.kind != Kind::Unused {
            server = self.server_of(plan.seed).await;
        }
        // Only now: what the client has sent may be on its way still when all is over for it.
        let fault = self.touched(way, began);
        let mut summary = self.summary();
        summary.streams += 1;
        match (&ended, server) {
            (Ended::Lie(_), _) => summary.violations.push(told),
            (Ended::Well, Some(Ended::Well)) => {
                summary.well += 1;
                summary.bytes += plan.up + plan.down;
            }
            (Ended::Well, None) if plan.kind == Kind::Unused => summary.well += 1,
            _ if !plan.ends_well() => summary.planned_resets += 1,
            (_, server) => match fault {
                Some(fault) => *summary.broken.entry(fault.name()).or_default() += 1,
                None => summary
                    .violations
                    .push(format!("broken by nothing: {told}; its server: {server:?}")),
            },
        }
    }

    async fn attempt(&self, plan: &Plan, way: Way) -> Ended {
        let (pod, to) = self.pods.dial(way);
        let connect = async {
            let socket = pod.run(|| socket(to, Dial::default()))?;
            let stream = TcpSocket::from_std_stream(socket.into()).connect(to).await?;
            probed(&stream)?;
            io::Result::Ok(stream)
        };
        match timeout(CONNECT, connect).await {
            Ok(Ok(stream)) => stream::client(plan, stream).await,
            Ok(Err(error)) => Ended::Broken(error.kind()),
            Err(_) => Ended::Broken(io::ErrorKind::TimedOut),
        }
    }

    /// How the server's end of a stream ended that ended well for its client; it may have much to read yet.
    async fn server_of(&self, seed: u64) -> Option<Ended> {
        let began = Instant::now();
        while began.elapsed() < LONGEST {
            if let Some(ended) = self.lock(&self.served).remove(&seed) {
                return Some(ended);
            }
            pause(Duration::from_millis(10)).await;
        }
        None
    }

    fn served(&self, seed: u64, ended: Ended) {
        if let Ended::Lie(lie) = &ended {
            self.violation(format!("at the server: {lie}, {:?}", Plan::new(seed)));
        }
        self.lock(&self.served).insert(seed, ended);
    }

    /// One fault after the other.
    async fn disturb(&self, mut rng: Rng, options: &SoakOptions, stage: &mut Stage) {
        let end = Instant::now() + options.length;
        while !options.faults.is_empty() && self.summary().violations.is_empty() {
            pause(Duration::from_millis(rng.u64(100..2000))).await;
            if Instant::now() > end {
                break;
            }
            let event = Event::new(&mut rng, &options.faults);
            let mine = {
                let mut faults = self.lock(&self.faults);
                faults.push((event, Instant::now(), None));
                faults.len() - 1
            };
            event.happen(stage).await;
            if let Some((.., over)) = self.lock(&self.faults).get_mut(mine) {
                *over = Some(Instant::now());
            }
            *self.summary().happened.entry(event.fault.name()).or_default() += 1;
        }
    }

    /// What may have broken a stream that goes this way and began then.
    fn touched(&self, way: Way, began: Instant) -> Option<Fault> {
        let faults = self.lock(&self.faults);
        let mut touching = faults.iter().rev().filter(|(event, _, over)| {
            let late = if event.fault == Fault::Drop { AFTERMATH } else { BACK_OFF };
            event.touches(way) && over.is_none_or(|over| over + late > began)
        });
        touching.next().map(|(event, ..)| event.fault)
    }

    fn violation(&self, what: String) {
        self.summary().violations.push(what);
    }

    fn summary(&self) -> MutexGuard<'_, SoakSummary> {
        self.lock(&self.summary)
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().expect("nothing panics with it")
    }
}

impl Held {
    /// What is more than it was `before`.
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
        // The allocator keeps some of what was used.
        compare("KiB resident", self.resident, before.resident * 3 / 2 + (32 << 10));
        if self.open > 0.5 || self.tunnels > 0.5 {
            excess.push(format!("{} connections and {} tunnels open", self.open, self.tunnels));
        }
        if !self.rules_intact {
            excess.push("its rules are not intact".to_owned());
        }
        excess
    }
}

impl SoakSummary {
    /// One line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let map = |map: &BTreeMap<&str, u64>| {
            let entries: Vec<_> =
                map.iter().map(|(key, count)| format!("\"{key}\":{count}")).collect();
            format!("{{{}}}", entries.join(","))
        };
        let held = |held: &Held| {
            format!(
                "{{\"descriptors\":{},\"sockets\":{},\"tracked\":{},\"resident_kib\":{}}}",
                held.descriptors, held.sockets, held.tracked, held.resident
            )
        };
        let [client_before, server_before] = self.held_before.each_ref().map(held);
        let [client_after, server_after] = self.held_after.each_ref().map(held);
        format!(
            "{{\"seed\":{},\"streams\":{},\"bytes\":{},\"well\":{},\"planned_resets\":{},\"broken\":{},\"faults\":{},\
             \"before\":[{client_before},{server_before}],\"after\":[{client_after},{server_after}],\"violations\":{}}}",
            self.seed,
            self.streams,
            self.bytes,
            self.well,
            self.planned_resets,
            map(&self.broken),
            map(&self.happened),
            self.violations.len()
        )
    }
}

/// A table for people, and what must not have been.
impl fmt::Display for SoakSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, streams, well, planned_resets, bytes, .. } = self;
        writeln!(f, "seed {seed}: {streams} streams, {} MiB", bytes >> 20)?;
        writeln!(f, "  {well} ended well, {planned_resets} by a reset as planned")?;
        writeln!(f, "  | fault | happened | streams that it may have broken |\n  |---|---:|---:|")?;
        for (fault, count) in &self.happened {
            let broken = self.broken.get(fault).copied().unwrap_or_default();
            writeln!(f, "  | {fault} | {count} | {broken} |")?;
        }
        writeln!(
            f,
            "  | at rest | descriptors | sockets | tracked | resident, KiB |\n  |---|---:|---:|---:|---:|"
        )?;
        let rows = [("before", &self.held_before), ("after", &self.held_after)];
        for (when, held) in rows {
            for (side, held) in ["client", "server"].iter().zip(held) {
                let Held { descriptors, sockets, tracked, resident, .. } = held;
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

/// An application that wants to know whether its peer is still there.
fn probed(stream: &TcpStream) -> io::Result<()> {
    let probes = socket2::TcpKeepalive::new().with_time(Duration::from_secs(2));
    let probes = probes.with_interval(Duration::from_secs(2)).with_retries(5);
    socket2::SockRef::from(stream).set_tcp_keepalive(&probes)
}

/// Nothing happens for so long: a pause is part of what a stream or a fault does, or comes between two looks. Nothing is taken to have
/// happened in it.
async fn pause(length: Duration) {
    let _elapsed = timeout(length, pending::<()>()).await;
}
