//! A minimal blocking HTTP server and client for the demonstration. Each runs on a separate thread.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;
use underpass_interception::Namespace;

use super::STEP_TIMEOUT;

/// An HTTP exchange: the response or the error, and its duration.
pub(super) struct Exchange {
    pub(super) response: io::Result<String>,
    pub(super) took: Duration,
}

impl Exchange {
    /// The status, the first line of the body and the duration, or the error.
    pub(super) fn summary(&self) -> String {
        match &self.response {
            Ok(text) => {
                let status = text.lines().next().unwrap_or_default();
                let greeting =
                    text.lines().find(|line| line.starts_with("hello")).unwrap_or_default();
                format!("{status}, \"{greeting}\", after {:.1} ms", self.took.as_secs_f64() * 1e3)
            }
            Err(error) => error.to_string(),
        }
    }

    /// Whether the server received and returned `token`.
    pub(super) fn succeeded(&self, token: &str) -> bool {
        self.response.as_ref().is_ok_and(|text| {
            text.lines().next().is_some_and(|status| status.contains("200")) && text.contains(token)
        })
    }

    /// The client's address that the server reports.
    pub(super) fn source(&self) -> Option<SocketAddr> {
        let text = self.response.as_ref().ok()?;
        text.lines().find_map(|line| line.strip_prefix("you are "))?.parse().ok()
    }
}

/// Sends one GET request from `pod`, and measures its duration.
pub(super) fn exchange(pod: &Namespace, server: SocketAddr, token: &str) -> Exchange {
    let began = Instant::now();
    let response = get(pod, server, "/", token);
    Exchange { response, took: began.elapsed() }
}

/// Sends one GET request from `pod` and returns the entire response.
pub(super) fn get(
    pod: &Namespace,
    server: SocketAddr,
    path: &str,
    token: &str,
) -> io::Result<String> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {server}\r\nX-Token: {token}\r\nConnection: close\r\n\r\n"
    );
    let exchange = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&server, STEP_TIMEOUT)?;
        stream.set_read_timeout(Some(STEP_TIMEOUT))?;
        stream.write_all(request.as_bytes())?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        Ok(response)
    };
    pod.run(exchange).map_err(io::Error::other)?
}

/// A server that responds with the client's address and the request's token.
pub(super) struct Server {
    requests: Arc<AtomicUsize>,
}

impl Server {
    /// Serves on `port` of every address of `pod` until the process ends.
    pub(super) fn start(pod: &Namespace, port: u16) -> io::Result<Self> {
        let listener =
            pod.run(|| TcpListener::bind(("0.0.0.0", port))).map_err(io::Error::other)??;
        let requests = Arc::new(AtomicUsize::new(0));
        let served = requests.clone();
        std::thread::Builder::new().name("demo-server".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                served.fetch_add(1, Relaxed);
                // A client that has closed its connection is not an error of the server.
                answer(stream).ok();
            }
        })?;
        Ok(Self { requests })
    }

    /// The number of connections that have reached the server.
    pub(super) fn requests(&self) -> usize {
        self.requests.load(Relaxed)
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(STEP_TIMEOUT))?;
    let peer = stream.peer_addr()?;
    let mut token = String::new();
    // The bound is far above the length of the client's request.
    let head = BufReader::new(stream.try_clone()?).take(8192);
    for line in head.lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("X-Token: ") {
            value.clone_into(&mut token);
        }
    }
    let body = format!("hello from the server\nyou are {peer}\nyour token is {token}\n");
    let length = body.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}
