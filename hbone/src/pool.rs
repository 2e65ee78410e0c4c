//! A pool of open tunnels, which connections to the same peer share.
//!
//! `state` makes all decisions without waiting; this file executes them. A pool belongs to one
//! runtime. Its lock is never held across an await.
//!
//! [`Dial`] opens the sockets.

mod gateway;
mod retry;
mod state;
mod tunnel_load;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::lookup_host;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};
use underpass_config::SpiffeId;

use self::state::{Checkout, DialId, Handle, PoolState, Reuse, TunnelId};
use self::tunnel_load::TunnelLoad;
use crate::clock;
use crate::error::HboneError;
use crate::task::log_panic;
use crate::tunnel::client::{ConnectRequest, Connector, Tunnel};
use crate::tunnel::stream::TunnelStream;
use crate::tunnel::tunnel_state::{OpenStream, TunnelState};

/// Opens the TCP connection of a tunnel.
pub trait Dial: Send + Sync + 'static {
    /// The type of the connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static;

    /// Connects to `address`. The pool sets the deadline.
    fn dial(&self, address: SocketAddr) -> impl Future<Output = io::Result<Self::Io>> + Send;

    /// Called for each event in the pool, for metrics. Must not block.
    fn observe(&self, _event: PoolEvent) {}
}

/// An event in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolEvent {
    /// A request is sent in a tunnel that was open before.
    Reused,
    /// A request is sent in a tunnel that was opened for it.
    Opened,
    /// The TLS and HTTP/2 handshake of a tunnel has succeeded, and took this long.
    Handshake(Duration),
    /// A tunnel could not be opened.
    DialFailed,
    /// A request was refused without an attempt, because the peer is in back-off.
    BackedOff,
}

/// Connects to the first address of a host that answers.
pub(crate) async fn dial_host<D: Dial>(dial: &D, host: &str, port: u16) -> io::Result<D::Io> {
    let addresses: Vec<SocketAddr> = lookup_host((host, port)).await?.collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match dial.dial(address).await {
            Ok(io) => return Ok(io),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The pool's deadlines and limits.
#[derive(Debug, Clone)]
pub struct PoolSettings {
    /// The timeout of the TCP connect.
    pub dial: Duration,
    /// The timeout of the TLS and HTTP/2 handshake.
    pub handshake: Duration,
    /// The timeout of the answer to a CONNECT request.
    pub reply: Duration,
    /// The idle timeout of a tunnel without streams, with a jitter of a tenth. While another tunnel
    /// to the peer has capacity, a tenth of this timeout applies.
    pub idle: Duration,
    /// The age after which a tunnel takes no new streams and closes with its last stream. A random
    /// part of up to a tenth is subtracted.
    pub max_age: Duration,
    /// The maximum number of streams in a tunnel. The peer may allow fewer.
    pub streams_per_tunnel: usize,
    /// If all tunnels to a peer are half full or busy, the pool opens another one, up to this
    /// number of tunnels. If all are full, it opens another one regardless of this number.
    pub tunnels_per_peer: usize,
}

/// The properties that all streams of a tunnel share: source identity, address, and expected peers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// The identity of the client.
    pub source: SpiffeId,
    /// The address of the server.
    pub address: SocketAddr,
    /// The expected identities of the server. An empty list accepts no server.
    pub peers: Arc<[SpiffeId]>,
}

/// The current number of tunnels, streams and dials of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStatistics {
    /// The number of tunnels that take new streams.
    pub tunnels: usize,
    /// The number of tunnels that take no new streams and close with their last stream.
    pub retired: usize,
    /// The number of streams in all tunnels.
    pub streams: usize,
    /// The number of dials in progress.
    pub dialing: usize,
    /// The number of peers in back-off.
    pub backing_off: usize,
}

