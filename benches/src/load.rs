//! The client of every load, in pod-a: traffic that runs until it is stopped.
//!
//! Bulk uses a blocking thread per stream. Requests of all connections share one thread with one
//! epoll loop, which leaves the CPUs to the proxies.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use underpass_interception::Namespace;

use crate::server::{BLOCK, MESSAGE};

/// The timeout of every operation.
pub(crate) const OPERATION_TIMEOUT: Duration = Duration::from_secs(10);
/// The time without progress after which a connection counts as full.
const FULL_AFTER: Duration = Duration::from_millis(500);

const WARMING_UP: u8 = 0;
const MEASURING: u8 = 1;
const STOPPING: u8 = 2;

/// The direction of bulk, seen from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BulkDirection {
    Up,
    Down,
}

/// How requests use connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestMode {
    /// One connection carries all requests of a client.
    KeepAlive,
    /// Every request has a new connection, which the server closes.
    Once,
}

/// Traffic from a pod that flows until it is stopped.
#[derive(Debug)]
pub struct Traffic {
    phase: Arc<AtomicU8>,
    /// The number of received bytes.
    pub(crate) received: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<u32>>>,
}

impl Traffic {
    pub(crate) fn bulk(
        pod: &Namespace,
        server: SocketAddr,
        direction: BulkDirection,
        streams: usize,
    ) -> Self {
        let mut traffic = Self::new();
        for _ in 0..streams {
            let (phase, received) = (traffic.phase.clone(), traffic.received.clone());
            traffic.threads.push(spawn(pod, move || {
                let stream = connect(server);
                match direction {
                    BulkDirection::Up => write_until_stopped(stream, &phase),
                    BulkDirection::Down => read_until_stopped(stream, &phase, &received),
                }
                Vec::new()
            }));
        }
        traffic
    }

    /// Sends requests on this number of concurrent connections.
    #[must_use]
    pub fn requests(
        pod: &Namespace,
        server: SocketAddr,
        mode: RequestMode,
        connections: usize,
    ) -> Self {
        let mut traffic = Self::new();
        let phase = traffic.phase.clone();
        traffic.threads.push(spawn(pod, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime starts").block_on(async {
                let client = |_| client(server, mode, phase.clone());
                let clients: JoinSet<_> = (0..connections).map(client).collect();
                clients.join_all().await.concat()
            })
        }));
        traffic
    }

    fn new() -> Self {
        let phase = Arc::new(AtomicU8::new(WARMING_UP));
        Self { phase, received: Arc::default(), threads: Vec::new() }
    }

    /// Starts recording latencies.
    pub fn measure(&self) {
        self.phase.store(MEASURING, Relaxed);
    }

    /// Stops recording latencies and ends the traffic.
    pub fn stop(&self) {
        self.phase.store(STOPPING, Relaxed);
    }

    /// The recorded latencies in microseconds, unsorted, once all traffic has ended.
    ///
    /// # Panics
    /// The traffic had an error.
    #[must_use]
    pub fn latencies(self) -> Vec<u32> {
        let join = |thread: JoinHandle<_>| thread.join().expect("the load met no error");
        self.threads.into_iter().flat_map(join).collect()
    }
}

/// Idle connections that have carried one request each.
pub(crate) fn idle(pod: &Namespace, server: SocketAddr, connections: usize) -> Vec<TcpStream> {
    let open = |_| {
        let mut stream = connect(server);
        let mut message = [0; MESSAGE];
        stream.write_all(&message).expect("the request is sent");
        stream.read_exact(&mut message).expect("the request is answered");
        stream
    };
    pod.run(|| (0..connections).map(open).collect()).expect("the pod can be entered")
}

/// Connections to a server that does not read, filled until they block.
pub(crate) fn stalled(pod: &Namespace, server: SocketAddr, connections: usize) -> Vec<TcpStream> {
    let threads: Vec<_> = (0..connections).map(|_| spawn(pod, move || fill(server))).collect();
    threads.into_iter().map(|thread| thread.join().expect("it met no error")).collect()
}

fn fill(server: SocketAddr) -> TcpStream {
    let mut stream = connect(server);
    stream.set_write_timeout(Some(FULL_AFTER)).expect("SO_SNDTIMEO");
    let block = vec![0; BLOCK];
    while stream.write(&block).is_ok() {}
    stream
}

/// Starts a thread in the pod.
fn spawn<T: Send + 'static>(
    pod: &Namespace,
    run: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    pod.run(|| thread::spawn(run)).expect("the pod can be entered")
}

fn connect(server: SocketAddr) -> TcpStream {
    let stream =
        TcpStream::connect_timeout(&server, OPERATION_TIMEOUT).expect("the server can be reached");
    stream.set_read_timeout(Some(OPERATION_TIMEOUT)).expect("SO_RCVTIMEO");
    stream.set_write_timeout(Some(OPERATION_TIMEOUT)).expect("SO_SNDTIMEO");
    stream
}

fn write_until_stopped(mut stream: TcpStream, phase: &AtomicU8) {
    let block = vec![0; BLOCK];
    while phase.load(Relaxed) != STOPPING {
        stream.write_all(&block).expect("the server reads");
    }
}

fn read_until_stopped(mut stream: TcpStream, phase: &AtomicU8, received: &AtomicU64) {
    let mut buffer = vec![0; BLOCK];
    while phase.load(Relaxed) != STOPPING {
        let length = stream.read(&mut buffer).expect("the server writes");
        assert_ne!(length, 0, "the server must not stop first");
        received.fetch_add(length as u64, Relaxed);
    }
}

/// Sends requests in a loop. Returns their latencies.
async fn client(server: SocketAddr, mode: RequestMode, phase: Arc<AtomicU8>) -> Vec<u32> {
    let mut latencies = Vec::new();
    let mut kept = None;
    while phase.load(Relaxed) != STOPPING {
        let began = Instant::now();
        let stream = kept.take();
        let result = timeout(OPERATION_TIMEOUT, send_request(server, mode, stream)).await;
        kept = result.expect("an answer comes").expect("the server can be reached and answers");
        if phase.load(Relaxed) == MEASURING {
            latencies.push(micros(began));
        }
    }
    latencies
}

/// The elapsed time in microseconds.
pub(crate) fn micros(began: Instant) -> u32 {
    u32::try_from(began.elapsed().as_micros()).expect("nothing here takes an hour")
}

/// Sends a request on the given or a new connection. Returns the connection if it is reusable.
pub(crate) async fn send_request(
    server: SocketAddr,
    mode: RequestMode,
    stream: Option<tokio::net::TcpStream>,
) -> io::Result<Option<tokio::net::TcpStream>> {
    let mut stream = match stream {
        Some(stream) => stream,
        None => {
            let new = tokio::net::TcpStream::connect(server).await?;
            new.set_nodelay(true)?;
            new
        }
    };
    let mut message = [0; MESSAGE];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await?;
    if mode == RequestMode::KeepAlive {
        return Ok(Some(stream));
    }
    let rest = stream.read(&mut message).await?;
    assert_eq!(rest, 0, "the server closes after one answer");
    Ok(None)
}
