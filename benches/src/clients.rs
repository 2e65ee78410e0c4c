//! Thousands of clients in a child process.
//!
//! * A storm opens many connections at once, each for one request.
//! * A [`ClientSet`] holds connections and sends requests on them in rotation, with a constant
//!   number of requests in flight.

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

use crate::child_process::{ChildProcess, ready, wait_for_parent};
use crate::load::{OPERATION_TIMEOUT, RequestMode, micros, send_request};

/// Timeout of a connection of a storm. It allows several retransmissions of the SYN.
const STORM_TIMEOUT: Duration = Duration::from_secs(30);

/// The number of requests in flight of a [`ClientSet`]. It does not depend on the number of
/// connections, because proxies would serve more requests in larger batches.
pub(crate) const IN_FLIGHT: usize = 10;

/// The result of a storm.
#[derive(Debug)]
pub(crate) struct Storm {
    /// The time until the last connection was answered or failed.
    pub(crate) seconds: f64,
    pub(crate) failed: u32,
    /// The latencies of successful requests, from the connect to the end of the answer, in
    /// microseconds, unsorted.
    pub(crate) latencies: Vec<u32>,
}

/// Starts a child process for a storm with this number of connections.
pub(crate) fn prepare_storm(
    pod: &Namespace,
    server: SocketAddr,
    connections: usize,
) -> ChildProcess {
    ChildProcess::start(pod, &["storm".to_owned(), server.to_string(), connections.to_string()])
}

/// Runs the storm, and waits for all answers.
pub(crate) fn storm(mut child_process: ChildProcess) -> Storm {
    child_process.next();
    let line = child_process.line();
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
    assert!(wait_for_parent(), "the parent starts the storm");
    let (began, results) = runtime().block_on(async {
        let began = Instant::now();
        let clients: JoinSet<_> = (0..connections).map(|_| storm_client(server)).collect();
        (began, clients.join_all().await)
    });
    let seconds = began.elapsed().as_secs_f64();
    let latencies: Vec<_> = results.iter().flatten().map(u32::to_string).collect();
    let failed = results.len() - latencies.len();
    print_line(&format!("{seconds} {failed} {}", latencies.join(" ")));
}

/// Sends one request on a new connection. Returns its latency in microseconds, or `None` if it
/// failed.
async fn storm_client(server: SocketAddr) -> Option<u32> {
    let began = Instant::now();
    let result = timeout(STORM_TIMEOUT, send_request(server, RequestMode::Once, None)).await;
    result.ok()?.ok()?;
    Some(micros(began))
}

/// Open connections, each of which has carried a request. Dropping the set closes them.
#[derive(Debug)]
pub(crate) struct ClientSet(ChildProcess);

impl ClientSet {
    /// Opens the connections.
    pub(crate) fn open(pod: &Namespace, server: SocketAddr, connections: usize) -> Self {
        let arguments = ["clients".to_owned(), server.to_string(), connections.to_string()];
        Self(ChildProcess::start(pod, &arguments))
    }

    /// Starts sending requests on the first call. Returns the number of answers so far.
    pub(crate) fn answered(&mut self) -> u64 {
        self.0.next();
        self.0.line().trim().parse().expect("a number")
    }
}

pub(crate) fn run_client_set(server: &str, connections: &str) {
    let server: SocketAddr = server.parse().expect("an address");
    let connections: usize = connections.parse().expect("a number");
    let (opened, all_opened) = mpsc::channel();
    let (go, go_receiver) = watch::channel(false);
    let answered = Arc::new(AtomicU64::new(0));
    let counter = answered.clone();
    thread::spawn(move || {
        runtime().block_on(client_set(server, connections, opened, go_receiver, counter))
    });
    all_opened.recv().expect("the clients had no error");
    ready();
    while wait_for_parent() {
        go.send(true).expect("the clients had no error");
        print_line(&answered.load(Relaxed).to_string());
    }
}

async fn client_set(
    server: SocketAddr,
    connections: usize,
    opened: mpsc::Sender<()>,
    mut go: watch::Receiver<bool>,
    answered: Arc<AtomicU64>,
) {
    let tasks = IN_FLIGHT.min(connections);
    let share = |task| (connections + task) / tasks;
    let opening: JoinSet<_> = (0..tasks).map(|task| open(server, share(task))).collect();
    let shares = opening.join_all().await;
    opened.send(()).expect("the main thread waits");
    go.wait_for(|go| *go).await.expect("the main thread does not end before this one");
    let clients: JoinSet<_> =
        shares.into_iter().map(|share| request_in_rotation(share, answered.clone())).collect();
    clients.join_all().await;
}

async fn open(server: SocketAddr, connections: usize) -> Vec<TcpStream> {
    let mut share = Vec::new();
    for _ in 0..connections {
        share.extend(request_on(server, None).await);
    }
    share
}

/// Sends requests on the connections in rotation.
async fn request_in_rotation(share: Vec<TcpStream>, answered: Arc<AtomicU64>) {
    let mut share = std::collections::VecDeque::from(share);
    while let Some(stream) = share.pop_front() {
        share.extend(request_on(stream.peer_addr().expect("it is connected"), Some(stream)).await);
        answered.fetch_add(1, Relaxed);
    }
}

async fn request_on(server: SocketAddr, stream: Option<TcpStream>) -> Option<TcpStream> {
    let result =
        timeout(OPERATION_TIMEOUT, send_request(server, RequestMode::KeepAlive, stream)).await;
    result.expect("an answer arrives").expect("the connection holds")
}

fn runtime() -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime starts")
}

fn print_line(line: &str) {
    let mut stdout = io::stdout();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).expect("the parent listens");
}
