//! The demonstration's own HTTP: a server that says who it talks to, and a client. Both blocking, on threads of their own.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use underpass_interception::Namespace;

use super::PATIENCE;

/// One GET from inside `pod`; the whole response as text.
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
        let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request.as_bytes())?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        Ok(response)
    };
    pod.run(exchange).map_err(io::Error::other)?
}

/// A server that greets, says whom it sees and repeats the request's token.
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
                // A client that went away is not the server's trouble.
                answer(stream).ok();
            }
        })?;
        Ok(Self { requests })
    }

    /// How many connections have reached it.
    pub(super) fn requests(&self) -> usize {
        self.requests.load(Relaxed)
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let peer = stream.peer_addr()?;
    let mut token = String::new();
    // Far more than the client sends; a bound all the same.
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
