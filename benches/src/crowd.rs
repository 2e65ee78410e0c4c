//! Clients by the thousand, in a process of their own.
//!
//! * A storm is so many connections at once, each for one request.
//! * A [`Crowd`] keeps its connections, and asks on one after the other of them, always with the same number of requests under way.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use underpass_interception::Namespace;

use crate::load::{Asking, PATIENCE, ask, micros};
use crate::part::{Part, ready, told};

/// How long one connection of a storm may take: its SYN may be lost and sent again, a few times.
const STORM_PATIENCE: Duration = Duration::from_secs(30);

/// How many requests of a crowd are under way at a time: the same for all crowds, or larger ones would be served in larger batches.
pub(crate) const UNDER_WAY: usize = 10;

/// What became of a storm.
#[derive(Debug)]
pub(crate) struct Storm {
    /// Until the last connection was answered, or failed.
    pub(crate) seconds: f64,
    pub(crate) failed: u32,
    /// From connecting to the answer's end, in microseconds and in no order, of those that were answered.
    pub(crate) latencies: Vec<u32>,
}

/// A process that is about to open so many connections at once.
pub(crate) fn prepare_storm(pod: &Namespace, server: SocketAddr, connections: usize) -> Part {
    Part::start(pod, &["storm".to_owned(), server.to_string(), connections.to_string()])
}

/// Has it open them, and waits for all answers.
pub(crate) fn storm(mut part: Part) -> Storm {
    part.next();
    let line = part.line();
    let mut figures = line.split_whitespace();
    let mut next = || figures.next().expect("three parts");
    let (seconds, failed) = (next().parse().expect("a time"), next().parse().expect("a number"));
    let latencies = figures.map(|figure| figure.parse().expect("a latency")).collect();
    Storm { seconds, failed, latencies }
}

pub(crate) fn run_storm(server: &str, connections: &str) {
    let server: SocketAddr = server.parse().expect("an address");
    let connections: usize = connections.parse().expect("a number");
    ready();
    assert!(told(), "the storm is wanted");
    let (began, ended) = runtime().block_on(async {
        let began = Instant::now();
        let clients: JoinSet<_> = (0..connections).map(|_| one(server)).collect();
        (began, clients.join_all().await)
    });
    let seconds = began.elapsed().as_secs_f64();
    let latencies: Vec<_> = ended.iter().flatten().map(u32::to_string).collect();
    let failed = ended.len() - latencies.len();
    say(&format!("{seconds} {failed} {}", latencies.join(" ")));
}

/// What one connection took; `None` if it failed.
async fn one(server: SocketAddr) -> Option<u32> {
    let began = Instant::now();
    let asked = timeout(STORM_PATIENCE, ask(server, Asking::Once, None)).await;
    asked.ok()?.ok()?;
    Some(micros(began))
}

/// Connections that stay open, each of which has carried a request. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Crowd(Part);

impl Crowd {
    /// Opens them.
    pub(crate) fn open(pod: &Namespace, server: SocketAddr, connections: usize) -> Self {
        let arguments = ["crowd".to_owned(), server.to_string(), connections.to_string()];
        Self(Part::start(pod, &arguments))
    }

    /// Has it ask, from the first time on; how many requests were answered so far.
    pub(crate) fn answered(&mut self) -> u64 {
        self.0.next();
        self.0.line().trim().parse().expect("a number")
    }
}

pub(crate) fn run_crowd(server: &str, connections: &str) {
    let server: SocketAddr = server.parse().expect("an address");
    let connections: usize = connections.parse().expect("a number");
    let (opened, all_opened) = mpsc::channel();
    let (go, gone) = watch::channel(false);
    let answered = Arc::new(AtomicU64::new(0));
    let counter = answered.clone();
    thread::spawn(move || runtime().block_on(crowd(server, connections, opened, gone, counter)));
    all_opened.recv().expect("the crowd met no error");
    ready();
    while told() {
        go.send(true).expect("the crowd met no error");
        say(&answered.load(Relaxed).to_string());
    }
}

async fn crowd(
    server: SocketAddr,
    connections: usize,
    opened: mpsc::Sender<()>,
    mut go: watch::Receiver<bool>,
    answered: Arc<AtomicU64>,
) {
    let askers = UNDER_WAY.min(connections);
    let share = |asker| (connections + asker) / askers;
    let opening: JoinSet<_> = (0..askers).map(|asker| open(server, share(asker))).collect();
    let shares = opening.join_all().await;
    opened.send(()).expect("the main thread waits");
    go.wait_for(|go| *go).await.expect("the main thread does not end before this one");
    let asking: JoinSet<_> =
        shares.into_iter().map(|share| turns(share, answered.clone())).collect();
    asking.join_all().await;
}

async fn open(server: SocketAddr, connections: usize) -> Vec<TcpStream> {
    let mut share = Vec::new();
    for _ in 0..connections {
        share.extend(kept(server, None).await);
    }
    share
}

/// Asks on one after the other, again and again.
async fn turns(share: Vec<TcpStream>, answered: Arc<AtomicU64>) {
    let mut share = std::collections::VecDeque::from(share);
    while let Some(stream) = share.pop_front() {
        share.extend(kept(stream.peer_addr().expect("it is connected"), Some(stream)).await);
        answered.fetch_add(1, Relaxed);
    }
}

async fn kept(server: SocketAddr, stream: Option<TcpStream>) -> Option<TcpStream> {
    let asked = timeout(PATIENCE, ask(server, Asking::KeepAlive, stream)).await;
    asked.expect("an answer comes").expect("the connection holds")
}

fn runtime() -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime starts")
}

fn say(line: &str) {
    let mut stdout = io::stdout();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).expect("the parent listens");
}
