//! What the parts of one connection share: who the peer is, when it was last heard, how many streams are
//! open, how much goes over it, and why it failed if it did.
//!
//! Not here: frames. h2 owns the connection; this is what its handles cannot tell.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::activity::PeerActivity;
use crate::back_pressure::BackPressure;
use crate::distrust::{Distrust, Distrusted};
use crate::inspect::{Inspector, TunnelLimit, WindowUpdate};
use crate::settings::FIRST_WINDOW_UPDATE;
use crate::windows::Unread;
use crate::{HboneError, PeerIdentity, clock, tls};

/// One connection to a peer.
#[derive(Debug)]
pub(crate) struct Link {
    peer: PeerIdentity,
    usable_until: SystemTime,
    opened: Instant,
    /// When bytes last came in, as milliseconds since `opened`.
    heard: AtomicU64,
    traffic: Traffic,
    load: Mutex<Load>,
    unread: Unread,
    activity: PeerActivity,
    back_pressure: BackPressure,
    /// Why the connection failed, when h2 does not know: a TLS alert, or a silent peer.
    failure: OnceLock<HboneError>,
    /// Whether it is to close with its last stream.
    released: AtomicBool,
    trust: Distrusted,
    closed: watch::Sender<bool>,
}

#[derive(Debug)]
struct Load {
    open_streams: usize,
    idle_since: Instant,
}

/// How many bytes go in and out: a count, and now and then a mean. The count costs one addition per read or write;
/// the mean is taken when something is heard, where the time is known anyway. Times are milliseconds since the
/// connection was opened.
#[derive(Debug, Default)]
struct Traffic {
    bytes: AtomicU64,
    /// When the current interval began, and what `bytes` was then.
    since: AtomicU64,
    bytes_before: AtomicU64,
    /// The mean of the interval before, per second.
    mean: AtomicU64,
}

/// Counts as one open stream for as long as it lives.
#[derive(Debug)]
pub(crate) struct OpenStream {
    link: Arc<Link>,
    /// Whether the peer gave a sign that its application reads the stream, since that was last
    /// asked.
    is_read: AtomicBool,
}

