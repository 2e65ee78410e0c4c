//! The client of every load, in pod-a: traffic that flows until it is stopped.
//!
//! Bulk is a blocking thread per stream; requests of any number of connections are one thread with one epoll loop, so that
//! the load leaves the two or so CPUs to what is measured.

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

/// How long anything may take before it hangs rather than waits.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// A connection that takes nothing for so long takes nothing any more.
const FULL: Duration = Duration::from_millis(500);

const WARMING_UP: u8 = 0;
const MEASURING: u8 = 1;
const STOPPING: u8 = 2;

/// Which way bulk goes, as seen from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

/// What a client asks, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asking {
    /// All requests on one connection.
    KeepAlive,
    /// A connection for every request; the server closes it.
    Once,
}

/// Traffic from a pod that flows until it is stopped.
#[derive(Debug)]
pub struct Traffic {
    phase: Arc<AtomicU8>,
    /// Bytes that came down.
    pub(crate) received: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<u32>>>,
}

impl Traffic {
    pub(crate) fn bulk(pod: &Namespace, server: SocketAddr, way: Way, streams: usize) -> Self {
        let mut traffic = Self::new();
        for _ in 0..streams {
            let (phase, received) = (traffic.phase.clone(), traffic.received.clone());
            traffic.threads.push(spawn(pod, move || {
                let stream = connect(server);
                match way {
                    Way::Up => write_until_stopped(stream, &phase),
                    Way::Down => read_until_stopped(stream, &phase, &received),
                }
                Vec::new()
            }));
        }
        traffic
    }

    /// Requests on so many connections at a time.
    #[must_use]
    pub fn requests(
        pod: &Namespace,
        server: SocketAddr,
        asking: Asking,
        connections: usize,
    ) -> Self {
        let mut traffic = Self::new();
        let phase = traffic.phase.clone();
        traffic.threads.push(spawn(pod, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime starts").block_on(async {
                let client = |_| client(server, asking, phase.clone());
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

    /// From now on, latencies count.
    pub fn measure(&self) {
        self.phase.store(MEASURING, Relaxed);
    }

    /// Until now; the traffic is about to end.
    pub fn stop(&self) {
        self.phase.store(STOPPING, Relaxed);
    }

    /// The latencies in between, in microseconds and in no order, once all has ended.
    ///
    /// # Panics
    /// It met an error.
    #[must_use]
    pub fn latencies(self) -> Vec<u32> {
        let join = |thread: JoinHandle<_>| thread.join().expect("the load met no error");
        self.threads.into_iter().flat_map(join).collect()
    }
}

/// Connections that have carried one request each, and now nothing.
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

/// Connections to a server that does not read, each with all in it that it takes.
pub(crate) fn stalled(pod: &Namespace, server: SocketAddr, connections: usize) -> Vec<TcpStream> {
    let threads: Vec<_> = (0..connections).map(|_| spawn(pod, move || fill(server))).collect();
    threads.into_iter().map(|thread| thread.join().expect("it met no error")).collect()
}

fn fill(server: SocketAddr) -> TcpStream {
    let mut stream = connect(server);
    stream.set_write_timeout(Some(FULL)).expect("SO_SNDTIMEO");
    let block = vec![0; BLOCK];
    while stream.write(&block).is_ok() {}
    stream
}

/// A thread that is in the pod, as is whatever it opens.
fn spawn<T: Send + 'static>(
    pod: &Namespace,
    run: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    pod.run(|| thread::spawn(run)).expect("the pod can be entered")
}

fn connect(server: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&server, PATIENCE).expect("the server can be reached");
    stream.set_read_timeout(Some(PATIENCE)).expect("SO_RCVTIMEO");
    stream.set_write_timeout(Some(PATIENCE)).expect("SO_SNDTIMEO");
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
        assert_ne!(length, 0, "the server must not stop before we do");
        received.fetch_add(length as u64, Relaxed);
    }
}

/// Asks again and again, and returns what each answer took.
async fn client(server: SocketAddr, asking: Asking, phase: Arc<AtomicU8>) -> Vec<u32> {
    let mut latencies = Vec::new();
    let mut kept = None;
    while phase.load(Relaxed) != STOPPING {
        let began = Instant::now();
        let stream = kept.take();
        let asked = timeout(PATIENCE, ask(server, asking, stream)).await;
        kept = asked.expect("an answer comes").expect("the server can be reached and answers");
        if phase.load(Relaxed) == MEASURING {
            latencies.push(micros(began));
        }
    }
    latencies
}

/// Since then, in microseconds.
pub(crate) fn micros(began: Instant) -> u32 {
    u32::try_from(began.elapsed().as_micros()).expect("nothing here takes an hour")
}

/// One request, on the connection that is given or a new one; returns the connection if it can be asked again.
pub(crate) async fn ask(
    server: SocketAddr,
    asking: Asking,
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
    if asking == Asking::KeepAlive {
        return Ok(Some(stream));
    }
    let rest = stream.read(&mut message).await?;
    assert_eq!(rest, 0, "the server closes after one answer");
    Ok(None)
}