/// The tunnels, streams and dials of a pool to one peer.
#[derive(Debug, Clone)]
pub struct PeerTunnels {
    /// The identity of the client, the address of the peer, and its expected identities.
    pub key: TunnelKey,
    /// The counts of this peer alone.
    pub counts: PoolStatistics,
    /// The remaining back-off after a failed dial, and the error of that dial.
    pub back_off: Option<(Duration, Arc<HboneError>)>,
}

/// A pool of tunnels. When it is dropped, each tunnel closes with its last stream.
#[derive(Debug)]
pub struct Pool<D>(Arc<Shared<D>>);

#[derive(Debug)]
struct Shared<D> {
    dial: D,
    settings: PoolSettings,
    state: Mutex<PoolState<Pooled, OutcomeReceiver>>,
    /// Notified when the pool drains: aborts the dials in progress.
    drained: Notify,
}

/// The outcome of a dial, for all connections that wait for it. `None` while the dial is in
/// progress.
type OutcomeReceiver = watch::Receiver<Option<Outcome>>;
type Outcome = Result<(TunnelId, Pooled), HboneError>;

/// A tunnel in the pool.
#[derive(Debug, Clone)]
struct Pooled {
    /// `None` after the pool released the tunnel.
    tunnel: Option<Tunnel>,
    tunnel_state: Arc<TunnelState>,
}

#[derive(Debug)]
struct StreamSlot {
    tunnel: Tunnel,
    open: OpenStream,
}

impl<D: Dial> Pool<D> {
    /// Creates a pool that opens connections with `dial`.
    pub fn new(dial: D, settings: PoolSettings) -> Self {
        let state = Mutex::new(PoolState::new(settings.clone(), fastrand::u64(..)));
        Self(Arc::new(Shared { dial, settings, state, drained: Notify::new() }))
    }

    /// Opens a stream in a tunnel to `key`. Calls `request` for the request of each attempt. If a
    /// tunnel must be opened, `connector` opens it; its identity must be `key.source`.
    ///
    /// Retries once in a new tunnel, and only if the peer has certainly not processed the request,
    /// or if the request was lost together with a pooled tunnel.
    ///
    /// # Errors
    /// The error of the dial, handshake or request. [`HboneError::BackingOff`] without an attempt,
    /// for up to two seconds after a failed dial or handshake.
    pub async fn connect(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        request: impl Fn() -> ConnectRequest,
    ) -> Result<TunnelStream, HboneError> {
        let first = self.attempt(key, connector, &request, Reuse::Allowed).await;
        let outcome = match first {
            Err((error, pooled)) if retry::is_retryable(&error, pooled) => {
                tracing::debug!(
                    address = %key.address,
                    error = &error as &dyn std::error::Error,
                    "retrying the request in a new tunnel"
                );
                self.attempt(key, connector, &request, Reuse::Forbidden).await
            }
            answered => answered,
        };
        outcome.map_err(|(error, _)| error)
    }

    /// Releases all tunnels: each closes with its last stream. Aborts the dials in progress;
    /// connections that wait for them get [`HboneError::Lost`]. Later streams open new tunnels.
    pub fn drain(&self) {
        self.0.state().drain();
        self.0.drained.notify_waiters();
    }

    /// The number of tunnels that take new streams.
    pub fn tunnels(&self) -> usize {
        self.statistics().tunnels
    }

    /// The current number of tunnels, streams and dials.
    pub fn statistics(&self) -> PoolStatistics {
        self.0.state().statistics(Instant::now())
    }

    /// The current tunnels, streams and dials to each peer, in no order.
    pub fn peers(&self) -> Vec<PeerTunnels> {
        self.0.state().peers(Instant::now())
    }

