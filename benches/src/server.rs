//! The server of every load, in pod-b. The port selects its behaviour.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use underpass_interception::Namespace;

/// Reads and discards data.
pub(crate) const SINK: u16 = 9001;
/// Writes until the client closes.
pub(crate) const SOURCE: u16 = 9002;
/// Answers every [`MESSAGE`] with a message.
pub(crate) const ANSWER: u16 = 9003;
/// Answers one [`MESSAGE`] and closes.
pub(crate) const ANSWER_ONCE: u16 = 9004;
/// Never reads.
pub(crate) const STALL: u16 = 9005;

pub(crate) const PORTS: [u16; 5] = [SINK, SOURCE, ANSWER, ANSWER_ONCE, STALL];

/// Bytes of a request, and of a response.
pub(crate) const MESSAGE: usize = 100;
/// The size of bulk reads and writes, as in iperf3.
pub(crate) const BLOCK: usize = 128 * 1024;

/// The backlog of listeners, for a storm. The kernel limits it to `net.core.somaxconn`.
pub(crate) const BACKLOG: i32 = 32_768;

/// The server of one pod. It runs until the process ends.
#[derive(Debug)]
pub(crate) struct Server {
    /// The number of bytes that the sink has received.
    pub(crate) received: Arc<AtomicU64>,
    /// The number of open connections to the sink.
    pub(crate) sinking: watch::Receiver<usize>,
}

impl Server {
    pub(crate) fn start(pod: &Namespace) -> Self {
        let received = Arc::new(AtomicU64::new(0));
        let (open, sinking) = watch::channel(0);
        let (counter, open) = (received.clone(), Arc::new(open));
        serve_bulk(pod, SINK, move |stream| {
            open.send_modify(|open| *open += 1);
            sink(stream, &counter);
            open.send_modify(|open| *open -= 1);
        });
        serve_bulk(pod, SOURCE, |mut stream| while stream.write_all(&[0; BLOCK]).is_ok() {});
        serve_answers(pod);
        serve_bulk(pod, STALL, |stream| {
            // The client ends the connection with RST, because of unread data.
            while stream.take_error().is_ok_and(|error| error.is_none()) {
                thread::park_timeout(Duration::from_millis(100));
            }
        });
        Self { received, sinking }
    }
}

/// Reads to the end, and counts the bytes.
fn sink(mut stream: TcpStream, counter: &AtomicU64) {
    let mut buffer = vec![0; BLOCK];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        counter.fetch_add(length as u64, Relaxed);
    }
}

fn listen(pod: &Namespace, port: u16) -> TcpListener {
    let bound = pod.run(|| TcpListener::bind(("0.0.0.0", port))).expect("the pod can be entered");
    let listener = bound.expect("the port is free in a new pod");
    rustix::net::listen(&listener, BACKLOG).expect("it listens already");
    listener
}

/// Serves each connection on a thread.
fn serve_bulk(pod: &Namespace, port: u16, serve: impl Fn(TcpStream) + Send + Sync + 'static) {
    let (listener, serve) = (listen(pod, port), Arc::new(serve));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.expect("accept"), serve.clone());
            thread::spawn(move || serve(stream));
        }
    });
}

/// Serves all connections on one thread, like nginx with one worker.
fn serve_answers(pod: &Namespace) {
    let listeners = [(listen(pod, ANSWER), usize::MAX), (listen(pod, ANSWER_ONCE), 1)];
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        runtime.expect("a runtime starts").block_on(async {
            for (listener, answers) in listeners {
                listener.set_nonblocking(true).expect("O_NONBLOCK");
                let listener = tokio::net::TcpListener::from_std(listener).expect("epoll takes it");
                tokio::spawn(accept(listener, answers));
            }
            std::future::pending::<()>().await;
        });
    });
}

async fn accept(listener: tokio::net::TcpListener, answers: usize) {
    loop {
        let (mut stream, _) = listener.accept().await.expect("accept");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        tokio::spawn(async move {
            let mut message = [0; MESSAGE];
            for _ in 0..answers {
                // A client closes its connection after its last answer. If an answer is missing,
                // the client reports it.
                let Ok(_) = stream.read_exact(&mut message).await else {
                    return;
                };
                let Ok(()) = stream.write_all(&message).await else {
                    return;
                };
            }
        });
    }
}
