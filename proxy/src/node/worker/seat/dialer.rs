//! Opens the TCP connections below the tunnels of a seat.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context as TaskContext, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use underpass_hbone::{Dial, PoolEvent};
use underpass_interception::end_on_close;

use super::Seat;
use crate::limits::{FdPermit, WorkerTunnel};
use crate::observe::metrics;
use crate::observe::metrics::{GaugeGuard, PoolUse, Timings};
use crate::observe::party::Direction;

/// Opens the TCP connections below the tunnels of one seat, with the sockets of its pod.
#[derive(Debug)]
pub(crate) struct TunnelDialer {
    /// Weak: the seat owns the pool, which owns this.
    seat: Weak<Seat>,
    timings: Arc<Timings>,
}

impl TunnelDialer {
    pub(crate) fn new(seat: Weak<Seat>, timings: Arc<Timings>) -> Self {
        Self { seat, timings }
    }
}

impl Dial for TunnelDialer {
    type Io = TunnelSocket;

    async fn dial(&self, address: SocketAddr) -> io::Result<TunnelSocket> {
        // The dial may outlive the connection that requested it, so it owns the seat.
        let gone = || io::Error::other("the pod has no connection that needs the tunnel");
        let seat = self.seat.upgrade().ok_or_else(gone)?;
        let descriptor = seat.pod.limits.hold_outbound();
        let sockets = &seat.pod.sockets;
        let stream = tokio::select! {
            connected = sockets.connect(address) => connected?,
            () = sockets.closed() => return Err(gone()),
        };
        // TLS close_notify marks a complete end, so closing this socket need not send RST.
        end_on_close(&stream);
        let counted = seat.node().limits.balance.tunnel(seat.worker.index, address.ip());
        Ok(TunnelSocket {
            stream,
            _descriptor: descriptor,
            _counted: counted,
            _open: metrics::tunnel_open("outbound"),
            _seat: seat,
        })
    }

    fn observe(&self, event: PoolEvent) {
        self.timings.pool(match event {
            PoolEvent::Handshake(took) => {
                return self.timings.handshake(Direction::Outbound, took);
            }
            PoolEvent::Reused => PoolUse::Reused,
            PoolEvent::Opened => PoolUse::Opened,
            PoolEvent::DialFailed => PoolUse::DialFailed,
            PoolEvent::BackedOff => PoolUse::BackedOff,
        });
    }
}

/// A TCP connection below a tunnel. It owns the seat whose pool has the tunnel, and counts the
/// tunnel in the balance.
#[derive(Debug)]
pub(crate) struct TunnelSocket {
    stream: TcpStream,
    _descriptor: FdPermit,
    _counted: WorkerTunnel,
    _open: GaugeGuard,
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