    /// Attempts a request once. The flag in the error is true if the tunnel was in the pool before.
    async fn attempt(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        request: impl Fn() -> ConnectRequest,
        reuse: Reuse,
    ) -> Result<TunnelStream, (HboneError, bool)> {
        let found = self.stream_slot(key, connector, reuse).await;
        let (id, StreamSlot { tunnel, open }, pooled) = found.map_err(|error| (error, false))?;
        self.0.dial.observe(if pooled { PoolEvent::Reused } else { PoolEvent::Opened });
        let asked = Instant::now();
        let answer = tunnel.connect_reserved(request, self.0.settings.reply, open).await;
        let timed_out = matches!(answer, Err(HboneError::ReplyTimeout { .. }));
        if timed_out && tunnel.tunnel_state().last_received() < asked {
            // The whole tunnel is silent, not only this answer: the peer may be lost. The next
            // stream dials.
            self.0.state().retire(key, id);
        }
        answer.map_err(|error| (error, pooled))
    }

    async fn stream_slot(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        reuse: Reuse,
    ) -> Result<(TunnelId, StreamSlot, bool), HboneError> {
        loop {
            let (mut dialing, promised) = match self.checkout(key, connector, reuse) {
                Checkout::Use { id, stream_slot } => return Ok((id, stream_slot, true)),
                Checkout::Wait { ticket, promised } => (ticket, promised),
                Checkout::Refuse { remaining, last } => {
                    let address = key.address;
                    self.0.dial.observe(PoolEvent::BackedOff);
                    return Err(HboneError::BackingOff { address, remaining, source: last });
                }
            };
            let outcome = dialing.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
            // The dialling task sends no outcome only if the pool drains, the task panics or the
            // runtime ends.
            let lost = || Err(HboneError::Lost { source: None });
            let (id, tunnel) = outcome.ok().flatten().unwrap_or_else(lost)?;
            // The promised streams of the new tunnel are reserved for the connections that waited
            // for it.
            if promised && let Some(stream_slot) = self.0.state().join(key, &tunnel) {
                return Ok((id, stream_slot, false));
            }
        }
    }

    fn checkout(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        reuse: Reuse,
    ) -> Checkout<StreamSlot, OutcomeReceiver> {
        let mut started = None;
        let checkout = self.0.state().checkout(key, reuse, Instant::now(), |id| {
            let (done, dialing) = watch::channel(None);
            started = Some((id, done));
            dialing
        });
        if let Some((id, done)) = started {
            // Dial in a separate task: the dial continues when the connection that started it is
            // cancelled.
            let dial = DialInProgress { pool: self.0.clone(), key: key.clone(), id, done };
            tokio::spawn(log_panic("dial of a tunnel", dial.run(connector.clone())));
        }
        checkout
    }
}

impl<D> Shared<D> {
    fn state(&self) -> MutexGuard<'_, PoolState<Pooled, OutcomeReceiver>> {
        // No code panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle for Pooled {
    type StreamSlot = StreamSlot;

    fn current_load(&self) -> TunnelLoad {
        let open = self.tunnel.as_ref().filter(|tunnel| !tunnel.is_closed());
        TunnelLoad {
            usable: open.is_some() && clock::now() < self.tunnel_state.usable_until(),
            streams: self.tunnel_state.open_streams(),
            idle_since: self.tunnel_state.idle_since(),
            allowed: self.tunnel.as_ref().and_then(Tunnel::allowed_streams),
            bytes_per_second: self.tunnel_state.bytes_per_second(),
        }
    }

    fn reserve(&self) -> Option<StreamSlot> {
        let tunnel = self.tunnel.clone()?;
        Some(StreamSlot { tunnel, open: self.tunnel_state.open_stream() })
    }

    fn release(&mut self) {
        self.tunnel_state.release();
        self.tunnel = None;
    }
}

/// A dial in progress. Reports its end to the pool's state, even if it is dropped.
struct DialInProgress<D: Dial> {
    pool: Arc<Shared<D>>,
    key: TunnelKey,
    id: DialId,
    done: watch::Sender<Option<Outcome>>,
}

/// The work that follows a dial.
enum DialFollowUp {
    Watch(TunnelId, Arc<TunnelState>),
    RemoveBackoff(Instant),
}

