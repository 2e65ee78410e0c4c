//! A stream between TLS and h2: measures traffic, and enforces limits on the frames that the peer
//! sends.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::TunnelState;
use crate::tls::known_error;
use crate::tunnel::inspect::Inspector;

/// The maximum cost of data that one turn of the connection's task reads. Readers of streams then
/// run while the data is still in the CPU caches.
const MAX_READ_PER_POLL: usize = 256 << 10;

/// A wrapper of the TLS stream. Records in [`TunnelState`] what h2 discards: the time of received
/// bytes, the alert that ended the connection, and the error of an outer tunnel. Stops reading when
/// the peer exceeds a limit.
#[derive(Debug)]
pub(crate) struct Monitored<T> {
    io: T,
    tunnel_state: Arc<TunnelState>,
    inspector: Inspector,
    /// The cost of the data read in this turn.
    read: usize,
}

impl<T> Monitored<T> {
    pub(crate) fn new(io: T, tunnel_state: Arc<TunnelState>, inspector: Inspector) -> Self {
        tunnel_state.activity().set_unfinished(inspector.unfinished());
        Self { io, tunnel_state, inspector, read: 0 }
    }

    /// Counts received data. Returns true if h2 may process it.
    fn inspect(&mut self, read: &[u8]) -> bool {
        let (tunnel_state, activity) = (&self.tunnel_state, self.tunnel_state.activity());
        let frames = self.inspector.data_frames();
        let inspected = self.inspector.inspect(
            read,
            tunnel_state.record_receipt(),
            activity.useful(),
            |update| {
                tunnel_state.handle_window_update(update);
            },
        );
        let cost =
            tunnel_state.traffic.count_received(read.len(), self.inspector.data_frames() - frames);
        self.read = self.read.saturating_add(cost);
        match inspected {
            Ok(unfinished) => activity.set_unfinished(unfinished),
            Err(limit) => tunnel_state.exceed(limit),
        }
        tunnel_state.exceeded().is_none()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Monitored<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.tunnel_state.exceeded().is_some() {
            // When h2 is pending, the connection's task checks for an exceeded limit.
            return Poll::Pending;
        }
        if self.read >= MAX_READ_PER_POLL {
            self.read = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        match &polled {
            Poll::Ready(Ok(())) => {
                if !self.inspect(buf.filled().get(before..).unwrap_or_default()) {
                    buf.set_filled(before);
                    return Poll::Pending;
                }
            }
            Poll::Ready(Err(error)) => {
                if let Some(reason) = known_error(error) {
                    self.tunnel_state.fail(reason);
                }
            }
            Poll::Pending => self.read = 0,
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Monitored<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(cx, buf);
        self.tunnel_state.record_write(&polled);
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // TLS buffers records: only a flush shows whether the connection accepts more.
        let polled = Pin::new(&mut self.io).poll_flush(cx);
        self.tunnel_state.back_pressure.set_blocked(polled.is_pending());
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.tunnel_state.record_write(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::poll_immediate;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use std::sync::atomic::Ordering;

    use super::*;
    use crate::testing::Mesh;
    use crate::tunnel::inspect::PeerRole;

    fn inspector() -> Inspector {
        Inspector::new(PeerRole::Server, 1)
    }

    #[tokio::test]
    async fn bytes_are_counted_in_both_directions() {
        let (tunnel, _server) = Mesh::new().tunnel().await;
        let (near, mut far) = duplex(64);
        let mut near = Monitored::new(near, tunnel.tunnel_state().clone(), inspector());
        let count = || tunnel.tunnel_state().traffic.bytes.load(Ordering::Relaxed);
        let before = count();
        near.write_all(b"request").await.unwrap();
        assert_eq!(count() - before, 7);
        far.write_all(b"answer").await.unwrap();
        near.read_exact(&mut [0; 6]).await.unwrap();
        assert_eq!(count() - before, 13);
    }

    #[tokio::test]
    async fn one_poll_reads_bounded_data_and_schedules_the_next() {
        let (tunnel, _server) = Mesh::new().tunnel().await;
        let (near, mut far) = duplex(2 * MAX_READ_PER_POLL);
        let mut near = Monitored::new(near, tunnel.tunnel_state().clone(), inspector());
        // The start of one DATA frame.
        let head = [0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1];
        far.write_all(&[&head[..], &vec![0; 2 * MAX_READ_PER_POLL - head.len()]].concat())
            .await
            .unwrap();
        let (mut read, mut buffer) = (0, vec![0; MAX_READ_PER_POLL / 4]);
        while let Some(length) = poll_immediate(near.read(&mut buffer)).await {
            read += length.unwrap();
        }
        assert_eq!(read, MAX_READ_PER_POLL);
        // The waiting reader is woken at once.
        assert_eq!(near.read(&mut buffer).await.unwrap(), MAX_READ_PER_POLL / 4);
    }
}