impl Link {
    /// `usable_until`: when the first of both sides' certificates expires.
    pub(crate) fn new(peer: PeerIdentity, usable_until: SystemTime) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            peer,
            usable_until,
            opened: now,
            heard: AtomicU64::new(0),
            traffic: Traffic::default(),
            load: Mutex::new(Load { open_streams: 0, idle_since: now }),
            unread: Unread::default(),
            activity: PeerActivity::default(),
            back_pressure: BackPressure::default(),
            failure: OnceLock::new(),
            trust: Distrusted::default(),
            released: AtomicBool::new(false),
            closed: watch::Sender::new(false),
        })
    }

    pub(crate) fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    pub(crate) fn usable_until(&self) -> SystemTime {
        self.usable_until
    }

    /// Whether the first of both sides' certificates has expired: no stream may begin.
    pub(crate) fn is_expired(&self) -> bool {
        clock::now() >= self.usable_until
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

    /// What went over it lately, in both directions: the mean of about a second, or of the silence since.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        self.traffic.mean(self.age())
    }

    /// What went over it so far, in both directions, in bytes.
    pub(crate) fn bytes_moved(&self) -> u64 {
        self.traffic.bytes.load(Ordering::Relaxed)
    }

    /// What its streams hold that was not read.
    pub(crate) fn unread(&self) -> &Unread {
        &self.unread
    }

    pub(crate) fn back_pressure(&self) -> &BackPressure {
        &self.back_pressure
    }

    pub(crate) fn activity(&self) -> &PeerActivity {
        &self.activity
    }

    /// Since when the peer owes the rest of a frame or header block that has a deadline.
    pub(crate) fn unfinished_since(&self, streams_open: bool) -> Option<Instant> {
        let unfinished = self.activity.unfinished()?;
        let has_deadline = !(unfinished.data && streams_open);
        has_deadline.then(|| self.opened + Duration::from_millis(unfinished.since))
    }

    /// Notes that the peer exceeded a limit: the connection is to be closed.
    pub(crate) fn exceed(&self, limit: TunnelLimit) {
        self.activity.exceed(limit);
    }

    pub(crate) fn exceeded(&self) -> Option<TunnelLimit> {
        self.activity.exceeded()
    }

    pub(crate) fn open_stream(self: &Arc<Self>) -> OpenStream {
        self.load().open_streams += 1;
        OpenStream { link: self.clone(), is_read: AtomicBool::new(false) }
    }

    /// Notes why the connection is about to end. The first reason stays.
    pub(crate) fn fail(&self, reason: HboneError) {
        // A second reason follows from the first.
        let _first = self.failure.set(reason);
    }

    /// The same for a peer that is not to be trusted any longer: its streams end at once, whatever of them is still to be read.
    pub(crate) fn distrust(&self, reason: HboneError) {
        self.fail(reason);
        self.trust.tell();
    }

    /// Waits until the peer is not to be trusted any longer.
    pub(crate) fn distrusted(self: &Arc<Self>) -> Distrust {
        Distrust::of(self.clone())
    }

    pub(crate) fn trust(&self) -> &Distrusted {
        &self.trust
    }

    /// Notes that nobody will open a stream any more.
    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }

    /// Whether something is expected of the peer: that it serves a stream, or lets us close the connection.
    pub(crate) fn is_needed(&self) -> bool {
        self.open_streams() > 0 || self.released.load(Ordering::Relaxed)
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

    /// Notes that bytes came; returns when, in milliseconds since the connection was opened.
    fn hear(&self) -> u64 {
        let age = self.age();
        self.heard.store(age, Ordering::Relaxed);
        self.traffic.hear(age);
        age
    }

    fn wrote(&self, polled: &Poll<io::Result<usize>>) {
        match polled {
            Poll::Ready(Ok(bytes)) => self.traffic.count(*bytes),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.back_pressure.set_blocked(true),
        }
    }

    /// The peer returned credit: for a stream of which half a window was read, or at the beginning,
    /// for the connection.
    fn credited(&self, WindowUpdate { stream, increment }: WindowUpdate) {
        if stream != 0 {
            if let Some(open) = self.unread.stream(stream) {
                open.note_sign_of_reading();
            }
        } else if increment == FIRST_WINDOW_UPDATE {
            self.activity.set_accepts_small_frames();
        }
    }

    /// In milliseconds.
    pub(crate) fn age(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Traffic {
    /// Long enough to even out bursts, short enough to notice a bulk transfer when it begins.
    const INTERVAL: u64 = 1000;

    fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn hear(&self, now: u64) {
        let interval = now.saturating_sub(self.since.load(Ordering::Relaxed));
        if interval >= Self::INTERVAL {
            self.mean.store(self.mean_of(interval), Ordering::Relaxed);
            self.since.store(now, Ordering::Relaxed);
            self.bytes_before.store(self.bytes.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn mean(&self, now: u64) -> u64 {
        match now.saturating_sub(self.since.load(Ordering::Relaxed)) {
            interval if interval >= Self::INTERVAL => self.mean_of(interval),
            _ => self.mean.load(Ordering::Relaxed),
        }
    }

    fn mean_of(&self, interval: u64) -> u64 {
        let bytes = self.bytes.load(Ordering::Relaxed);
        bytes.saturating_sub(self.bytes_before.load(Ordering::Relaxed)).saturating_mul(1000)
            / interval.max(1)
    }
}

impl OpenStream {
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    pub(crate) fn note_sign_of_reading(&self) {
        self.is_read.store(true, Ordering::Relaxed);
    }

    pub(crate) fn take_sign_of_reading(&self) -> bool {
        self.is_read.swap(false, Ordering::Relaxed)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut load = self.link.load();
        load.open_streams -= 1;
        if load.open_streams == 0 {
            load.idle_since = Instant::now();
        }
    }
}

/// How much is read in one turn of the task that drives a connection, before the streams get theirs: what they were given is still
/// in the caches then, where it would otherwise be a whole window of it.
const TURN: usize = 256 << 10;

/// The TLS stream under h2, which tells its [`Link`] what h2 forgets: when bytes came, which alert ended it, or what ended the
/// stream that carries it. Nothing is read any more once the peer has exceeded a limit.
#[derive(Debug)]
pub(crate) struct Monitored<T> {
    io: T,
    link: Arc<Link>,
    inspector: Inspector,
    /// How much was read in this turn.
    read: usize,
}

impl<T> Monitored<T> {
    pub(crate) fn new(io: T, link: Arc<Link>, inspector: Inspector) -> Self {
        link.activity().note_unfinished(inspector.unfinished());
        Self { io, link, inspector, read: 0 }
    }

    /// Counts what was read; whether h2 may have it.
    fn inspect(&mut self, read: &[u8]) -> bool {
        let (link, activity) = (&self.link, self.link.activity());
        self.read += read.len();
        link.traffic.count(read.len());
        let inspected = self.inspector.inspect(read, link.hear(), activity.useful(), |update| {
            link.credited(update);
        });
        match inspected {
            Ok(unfinished) => activity.note_unfinished(unfinished),
            Err(limit) => link.exceed(limit),
        }
        link.exceeded().is_none()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Monitored<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.link.exceeded().is_some() {
            // The task that drives the connection looks for this whenever h2 has nothing to do.
            return Poll::Pending;
        }
        if self.read >= TURN {
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
                if let Some(reason) = tls::known_error(error) {
                    self.link.fail(reason);
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
        self.link.wrote(&polled);
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // TLS buffers records: only a flush shows whether the connection took them.
        let polled = Pin::new(&mut self.io).poll_flush(cx);
        self.link.back_pressure.set_blocked(polled.is_pending());
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
        self.link.wrote(&polled);
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

    use super::*;
    use crate::inspect::PeerRole;
    use crate::testing::Mesh;

    fn inspector() -> Inspector {
        Inspector::new(PeerRole::Server, 1)
    }

    #[tokio::test]
    async fn bytes_are_counted_in_both_directions() {
        let (tunnel, _server) = Mesh::new().tunnel().await;
        let (near, mut far) = duplex(64);
        let mut near = Monitored::new(near, tunnel.link().clone(), inspector());
        let count = || tunnel.link().traffic.bytes.load(Ordering::Relaxed);
        let before = count();
        near.write_all(b"request").await.unwrap();
        assert_eq!(count() - before, 7);
        far.write_all(b"answer").await.unwrap();
        near.read_exact(&mut [0; 6]).await.unwrap();
        assert_eq!(count() - before, 13);
    }

    #[tokio::test]
    async fn a_turn_of_reading_ends_though_there_is_more_and_another_follows() {
        let (tunnel, _server) = Mesh::new().tunnel().await;
        let (near, mut far) = duplex(2 * TURN);
        let mut near = Monitored::new(near, tunnel.link().clone(), inspector());
        // The beginning of one DATA frame.
        let head = [0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1];
        far.write_all(&[&head[..], &vec![0; 2 * TURN - head.len()]].concat()).await.unwrap();
        let (mut read, mut buffer) = (0, vec![0; TURN / 4]);
        while let Some(length) = poll_immediate(near.read(&mut buffer)).await {
            read += length.unwrap();
        }
        assert_eq!(read, TURN);
        // Whoever waits is woken at once.
        assert_eq!(near.read(&mut buffer).await.unwrap(), TURN / 4);
    }

    #[test]
    fn the_mean_follows_what_goes_over_the_connection() {
        let traffic = Traffic::default();
        let second = |now: u64, bytes: usize| {
            traffic.count(bytes);
            traffic.hear(now * 1000);
            traffic.mean(now * 1000)
        };
        assert_eq!([second(1, 5000), second(2, 7000), second(3, 0)], [5000, 7000, 0]);
        assert_eq!(second(600, 0), 0);
        assert_eq!(second(601, 9000), 9000, "quiet minutes before do not count");
    }

    #[test]
    fn the_mean_is_known_when_nothing_was_heard_since() {
        let traffic = Traffic::default();
        traffic.count(8000);
        assert_eq!([500, 1000, 2000, 8000].map(|now| traffic.mean(now)), [0, 8000, 4000, 1000]);
    }
}
