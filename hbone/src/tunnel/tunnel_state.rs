//! What the parts of one connection share: who the peer is, when it was last heard, how many
//! streams are open, how much goes over it, and why it failed if it did.
//!
//! Not here: frames. h2 owns the connection; this is what its handles cannot tell.

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
    /// When bytes last came in, as milliseconds since `opened`.
    heard: AtomicU64,
    traffic: Traffic,
    load: Mutex<Load>,
    streams: Streams,
    activity: PeerActivity,
    back_pressure: BackPressure,
    /// Why the connection failed, when h2 does not know: a TLS alert, or a silent peer.
    failure: OnceLock<HboneError>,
    /// Whether it is to close with its last stream.
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

    /// What went over it lately, in both directions: the mean of about a second, or of the silence
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

    /// Notes why the connection is about to end. The first reason stays.
    pub(crate) fn fail(&self, reason: HboneError) {
        // A second reason follows from the first.
        let _first = self.failure.set(reason);
    }

    /// The same for a peer that is not to be trusted any longer: its streams end at once, whatever
    /// of them is still to be read.
    pub(crate) fn revoke(&self, reason: HboneError) {
        self.fail(reason);
        self.revocation.signal();
    }

    /// Waits until the peer is not to be trusted any longer.
    pub(crate) fn revocation(self: &Arc<Self>) -> RevocationSignal {
        RevocationSignal::new(self.clone())
    }

    /// Notes that nobody will open a stream any more.
    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }

    /// Whether something is expected of the peer: that it serves a stream, or lets us close the
    /// connection.
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
            if let Some(open) = self.streams.get(stream) {
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