impl<D: Dial> DialInProgress<D> {
    async fn run(self, connector: Connector) {
        let outcome = tokio::select! {
            outcome = self.dial(&connector) => outcome,
            // Dropping `self` removes the dial from the state, and wakes the connections that wait
            // for it.
            () = self.pool.drained.notified() => return,
        };
        let follow_up = self.finish(outcome);
        let (pool, key) = (Arc::downgrade(&self.pool), self.key.clone());
        // Drop these references: from here on the task must not keep the tunnel or the pool alive.
        drop((self, connector));
        match follow_up {
            DialFollowUp::Watch(id, tunnel_state) => {
                watch_tunnel(pool, key, id, tunnel_state).await
            }
            DialFollowUp::RemoveBackoff(due) => remove_backoff(pool, key, due).await,
        }
    }

    async fn dial(&self, connector: &Connector) -> Result<Tunnel, HboneError> {
        let (key, settings) = (&self.key, &self.pool.settings);
        let io = timeout(settings.dial, self.pool.dial.dial(key.address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| HboneError::Dial { address: key.address, source: Arc::new(error) })?;
        let began = Instant::now();
        let tunnel = connector.open(io, key.address, &key.peers, settings.handshake).await?;
        self.pool.dial.observe(PoolEvent::Handshake(began.elapsed()));
        Ok(tunnel)
    }

    fn finish(&self, outcome: Result<Tunnel, HboneError>) -> DialFollowUp {
        let now = Instant::now();
        let mut state = self.pool.state();
        let (outcome, follow_up) = match outcome {
            Ok(tunnel) => {
                let tunnel_state = tunnel.tunnel_state().clone();
                let pooled = Pooled { tunnel: Some(tunnel), tunnel_state: tunnel_state.clone() };
                let id = state.opened(&self.key, self.id, pooled.clone(), now);
                (Ok((id, pooled)), DialFollowUp::Watch(id, tunnel_state))
            }
            Err(error) => {
                self.pool.dial.observe(PoolEvent::DialFailed);
                let forget_at = state.failed(&self.key, self.id, Arc::new(error.clone()), now);
                (Err(error), DialFollowUp::RemoveBackoff(forget_at))
            }
        };
        drop(state);
        self.done.send_replace(Some(outcome));
        follow_up
    }
}

impl<D: Dial> Drop for DialInProgress<D> {
    fn drop(&mut self) {
        if self.done.borrow().is_none() {
            // The pool drains, the dialling code panicked, or the runtime ends. Dropping the sender
            // wakes the waiting connections.
            self.pool.state().abandoned(&self.key, self.id);
        }
    }
}

/// Retires a tunnel when it is too old or idle, and removes it when it is closed. Checks by a
/// timer: a busy tunnel is checked again later, so that streams need not wake this task.
async fn watch_tunnel<D>(
    pool: Weak<Shared<D>>,
    key: TunnelKey,
    id: TunnelId,
    tunnel_state: Arc<TunnelState>,
) {
    let inspect = |pool: Arc<Shared<D>>| pool.state().inspect(&key, id, Instant::now());
    while let Some(next_check) = pool.upgrade().and_then(inspect) {
        tokio::select! {
            () = tunnel_state.closed() => break,
            () = sleep_until(next_check) => {}
        }
    }
    tunnel_state.closed().await;
    let mut due = None;
    if let Some(pool) = pool.upgrade() {
        let mut state = pool.state();
        state.closed(&key, id);
        // In TLS 1.3 the server refuses a client's certificate only after the client's handshake
        // ended.
        if let refusal @ HboneError::CertificateRefused { .. } = tunnel_state.lost(None) {
            due = Some(state.back_off(&key, Arc::new(refusal), Instant::now()));
        }
    }
    if let Some(due) = due {
        remove_backoff(pool, key, due).await;
    }
}

async fn remove_backoff<D>(pool: Weak<Shared<D>>, key: TunnelKey, due: Instant) {
    sleep_until(due).await;
    if let Some(pool) = pool.upgrade() {
        pool.state().remove_expired_backoff(&key, Instant::now());
    }
}

#[cfg(test)]
mod tests;
