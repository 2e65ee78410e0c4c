//! The shared state of one connection: peer, time of the last received data, open streams, traffic,
//! and the reason of failure.
//!
//! Not here: frames, which h2 handles. This state holds what h2's handles do not report.

mod monitored;
mod received;
mod revocation;
mod streams;
mod traffic;
mod windows;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;

pub(crate) use self::monitored::Monitored;
use self::revocation::Revocation;
pub use self::revocation::RevocationSignal;
pub(crate) use self::streams::OpenStream;
use self::streams::Streams;
use self::traffic::Traffic;
pub(crate) use self::windows::Windows;
use crate::clock;
use crate::error::HboneError;
use crate::tls::PeerIdentity;
use crate::tunnel::activity::PeerActivity;
use crate::tunnel::back_pressure::BackPressure;
use crate::tunnel::inspect::{TunnelLimit, WindowUpdate};
use crate::tunnel::settings::FIRST_WINDOW_UPDATE;

/// One connection to a peer.
#[derive(Debug)]
pub(crate) struct TunnelState {
    peer: PeerIdentity,
    usable_until: SystemTime,
    opened: Instant,
    /// Time of the last received bytes, in milliseconds since `opened`.
    received_at: AtomicU64,
    traffic: Traffic,
    load: Mutex<Load>,
    streams: Streams,
    activity: PeerActivity,
    back_pressure: BackPressure,
    /// The reason of failure if h2 has none: a TLS alert, or a silent peer.
    failure: OnceLock<HboneError>,
    /// Whether it closes with its last stream.
    released: AtomicBool,
    revocation: Revocation,
    closed: watch::Sender<bool>,
}

#[derive(Debug)]
struct Load {
    open_streams: usize,
    idle_since: Instant,
}

impl TunnelState {
    /// `usable_until`: the earliest expiry of both certificates.
    pub(crate) fn new(peer: PeerIdentity, usable_until: SystemTime) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            peer,
            usable_until,
            opened: now,
            received_at: AtomicU64::new(0),
            traffic: Traffic::default(),
            load: Mutex::new(Load { open_streams: 0, idle_since: now }),
            streams: Streams::default(),
            activity: PeerActivity::default(),
            back_pressure: BackPressure::default(),
            failure: OnceLock::new(),
            revocation: Revocation::default(),
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

    /// Whether either certificate has expired: no stream may start.
    pub(crate) fn is_expired(&self) -> bool {
        clock::now() >= self.usable_until
    }

    pub(crate) fn last_received(&self) -> Instant {
        self.opened + Duration::from_millis(self.received_at.load(Ordering::Relaxed))
    }

    pub(crate) fn open_streams(&self) -> usize {
        self.load().open_streams
    }

    /// Time at which the last stream ended; `None` while one is open.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let load = self.load();
        (load.open_streams == 0).then_some(load.idle_since)
    }

    /// The data rate of both directions: the mean of about the last second, or of the silence
    /// since.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        self.traffic.mean(self.age())
    }

    pub(crate) fn back_pressure(&self) -> &BackPressure {
        &self.back_pressure
    }

    pub(crate) fn activity(&self) -> &PeerActivity {
        &self.activity
    }

    /// Time since which a frame or header block with a deadline is incomplete.
    pub(crate) fn unfinished_since(&self, streams_open: bool) -> Option<Instant> {
        let unfinished = self.activity.unfinished()?;
        let has_deadline = !(unfinished.data && streams_open);
        has_deadline.then(|| self.opened + Duration::from_millis(unfinished.since))
    }

    /// Records that the peer exceeded a limit, for which the connection is closed.
    pub(crate) fn exceed(&self, limit: TunnelLimit) {
        self.activity.exceed(limit);
    }

    pub(crate) fn exceeded(&self) -> Option<TunnelLimit> {
        self.activity.exceeded()
    }

    pub(crate) fn open_stream(self: &Arc<Self>) -> OpenStream {
        let open = self.unopened_stream();
        open.count();
        open
    }

    /// A stream that counts as open only once its request is accepted.
    pub(crate) fn unopened_stream(self: &Arc<Self>) -> OpenStream {
        OpenStream::new(self.clone())
    }

    fn add_open_stream(&self) {
        self.load().open_streams += 1;
    }

    fn remove_open_stream(&self) {
        let mut load = self.load();
        load.open_streams -= 1;
        if load.open_streams == 0 {
            load.idle_since = Instant::now();
        }
    }

    /// Records why the connection is about to end. The first reason stays.
    pub(crate) fn fail(&self, reason: HboneError) {
        // A second reason follows from the first.
        let _first = self.failure.set(reason);
    }

    /// Records that the peer is no longer trusted: its streams end at once, even with unread data.
    pub(crate) fn revoke(&self, reason: HboneError) {
        self.fail(reason);
        self.revocation.signal();
    }

    /// Waits until the peer is no longer trusted.
    pub(crate) fn revocation(self: &Arc<Self>) -> RevocationSignal {
        RevocationSignal::new(self.clone())
    }

    /// Records that no more streams will be opened.
    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }

    /// Whether the peer must respond: it serves a stream, or the connection is closing.
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
        // We own the sender, so this cannot fail.
        let mut closed = self.closed.subscribe();
        let _ended = closed.wait_for(|closed| *closed).await;
    }

    /// The reason why the connection ended.
    pub(crate) fn lost(&self, source: Option<h2::Error>) -> HboneError {
        let lost = || HboneError::Lost { source: source.map(Arc::new) };
        self.failure.get().cloned().unwrap_or_else(lost)
    }

    /// Converts an error of a stream: it was reset alone, or it ended with its connection.
    pub(crate) fn stream_error(&self, error: h2::Error) -> HboneError {
        match error.reason() {
            Some(reason) if error.is_reset() && error.is_remote() => HboneError::Reset { reason },
            _ if error.is_io() || error.is_go_away() => self.lost(Some(error)),
            _ => HboneError::h2(error),
        }
    }

    fn load(&self) -> std::sync::MutexGuard<'_, Load> {
        // No code panics while it holds the lock.
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that bytes arrived; returns the time in milliseconds since the connection was
    /// opened.
    fn record_receipt(&self) -> u64 {
        let age = self.age();
        self.received_at.store(age, Ordering::Relaxed);
        self.traffic.record_receipt(age);
        age
    }

    fn wrote(&self, polled: &Poll<io::Result<usize>>) {
        match polled {
            Poll::Ready(Ok(bytes)) => self.traffic.count(*bytes),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.back_pressure.set_blocked(true),
        }
    }

    /// Handles returned flow control credit: for a stream after half a window was read, or for the
    /// connection.
    fn credited(&self, WindowUpdate { stream, increment }: WindowUpdate) {
        if stream != 0 {
            if let Some(open) = self.streams.get(stream) {
                open.record_peer_read();
            }
        } else if increment == FIRST_WINDOW_UPDATE {
            self.activity.set_accepts_small_frames();
        }
    }

    /// The age in milliseconds.
    pub(crate) fn age(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
