//! Opening connections: to an application or a plain destination, and to a peer's HBONE listener for the pool.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use underpass_hbone::Dial;
use underpass_interception::{
    NamespaceAccess, SocketKind, SocketRole, Sockets, end_on_close, is_out_of_files,
};

use crate::decide::policy::Permit;
use crate::error::ProxyError;
use crate::limits::{FdPermit, HeldTunnel};
use crate::node::Seat;
use crate::observe::metrics;
use crate::observe::metrics::Counted;

/// Connects to what `permit` allows, within `deadline`.
pub(crate) async fn dial(permit: &Permit<'_>, deadline: Duration) -> Result<TcpStream, ProxyError> {
    within(permit, deadline, permit.pod().sockets.connect(permit.destination())).await
}

/// Connects to the workload, as the profile does it for `client`.
pub(crate) async fn dial_workload(
    permit: &Permit<'_>,
    client: IpAddr,
    deadline: Duration,
) -> Result<TcpStream, ProxyError> {
    let sockets = &permit.pod().sockets;
    within(permit, deadline, sockets.connect_workload(permit.destination(), client)).await
}

/// Connects to the permitted port of the loopback interface: what takes connections for others there needs to be open to nobody
/// else, and is told who connects by a header.
pub(crate) async fn dial_loopback(
    permit: &Permit<'_>,
    deadline: Duration,
) -> Result<TcpStream, ProxyError> {
    let destination = permit.destination();
    let loopback = match destination {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let here = SocketAddr::new(loopback, destination.port());
    within(permit, deadline, permit.pod().sockets.connect(here)).await
}

async fn within(
    permit: &Permit<'_>,
    deadline: Duration,
    connect: impl Future<Output = io::Result<TcpStream>>,
) -> Result<TcpStream, ProxyError> {
    let destination = permit.destination();
    match timeout(deadline, connect).await {
        // Nothing but a good end of both directions is to look like one: it is reset on close.
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if is_out_of_files(&error) => Err(ProxyError::OutOfDescriptors),
        Ok(Err(error)) => Err(ProxyError::Connect { destination, source: error }),
        Err(_) => Err(ProxyError::ConnectTimeout { destination, after: deadline }),
    }
}

/// Opens the connections below the tunnels of one seat, from the sockets of its pod.
#[derive(Debug)]
pub(crate) struct TunnelDialer {
    /// Weak: the seat owns the pool that owns this.
    seat: Weak<Seat>,
}

impl TunnelDialer {
    pub(crate) fn new(seat: Weak<Seat>) -> Self {
        Self { seat }
    }
}

impl Dial for TunnelDialer {
    type Io = TunnelSocket;

    async fn dial(&self, address: SocketAddr) -> io::Result<TunnelSocket> {
        // The dial outlives the connection that asked for it, and keeps the seat from here on.
        let gone = || io::Error::other("no connection of the pod waits for the tunnel any longer");
        let seat = self.seat.upgrade().ok_or_else(gone)?;
        let descriptor = seat.pod.limits.hold_outbound();
        let sockets = &seat.pod.sockets;
        let stream = tokio::select! {
            connected = sockets.connect(address) => connected?,
            () = sockets.closed() => return Err(gone()),
        };
        // A connection ends by TLS close_notify, so that closing the socket needs no reset.
        end_on_close(&stream);
        let held = seat.node().limits.balance.tunnel(seat.worker.index, address.ip());
        Ok(TunnelSocket {
            stream,
            _descriptor: descriptor,
            _held: held,
            _open: metrics::tunnel_open("outbound"),
            _seat: seat,
        })
    }
}

/// Opens connections of the proxy's own to issuers of certificates, so that its rules do not catch
/// them.
#[derive(Debug)]
pub(crate) struct PlainDialer {
    pub(crate) access: NamespaceAccess,
    pub(crate) sockets: Sockets,
}

impl Dial for PlainDialer {
    type Io = TcpStream;

    async fn dial(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let kind = SocketKind::new(SocketRole::Upstream, address);
        let opened = self.access.open_sockets(&self.sockets, kind, 1).await?;
        let socket = opened.into_iter().next().ok_or(io::ErrorKind::NotFound)?;
        let stream = socket.connect(address).await?;
        end_on_close(&stream);
        Ok(stream)
    }
}

/// A connection below a tunnel. It keeps the seat whose pool has the tunnel, and counts the tunnel
/// in the balance.
#[derive(Debug)]
pub(crate) struct TunnelSocket {
    stream: TcpStream,
    _descriptor: FdPermit,
    _held: HeldTunnel,
    _open: Counted,
    _seat: Arc<Seat>,
}

impl AsyncRead for TunnelSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TunnelSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
