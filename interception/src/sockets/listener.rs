//! Listeners. They are bound at start, and accept in the runtime of the worker that registers them.
//!
//! `socket` contains addresses and marks.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::fstat;
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::namespace::Entered;
use crate::sockets::canonical;

/// The length of the accept queue. The kernel reduces it to net.core.somaxconn (4096 by default).
const BACKLOG: i32 = 65_535;

/// A listener that belongs to no runtime. The kernel already completes handshakes for it. Clones
/// share its descriptor, and the listener closes with the last one.
#[derive(Debug, Clone)]
pub struct BoundListener {
    listener: Arc<TcpListener>,
}

impl BoundListener {
    /// The socket, to pass it to another process.
    ///
    /// # Errors
    ///
    /// Other clones exist, so that this one needs a new descriptor, and the process has none left.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        match Arc::try_unwrap(self.listener) {
            Ok(listener) => Ok(listener.into()),
            Err(shared) => shared.try_clone().map(OwnedFd::from),
        }
    }

    /// The local address. If its port was 0, contains the port that the kernel chose.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Returns the inode of the socket, which no other open socket has.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(fstat(&self.listener)?.st_ino)
    }

    /// Registers the listener with the current tokio runtime.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    ///
    /// # Panics
    ///
    /// There is no current tokio runtime with I/O.
    pub fn register(self) -> io::Result<Listener> {
        // tokio's listener registers each connection with the runtime that accepts it, but often
        // another worker serves it.
        #[expect(
            deprecated,
            reason = "safe here: a TcpListener's descriptor stays open and the same (tokio #8587)"
        )]
        let listener = AsyncFd::with_interest(self.listener, Interest::READABLE)?;
        Ok(Listener { listener })
    }
}

impl AsFd for BoundListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl From<TcpListener> for BoundListener {
    fn from(listener: TcpListener) -> Self {
        Self { listener: Arc::new(listener) }
    }
}

impl TryFrom<OwnedFd> for BoundListener {
    type Error = io::Error;

    /// Converts a descriptor from another process. It may be of any kind.
    fn try_from(socket: OwnedFd) -> io::Result<Self> {
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
/// `prepare` runs before the first connection can arrive.
pub(crate) fn bind(
    _: &Entered,
    address: SocketAddr,
    mark: Option<u32>,
    transparent: bool,
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
    prepare(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from(socket).into())
}
