//! What the parts of one connection share: who the peer is, when it was last heard, how many streams are
//! open, and why the connection failed if it did.
//!
//! Not here: frames. h2 owns the connection; this is what its handles cannot tell.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::{HboneError, PeerIdentity, tls};

/// One connection to a peer.
#[derive(Debug)]
pub(crate) struct Link {
    peer: PeerIdentity,
    opened: Instant,
    /// When bytes last came in, as milliseconds since `opened`.
    heard: AtomicU64,
    load: Mutex<Load>,
    /// Why the connection failed, when h2 does not know: a TLS alert, or a silent peer.
    failure: OnceLock<HboneError>,
    closed: watch::Sender<bool>,
}

#[derive(Debug)]
struct Load {
    open_streams: usize,
    idle_since: Instant,
}

/// Counts as one open stream for as long as it lives.
#[derive(Debug)]
pub(crate) struct OpenStream(Arc<Link>);

impl Link {
    pub(crate) fn new(peer: PeerIdentity) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            peer,
            opened: now,
            heard: AtomicU64::new(0),
            load: Mutex::new(Load { open_streams: 0, idle_since: now }),
            failure: OnceLock::new(),
            closed: watch::Sender::new(false),
        })
    }

    pub(crate) fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    pub(crate) fn last_heard(&self) -> Instant {
        self.opened + Duration::from_millis(self.heard.load(Ordering::Relaxed))
    }

    pub(crate) fn open_streams(&self) -> usize {
        self.load().open_streams
    }

    /// Since when no stream is open; `None` while one is.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let load = self.load();
        (load.open_streams == 0).then_some(load.idle_since)
    }

    pub(crate) fn open_stream(self: &Arc<Self>) -> OpenStream {
        self.load().open_streams += 1;
        OpenStream(self.clone())
    }

    /// Opens a stream unless `limit` are open.
    pub(crate) fn reserve_stream(self: &Arc<Self>, limit: usize) -> Option<OpenStream> {
        let mut load = self.load();
        if load.open_streams >= limit {
            return None;
        }
        load.open_streams += 1;
        Some(OpenStream(self.clone()))
    }

    /// Notes why the connection is about to end. The first reason stays.
    pub(crate) fn fail(&self, reason: HboneError) {
        // A second reason follows from the first.
        let _first = self.failure.set(reason);
    }

    pub(crate) fn close(&self) {
        self.closed.send_replace(true);
    }

    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Waits for the end of the connection.
    pub(crate) async fn closed(&self) {
        // The sender is ours, so this cannot fail.
        let mut closed = self.closed.subscribe();
        let _ended = closed.wait_for(|closed| *closed).await;
    }

    /// Why the connection ended.
    pub(crate) fn lost(&self, source: Option<h2::Error>) -> HboneError {
        let lost = || HboneError::Lost { source: source.map(Arc::new) };
        self.failure.get().cloned().unwrap_or_else(lost)
    }

    /// What an error of a stream means: it was reset alone, or it ended with its connection.
    pub(crate) fn stream_error(&self, error: h2::Error) -> HboneError {
        match error.reason() {
            Some(reason) if error.is_reset() && error.is_remote() => HboneError::Reset { reason },
            _ if error.is_io() || error.is_go_away() => self.lost(Some(error)),
            _ => HboneError::h2(error),
        }
    }

    fn load(&self) -> std::sync::MutexGuard<'_, Load> {
        // Nothing panics while it is held.
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self) {
        let since = self.opened.elapsed().as_millis();
        self.heard.store(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl OpenStream {
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.0
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut load = self.0.load();
        load.open_streams -= 1;
        if load.open_streams == 0 {
            load.idle_since = Instant::now();
        }
    }
}

/// The TLS stream under h2, which tells its [`Link`] what h2 forgets: when bytes came, which alert ended it.
#[derive(Debug)]
pub(crate) struct Monitored<T> {
    io: T,
    link: Arc<Link>,
}

impl<T> Monitored<T> {
    pub(crate) fn new(io: T, link: Arc<Link>) -> Self {
        Self { io, link }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Monitored<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        match &polled {
            Poll::Ready(Ok(())) => self.link.hear(),
            Poll::Ready(Err(error)) => {
                if let Some(reason) = tls::alert_error(error) {
                    self.link.fail(reason);
                }
            }
            Poll::Pending => {}
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
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
