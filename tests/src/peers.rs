//! Applications in pods: clients and servers. Every wait has a timeout.
//!
//! A socket belongs to the namespace in which it was opened, so it is opened inside the pod and
//! used from outside.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::{Ipv6Addr, Shutdown, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use underpass_interception::reset_on_close;

use crate::or_fail::OrFail;
use crate::pods::Pod;

/// Timeout of every wait: far longer than expected, far shorter than that of a trial.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Waits for `event`; panics with `what` after [`DEADLINE`].
pub async fn within<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, event).await {
        Ok(value) => value,
        Err(_) => panic!("waited {DEADLINE:?} in vain: {what}"),
    }
}

/// Polls until the condition `holds`, for conditions without a notification. `what` describes it.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !holds().await {
            tokio::task::yield_now().await;
        }
    };
    within(what, asking).await;
}

/// Options of a connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dial {
    /// The packet mark.
    pub mark: Option<u32>,
    /// The source address, which may be foreign. Port 0 lets the kernel choose the port.
    pub source: Option<SocketAddr>,
}

impl Pod {
    /// Connects from inside the pod.
    ///
    /// # Errors
    /// The error of the kernel.
    pub async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.dial_as(to, Dial::default()).await
    }

    /// Connects from inside the pod with these options.
    ///
    /// # Errors
    /// The error of the kernel.
    pub async fn dial_as(&self, to: SocketAddr, dial: Dial) -> io::Result<TcpStream> {
        let socket = self.run(|| socket(to, dial))?;
        within(
            &format!("a connection to {to}"),
            TcpSocket::from_std_stream(socket.into()).connect(to),
        )
        .await
    }

    /// Connects from inside the pod and expects RST. A proxy accepts before it decides, so RST may
    /// follow the handshake.
    pub async fn dial_and_see_reset(&self, to: SocketAddr) {
        match self.dial(to).await {
            Ok(mut stream) => {
                assert_eq!(read_to_end(&mut stream).await, (vec![], End::Reset), "{to}");
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{to}"),
        }
    }

    /// Connects from inside the pod and expects a refusal.
    pub async fn dial_and_be_refused(&self, to: SocketAddr) {
        let refused = self.dial(to).await.map(drop).map_err(|error| error.kind());
        assert_eq!(refused, Err(ErrorKind::ConnectionRefused), "{to}");
    }

    /// Listens on a port of all addresses.
    #[must_use]
    pub fn listen(&self, port: u16) -> Listener {
        let listen = || {
            let socket = Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), None)?;
            socket.set_only_v6(false)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
            socket.listen(4096)?;
            Ok(socket)
        };
        let socket: io::Result<Socket> = self.run(listen);
        let socket = socket.or_fail(format!("listen on port {port}"));
        let queue = Queue(socket.try_clone().or_fail("listen"));
        Listener { listener: TcpListener::from_std(socket.into()).or_fail("listen"), queue }
    }

    /// Connects to `to` while `listener` accepts. Returns client, server and the client's address
    /// that the listener sees.
    pub async fn meet(
        &self,
        listener: &Listener,
        to: SocketAddr,
    ) -> (TcpStream, TcpStream, SocketAddr) {
        let (client, (server, peer)) = tokio::join!(self.dial(to), listener.accept());
        (client.or_fail(format!("connect to {to}")), server, peer)
    }
}

/// Opens a socket for a connection in the current namespace.
pub(crate) fn socket(to: SocketAddr, dial: Dial) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
    dial.mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
    if let Some(source) = dial.source {
        if source.is_ipv4() {
            socket.set_ip_transparent_v4(true)?
        } else {
            socket.set_ip_transparent_v6(true)?
        }
        socket.bind(&source.into())?;
    }
    Ok(socket)
}

/// The listening socket, outside the runtime. Dropping it shuts the socket down, so that the port
/// is free at once: until another trial's child process executes its program, it has a copy of the
/// descriptor.
#[derive(Debug)]
struct Queue(Socket);

impl Drop for Queue {
    fn drop(&mut self) {
        self.0.shutdown(Shutdown::Read).ok();
    }
}

