//! Ends a connection whose peer reads too slowly.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// Timeout for a write: the peer reads nothing meanwhile.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

pin_project! {
    /// A connection whose writes fail after [`STALL_TIMEOUT`] without progress.
    pub(super) struct StallTimeout<S> {
        #[pin]
        stream: S,
        #[pin]
        deadline: Sleep,
        is_stalled: bool,
    }
}

impl<S> StallTimeout<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, deadline: sleep(STALL_TIMEOUT), is_stalled: false }
    }

    /// Passes the result of a write on, or fails if writes have made no progress for too long.
    fn bound<T>(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let mut this = self.project();
        if let Poll::Ready(written) = write(this.stream, context) {
            *this.is_stalled = false;
            return Poll::Ready(written);
        }
        if !*this.is_stalled {
            *this.is_stalled = true;
            this.deadline.as_mut().reset(Instant::now() + STALL_TIMEOUT);
        }
        ready!(this.deadline.poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead> AsyncRead for StallTimeout<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.project().stream.poll_read(context, buffer)
    }
}

impl<S: AsyncWrite> AsyncWrite for StallTimeout<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.bound(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.bound(context, |stream, context| stream.poll_write_vectored(context, slices))
    }

    /// Otherwise hyper would copy each part of an answer.
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bound(context, AsyncWrite::poll_flush)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bound(context, AsyncWrite::poll_shutdown)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn write_fails_if_the_peer_stops_reading() {
        let (ours, mut theirs) = tokio::io::duplex(8);
        let mut ours = Box::pin(StallTimeout::new(ours));
        let began = Instant::now();
        ours.write_all(&[0; 8]).await.unwrap();
        // A peer that reads slowly, but does read, is served.
        for _ in 0..3 {
            let reading = async {
                sleep(STALL_TIMEOUT - Duration::from_secs(1)).await;
                theirs.read_exact(&mut [0; 8]).await.unwrap();
            };
            let (written, ()) = tokio::join!(ours.write_all(&[0; 8]), reading);
            written.unwrap();
        }
        let served = began.elapsed();
        assert!(served > 2 * STALL_TIMEOUT, "{served:?}");
        let error = ours.write_all(&[0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed() - served, STALL_TIMEOUT);
    }
}
