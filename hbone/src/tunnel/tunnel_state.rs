//! The shared state of one connection: peer, time of the last received data, open streams, traffic,
//! and the reason of its failure.
//!
//! It contains only the state that h2 does not report.

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

/// The state of one connection to a peer.
#[derive(Debug)]
pub(crate) struct TunnelState {
    peer: PeerIdentity,
    usable_until: SystemTime,
    /// The start of the TLS handshake.
    began: Instant,
    /// The end of the TLS handshake.
    opened: Instant,
    /// The time of the last received bytes, in milliseconds since `opened`.
    received_at: AtomicU64,
    traffic: Traffic,
    load: Mutex<StreamCount>,
    streams: Streams,
    activity: PeerActivity,
    back_pressure: BackPressure,
    /// A reason of failure that h2 does not report: a TLS alert, or a silent peer.
    failure: OnceLock<HboneError>,
    /// True if the connection closes with its last stream.
    released: AtomicBool,
    revocation: Revocation,
    closed: watch::Sender<bool>,
}

#[derive(Debug)]
struct StreamCount {
    open_streams: usize,
    idle_since: Instant,
}

impl TunnelState {
    /// `began`: the start of the TLS handshake. `usable_until`: the earlier expiry of both
    /// certificates.
    pub(crate) fn new(peer: PeerIdentity, began: Instant, usable_until: SystemTime) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            peer,
            usable_until,
            began,
            opened: now,
            received_at: AtomicU64::new(0),
            traffic: Traffic::default(),
            load: Mutex::new(StreamCount { open_streams: 0, idle_since: now }),
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

    /// The start and the end of the TLS handshake.
    pub(crate) fn handshake(&self) -> [Instant; 2] {
        [self.began, self.opened]
    }

    /// Returns true if either certificate has expired. No stream may start then.
    pub(crate) fn is_expired(&self) -> bool {
        clock::now() >= self.usable_until
    }

    pub(crate) fn last_received(&self) -> Instant {
        self.opened + Duration::from_millis(self.received_at.load(Ordering::Relaxed))
    }

    pub(crate) fn open_streams(&self) -> usize {
        self.stream_count().open_streams
    }

    /// The time at which the last stream ended. `None` while a stream is open.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let load = self.stream_count();
        (load.open_streams == 0).then_some(load.idle_since)
    }

    /// The mean data rate of both directions during the last second, or longer without traffic.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        self.traffic.mean(self.age())
    }

    pub(crate) fn back_pressure(&self) -> &BackPressure {
        &self.back_pressure
    }

    pub(crate) fn activity(&self) -> &PeerActivity {
        &self.activity
    }

    /// The start time of an unfinished frame or header block that has a deadline.
    pub(crate) fn unfinished_since(&self, has_streams: bool) -> Option<Instant> {
        let unfinished = self.activity.unfinished()?;
        let has_deadline = !(unfinished.data && has_streams);
        has_deadline.then(|| self.opened + Duration::from_millis(unfinished.since))
    }

    /// Records that the peer exceeded a limit. The connection's task then closes the connection.
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

    /// Creates a stream that counts as open only once its request is accepted.
    pub(crate) fn unopened_stream(self: &Arc<Self>) -> OpenStream {
        OpenStream::new(self.clone())
    }

    fn add_open_stream(&self) {
        self.stream_count().open_streams += 1;
    }

    fn remove_open_stream(&self) {
        let mut load = self.stream_count();
        load.open_streams -= 1;
        if load.open_streams == 0 {
            load.idle_since = Instant::now();
        }
    }

    /// Records the reason why the connection is about to end. The first reason counts.
    pub(crate) fn fail(&self, reason: HboneError) {
        // Ignore a second reason, which follows from the first.
        let _first = self.failure.set(reason);
    }

    /// Records that the peer is no longer trusted. Its streams end at once, even with unread data.
    pub(crate) fn revoke(&self, reason: HboneError) {
        self.fail(reason);
        self.revocation.signal();
    }

    /// Returns a signal that completes when the peer is no longer trusted.
    pub(crate) fn revocation(self: &Arc<Self>) -> RevocationSignal {
        RevocationSignal::new(self.clone())
    }

    /// Records that no more streams will be opened.
    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }

    /// Returns true while the peer must respond: it serves a stream, or the connection is closing.
    pub(crate) fn is_needed(&self) -> bool {
        self.open_streams() > 0 || self.released.load(Ordering::Relaxed)
    }

    pub(crate) fn close(&self) {
        self.closed.send_replace(true);
    }

    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Waits until the connection has ended.
    pub(crate) async fn closed(&self) {
        // Never fails: `self` owns the sender.
        let mut closed = self.closed.subscribe();
        let _ended = closed.wait_for(|closed| *closed).await;
    }

    /// The reason why the connection ended.
    pub(crate) fn lost(&self, source: Option<h2::Error>) -> HboneError {
        let lost = || HboneError::Lost { source: source.map(Arc::new) };
        self.failure.get().cloned().unwrap_or_else(lost)
    }

    /// Converts an error of a stream, which was reset or ended with its connection.
    pub(crate) fn stream_error(&self, error: h2::Error) -> HboneError {
        match error.reason() {
            Some(reason) if error.is_reset() && error.is_remote() => HboneError::Reset { reason },
            _ if error.is_io() || error.is_go_away() => self.lost(Some(error)),
            _ => HboneError::h2(error),
        }
    }

    fn stream_count(&self) -> std::sync::MutexGuard<'_, StreamCount> {
        // No code panics while it holds the lock.
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that bytes arrived. Returns the time in milliseconds since the connection opened.
    fn record_receipt(&self) -> u64 {
        let age = self.age();
        self.received_at.store(age, Ordering::Relaxed);
        self.traffic.record_receipt(age);
        age
    }

    fn record_write(&self, polled: &Poll<io::Result<usize>>) {
        match polled {
            Poll::Ready(Ok(bytes)) => self.traffic.count(*bytes),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.back_pressure.set_blocked(true),
        }
    }

    /// Handles a WINDOW_UPDATE. A peer sends it for a stream after its application read half of the
    /// window.
    fn handle_window_update(&self, WindowUpdate { stream, increment }: WindowUpdate) {
        if stream != 0 {
            if let Some(open) = self.streams.get(stream) {
                open.record_peer_read();
            }
        } else if increment == FIRST_WINDOW_UPDATE {
            self.activity.set_accepts_small_frames();
        }
    }

    /// The age of the connection in milliseconds.
    pub(crate) fn age(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