/// The listener of an application.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    /// The accept queue of the listener, which can be read without waiting.
    queue: Queue,
}

impl Listener {
    /// The next connection, and its peer address.
    pub async fn accept(&self) -> (TcpStream, SocketAddr) {
        let accepted = within("a connection to an application", self.listener.accept()).await;
        let (stream, peer) = accepted.or_fail("accept");
        (stream, SocketAddr::new(peer.ip().to_canonical(), peer.port()))
    }

    /// Returns true if a connection is in the accept queue, and accepts and closes it.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        match self.queue.0.accept() {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("cannot accept: {error}"),
        }
    }
}

/// An application that serves every connection until it is dropped.
#[derive(Debug)]
pub struct Server {
    task: JoinHandle<()>,
    _queue: Queue,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Server {
    /// Serves each connection with `serve`, which gets the stream and its peer address.
    pub fn start<F>(
        pod: &Pod,
        port: u16,
        serve: impl Fn(TcpStream, SocketAddr) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let Listener { listener, queue } = pod.listen(port);
        let peers = Arc::new(Mutex::new(Vec::new()));
        let seen = peers.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, peer)) = listener.accept().await {
                let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                seen.lock().expect("no holder panics").push(peer);
                // Errors are ignored: a client may close its connection at any time.
                tokio::spawn(serve(stream, peer));
            }
        });
        Self { task, _queue: queue, peers }
    }

    /// Echoes all bytes, and answers FIN with FIN.
    #[must_use]
    pub fn echo(pod: &Pod, port: u16) -> Self {
        Self::start(pod, port, async |mut stream, _| {
            let (mut from, mut to) = stream.split();
            tokio::io::copy(&mut from, &mut to).await?;
            to.shutdown().await
        })
    }

    /// Answers an HTTP/1.1 request with the lines `peer ADDRESS` and `local ADDRESS`.
    #[must_use]
    pub fn http(pod: &Pod, port: u16) -> Self {
        Self::start(pod, port, async |mut stream, peer| {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && head.len() < 8192 {
                head.push(stream.read_u8().await?);
            }
            let local = stream.local_addr()?;
            let local = SocketAddr::new(local.ip().to_canonical(), local.port());
            let body = format!("peer {peer}\nlocal {local}\n");
            let length = body.len();
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            stream.write_all(format!("{head}{body}").as_bytes()).await?;
            stream.shutdown().await
        })
    }

    /// The peer addresses so far.
    #[must_use]
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().expect("no holder panics").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How a connection ended, as its reader saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// FIN: everything was received.
    Fin,
    /// RST: data may be missing.
    Reset,
}

/// Reads until the peer ends the connection. Returns the data and the kind of end.
pub async fn read_to_end(stream: &mut TcpStream) -> (Vec<u8>, End) {
    let mut received = Vec::new();
    match within("the end of a connection", stream.read_to_end(&mut received)).await {
        Ok(_) => (received, End::Fin),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (received, End::Reset),
        Err(error) => panic!("the connection ended with neither FIN nor RST: {error}"),
    }
}

/// Ends a connection: sends FIN in both directions, and waits for both.
pub async fn finish(client: &mut TcpStream, server: &mut TcpStream) {
    client.shutdown().await.or_fail("send FIN");
    server.shutdown().await.or_fail("send FIN");
    read_to_end(client).await;
    read_to_end(server).await;
}

/// Aborts a connection with RST.
pub fn abort(stream: TcpStream) {
    reset_on_close(&stream);
}

/// Sends a few bytes in each direction.
pub async fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    carry(client, server, b"request").await;
    carry(server, client, b"answer").await;
}

/// Sends a few bytes in one direction.
pub async fn carry(from: &mut TcpStream, to: &mut TcpStream, what: &[u8]) {
    within("bytes are sent", from.write_all(what)).await.or_fail("send");
    let mut received = vec![0; what.len()];
    within("bytes arrive", to.read_exact(&mut received)).await.or_fail("receive");
    assert_eq!(received, what);
}
