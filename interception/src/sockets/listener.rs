//! Listeners, and sockets that receive datagrams. They are bound at start, and belong to the
//! runtime of the worker that registers them.
//!
//! `socket` contains addresses and marks.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::fstat;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::namespace::Entered;
use crate::sockets::canonical;

/// The length of the accept queue. The kernel reduces it to net.core.somaxconn (4096 by default).
const BACKLOG: i32 = 65_535;
/// The receive buffer of a socket for datagrams, twice as much with the kernel's overhead: about
/// 1,000 queries, which wait there while another process takes over. The default holds 193.
const RECEIVE_BUFFER: usize = 512 << 10;

/// How clients send to a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenerTransport {
    /// TCP connections.
    Stream,
    /// UDP datagrams.
    Datagram,
}

/// A listener that belongs to no runtime. The kernel already completes handshakes for it, or queues
/// datagrams. Clones share its descriptor, and the listener closes with the last one.
#[derive(Debug, Clone)]
pub struct BoundListener(Bound);

#[derive(Debug, Clone)]
enum Bound {
    Stream(Arc<TcpListener>),
    Datagram(Arc<UdpSocket>),
}

impl BoundListener {
    /// The socket, to pass it to another process.
    ///
    /// # Errors
    ///
    /// Other clones exist, so that this one needs a new descriptor, and the process has none left.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        match self.0 {
            Bound::Stream(listener) => match Arc::try_unwrap(listener) {
                Ok(listener) => Ok(listener.into()),
                Err(shared) => shared.try_clone().map(OwnedFd::from),
            },
            Bound::Datagram(socket) => owned(socket).map(OwnedFd::from),
        }
    }

    /// The local address. If its port was 0, contains the port that the kernel chose.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.0 {
            Bound::Stream(listener) => listener.local_addr(),
            Bound::Datagram(socket) => socket.local_addr(),
        }
    }

    /// How clients send to the listener.
    #[must_use]
    pub fn transport(&self) -> ListenerTransport {
        match &self.0 {
            Bound::Stream(_) => ListenerTransport::Stream,
            Bound::Datagram(_) => ListenerTransport::Datagram,
        }
    }

    /// Returns the inode of the socket, which no other open socket has.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(fstat(self)?.st_ino)
    }

    /// Registers the listener with the current tokio runtime.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation. `InvalidInput` for a socket that receives datagrams.
    ///
    /// # Panics
    ///
    /// There is no current tokio runtime with I/O.
    pub fn register(self) -> io::Result<Listener> {
        let Bound::Stream(listener) = self.0 else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // tokio's listener registers each connection with the runtime that accepts it, but often
        // another worker serves it.
        #[expect(
            deprecated,
            reason = "safe here: a TcpListener's descriptor stays open and the same (tokio #8587)"
        )]
        let listener = AsyncFd::with_interest(listener, Interest::READABLE)?;
        Ok(Listener { listener })
    }

    /// Registers a socket that receives datagrams with the current tokio runtime.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation. `InvalidInput` for a listener of connections.
    ///
    /// # Panics
    ///
    /// There is no current tokio runtime with I/O.
    pub fn register_datagram(self) -> io::Result<tokio::net::UdpSocket> {
        match self.0 {
            Bound::Datagram(socket) => tokio::net::UdpSocket::from_std(owned(socket)?),
            Bound::Stream(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// The socket itself, or a new descriptor of it if clones exist.
fn owned(socket: Arc<UdpSocket>) -> io::Result<UdpSocket> {
    Arc::try_unwrap(socket).or_else(|shared| shared.try_clone())
}

impl AsFd for BoundListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Bound::Stream(listener) => listener.as_fd(),
            Bound::Datagram(socket) => socket.as_fd(),
        }
    }
}

impl From<TcpListener> for BoundListener {
    fn from(listener: TcpListener) -> Self {
        Self(Bound::Stream(Arc::new(listener)))
    }
}

impl From<UdpSocket> for BoundListener {
    fn from(socket: UdpSocket) -> Self {
        Self(Bound::Datagram(Arc::new(socket)))
    }
}

impl TryFrom<OwnedFd> for BoundListener {
    type Error = io::Error;

    /// Converts a descriptor from another process. It may be of any kind.
    fn try_from(socket: OwnedFd) -> io::Result<Self> {
        if SockRef::from(&socket).r#type()? == Type::DGRAM {
            let socket = UdpSocket::from(socket);
            // Fails for descriptors without an IP address.
            if socket.local_addr()?.port() == 0 || socket.peer_addr().is_ok() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            socket.set_nonblocking(true)?;
            return Ok(socket.into());
        }
        let listens = SockRef::from(&socket).is_listener()?;
        let listener = TcpListener::from(socket);
        // Fails for descriptors without an IP address.
        listener.local_addr()?;
        if !listens {
            return Err(io::ErrorKind::InvalidData.into());
        }
        listener.set_nonblocking(true)?;
        Ok(listener.into())
    }
}

/// A listener that is registered with a runtime.
#[derive(Debug)]
pub struct Listener {
    listener: AsyncFd<Arc<TcpListener>>,
}

impl Listener {
    /// Waits for the next connection. Returns it with the client's address (IPv4-mapped addresses
    /// as IPv4).
    ///
    /// The stream is non-blocking and belongs to no runtime, so that any worker can serve it. It
    /// inherits the listener's options.
    ///
    /// # Errors
    ///
    /// The error of the kernel (accept(2)). Some errors affect one connection, others (EMFILE,
    /// ENFILE, ENOBUFS) the process.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let accept = |listener: &Arc<TcpListener>| Ok(acceptfrom_with(listener, flags)?);
        let (stream, peer) = self.listener.async_io(Interest::READABLE, accept).await?;
        let peer = peer.ok_or(io::ErrorKind::Unsupported)?;
        Ok((stream.into(), canonical(SocketAddr::try_from(peer)?)))
    }

    /// The local address.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.get_ref().local_addr()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Listens on `address`. Accepted streams inherit the mark (`inet_request_mark`,
/// include/net/inet_sock.h). A transparent listener also accepts connections that TPROXY delivers.
/// `may_be_absent`: the address need not exist yet. `prepare` runs before the first connection can
/// arrive.
pub(crate) fn bind(
    _: &Entered,
    address: SocketAddr,
    mark: Option<u32>,
    transparent: bool,
    may_be_absent: bool,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<BoundListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    // A restart must not wait for connections of the previous process in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Set this explicitly, because net.ipv6.bindv6only may be 1.
        socket.set_only_v6(false)?;
    }
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    // Both options set the same flag of the socket (inet_sk(sk)->transparent).
    match address {
        _ if !transparent => {}
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    if may_be_absent {
        set_freebind(&socket, address)?;
    }
    prepare(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from(socket).into())
}

/// Receives datagrams at `address`, which need not exist yet.
pub(crate) fn bind_datagram(
    _: &Entered,
    address: SocketAddr,
    mark: Option<u32>,
) -> io::Result<BoundListener> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    set_freebind(&socket, address)?;
    // Without CAP_NET_ADMIN, net.core.rmem_max limits the size.
    set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)
        .or_else(|_| socket.set_recv_buffer_size(RECEIVE_BUFFER))?;
    socket.bind(&address.into())?;
    Ok(UdpSocket::from(socket).into())
}

/// Allows binding to an address that does not exist yet: the loopback interface loses ::1 while
/// IPv6 is disabled.
fn set_freebind(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true),
        SocketAddr::V6(_) => socket.set_freebind_v6(true),
    }
}
