//! Tunnels kept open, to be shared by all connections to the same peer.
//!
//! What to do is decided in `state`, without waiting for anything; here it is done. A pool belongs
//! to one runtime; its lock is never held across an await.
//!
//! Not here: sockets. They come from [`Dial`].

mod retry;
mod state;
mod through;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use underpass_config::SpiffeId;

use self::state::{Checkout, DialId, Handle, Load, State, TunnelId, Wish};
use crate::clock;
use crate::error::HboneError;
use crate::tunnel::client::{ConnectRequest, Connector, Tunnel};
use crate::tunnel::stream::TunnelStream;
use crate::tunnel::tunnel_state::{OpenStream, TunnelState};

/// Opens the connection under a tunnel: the owner of sockets, marks and source addresses.
pub trait Dial: Send + Sync + 'static {
    /// What a tunnel runs over.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static;

    /// Connects to `address`. The pool sets the deadline.
    fn dial(&self, address: SocketAddr) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

/// The pool's deadlines and limits.
#[derive(Debug, Clone)]
pub struct PoolSettings {
    /// For a connection to be established.
    pub dial: Duration,
    /// For its TLS and HTTP/2 handshake.
    pub handshake: Duration,
    /// For the answer to a CONNECT request.
    pub reply: Duration,
    /// For a tunnel without streams before it is closed, give or take a tenth. One that others can
    /// stand in for goes after a tenth of it.
    pub idle: Duration,
    /// After this, or up to a tenth less, a tunnel takes no new streams. It closes with its last
    /// one.
    pub max_age: Duration,
    /// How many streams share a tunnel, if the peer allows as many.
    pub streams_per_tunnel: usize,
    /// Up to how many tunnels with the same key are opened because the others are half full or
    /// busy. When all are full, another one is opened in any case.
    pub tunnels_per_peer: usize,
}

/// Which tunnels may be shared: those in the name of the same workload to the same address, where
/// the same peers are expected.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Who dials.
    pub source: SpiffeId,
    /// Where to dial.
    pub address: SocketAddr,
    /// Who may answer. Nobody, if empty.
    pub peers: Arc<[SpiffeId]>,
}

/// What a pool holds at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStatistics {
    /// Tunnels that take new streams.
    pub tunnels: usize,
    /// Tunnels that only wait for their last stream.
    pub retired: usize,
    /// Streams in both.
    pub streams: usize,
    /// Dials under way.
    pub dialing: usize,
    /// Destinations that are not dialled, because it failed just now.
    pub backing_off: usize,
}

/// Shares tunnels. Dropping it closes each as its last stream ends.
#[derive(Debug)]
pub struct Pool<D>(Arc<Shared<D>>);

#[derive(Debug)]
struct Shared<D> {
    dial: D,
    settings: PoolSettings,
    state: Mutex<State<Pooled, Dialing>>,
}

/// The outcome of a dial, for all who wait for it; no value yet while it is under way.
type Dialing = watch::Receiver<Option<Outcome>>;
type Outcome = Result<(TunnelId, Pooled), HboneError>;

/// The pool's hold on a tunnel.
#[derive(Debug, Clone)]
struct Pooled {
    /// `None` once it was let go.
    tunnel: Option<Tunnel>,
    tunnel_state: Arc<TunnelState>,
}

/// The right to open one stream in a tunnel.
#[derive(Debug)]
struct Place {
    tunnel: Tunnel,
    open: OpenStream,
}

impl<D: Dial> Pool<D> {
    /// A pool that dials with `dial`.
    pub fn new(dial: D, settings: PoolSettings) -> Self {
        let state = Mutex::new(State::new(settings.clone(), fastrand::u64(..)));
        Self(Arc::new(Shared { dial, settings, state }))
    }

    /// Opens a stream through a tunnel to `key`, by what `request` makes each time that one is
    /// sent. If a tunnel must be dialled,
    /// `connector` opens it; it speaks for `key.source`.
    ///
    /// A request that the peer certainly did not act on, or that was lost with a tunnel from
    /// before, is tried once more in a new tunnel. Nothing else is.
    ///
    /// # Errors
    /// Why the dial, the handshake or the request failed; [`HboneError::BackingOff`] without a new
    /// attempt for up to two seconds after a dial or handshake failed.
    pub async fn connect(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        request: impl Fn() -> ConnectRequest,
    ) -> Result<TunnelStream, HboneError> {
        let first = self.attempt(key, connector, &request, Wish::Any).await;
        let outcome = match first {
            Err((error, pooled)) if retry::is_safe(&error, pooled) => {
                tracing::debug!(
                    address = %key.address,
                    error = &error as &dyn std::error::Error,
                    "the request is tried again in a new tunnel"
                );
                self.attempt(key, connector, &request, Wish::Fresh).await
            }
            answered => answered,
        };
        outcome.map_err(|(error, _)| error)
    }

    /// Lets go of all tunnels, so that each closes as its last stream ends. Whoever comes later has
    /// to dial.
    pub fn drain(&self) {
        self.0.state().drain();
    }

    /// How many tunnels take new streams.
    pub fn tunnels(&self) -> usize {
        self.statistics().tunnels
    }

    /// What is held right now.
    pub fn statistics(&self) -> PoolStatistics {
        self.0.state().statistics(Instant::now())
    }

    /// With an error comes whether the tunnel was there before.
    async fn attempt(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        request: impl Fn() -> ConnectRequest,
        wish: Wish,
    ) -> Result<TunnelStream, (HboneError, bool)> {
        let found = self.place(key, connector, wish).await;
        let (id, Place { tunnel, open }, pooled) = found.map_err(|error| (error, false))?;
        let asked = Instant::now();
        let answer = tunnel.connect_reserved(request, self.0.settings.reply, open).await;
        let timed_out = matches!(answer, Err(HboneError::ReplyTimeout { .. }));
        if timed_out && tunnel.tunnel_state().last_heard() < asked {
            // Not a slow answer but silence: the peer may be gone without a word, so the next one
            // dials anew.
            self.0.state().retire(key, id);
        }
        answer.map_err(|error| (error, pooled))
    }

    async fn place(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        wish: Wish,
    ) -> Result<(TunnelId, Place, bool), HboneError> {
        loop {
            let (mut dialing, promised) = match self.checkout(key, connector, wish) {
                Checkout::Use { id, place } => return Ok((id, place, true)),
                Checkout::Wait { ticket, promised } => (ticket, promised),
                Checkout::Refuse { remaining, last } => {
                    let address = key.address;
                    return Err(HboneError::BackingOff { address, remaining, source: last });
                }
            };
            let outcome = dialing.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
            // The dialling task only goes without a word if it panics, or when the runtime ends.
            let lost = || Err(HboneError::Lost { source: None });
            let (id, tunnel) = outcome.ok().flatten().unwrap_or_else(lost)?;
            // Who was promised nothing leaves the places to those who were.
            if promised && let Some(place) = self.0.state().join(key, &tunnel) {
                return Ok((id, place, false));
            }
        }
    }

    fn checkout(
        &self,
        key: &TunnelKey,
        connector: &Connector,
        wish: Wish,
    ) -> Checkout<Place, Dialing> {
        let mut started = None;
        let checkout = self.0.state().checkout(key, wish, Instant::now(), |id| {
            let (done, dialing) = watch::channel(None);
            started = Some((id, done));
            dialing
        });
        if let Some((id, done)) = started {
            // In a task of its own, so that it goes on when the one who asked first gives up.
            let dial = UnderWay { pool: self.0.clone(), key: key.clone(), id, done };
            tokio::spawn(dial.run(connector.clone()));
        }
        checkout
    }
}

impl<D> Shared<D> {
    fn state(&self) -> MutexGuard<'_, State<Pooled, Dialing>> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle for Pooled {
    type Place = Place;

    fn load(&self) -> Load {
        let open = self.tunnel.as_ref().filter(|tunnel| !tunnel.is_closed());
        Load {
            usable: open.is_some() && clock::now() < self.tunnel_state.usable_until(),
            streams: self.tunnel_state.open_streams(),
            idle_since: self.tunnel_state.idle_since(),
            allowed: self.tunnel.as_ref().and_then(Tunnel::allowed_streams),
            bytes_per_second: self.tunnel_state.bytes_per_second(),
        }
    }

    fn reserve(&self) -> Option<Place> {
        let tunnel = self.tunnel.clone()?;
        Some(Place { tunnel, open: self.tunnel_state.open_stream() })
    }

    fn release(&mut self) {
        self.tunnel_state.release();
        self.tunnel = None;
    }
}

/// A dial that the state counts on, and is told of even if it is dropped half-way.
struct UnderWay<D: Dial> {
    pool: Arc<Shared<D>>,
    key: TunnelKey,
    id: DialId,
    done: watch::Sender<Option<Outcome>>,
}

/// What remains to be done after a dial.
enum Aftermath {
    Watch(TunnelId, Arc<TunnelState>),
    Forget(Instant),
}

impl<D: Dial> UnderWay<D> {
    async fn run(self, connector: Connector) {
        let outcome = self.dial(&connector).await;
        let aftermath = self.finish(outcome);
        let (pool, key) = (Arc::downgrade(&self.pool), self.key.clone());
        // From here on only the pool and its users hold the tunnel open, and only its owner the
        // pool.
        drop((self, connector));
        match aftermath {
            Aftermath::Watch(id, tunnel_state) => watch_tunnel(pool, key, id, tunnel_state).await,
            Aftermath::Forget(due) => forget(pool, key, due).await,
        }
    }

    async fn dial(&self, connector: &Connector) -> Result<Tunnel, HboneError> {
        let (key, settings) = (&self.key, &self.pool.settings);
        let io = timeout(settings.dial, self.pool.dial.dial(key.address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| HboneError::Dial { address: key.address, source: Arc::new(error) })?;
        connector.open(io, key.address, &key.peers, settings.handshake).await
    }

    fn finish(&self, outcome: Result<Tunnel, HboneError>) -> Aftermath {
        let now = Instant::now();
        let mut state = self.pool.state();
        let (outcome, aftermath) = match outcome {
            Ok(tunnel) => {
                let tunnel_state = tunnel.tunnel_state().clone();
                let pooled = Pooled { tunnel: Some(tunnel), tunnel_state: tunnel_state.clone() };
                let id = state.opened(&self.key, self.id, pooled.clone(), now);
                (Ok((id, pooled)), Aftermath::Watch(id, tunnel_state))
            }
            Err(error) => {
                let forget_at = state.failed(&self.key, self.id, Arc::new(error.clone()), now);
                (Err(error), Aftermath::Forget(forget_at))
            }
        };
        drop(state);
        self.done.send_replace(Some(outcome));
        aftermath
    }
}

impl<D: Dial> Drop for UnderWay<D> {
    fn drop(&mut self) {
        if self.done.borrow().is_none() {
            // The dialling code panicked, or the runtime ends. Those who wait see that nobody is
            // left to tell them.
            self.pool.state().abandoned(&self.key, self.id);
        }
    }
}

/// Retires a tunnel when its time has come, and takes it out of the pool when it is closed. It
/// sleeps in between: a tunnel that had streams when it looked is looked at again later, so that no
/// stream has to wake it.
async fn watch_tunnel<D>(
    pool: Weak<Shared<D>>,
    key: TunnelKey,
    id: TunnelId,
    tunnel_state: Arc<TunnelState>,
) {
    let inspect = |pool: Arc<Shared<D>>| pool.state().inspect(&key, id, Instant::now());
    while let Some(look_again) = pool.upgrade().and_then(inspect) {
        tokio::select! {
            () = tunnel_state.closed() => break,
            () = sleep_until(look_again) => {}
        }
    }
    tunnel_state.closed().await;
    let mut due = None;
    if let Some(pool) = pool.upgrade() {
        let mut state = pool.state();
        state.closed(&key, id);
        // TLS 1.3 tells a client only after the handshake that its certificate is refused.
        if let refusal @ HboneError::CertificateRefused { .. } = tunnel_state.lost(None) {
            due = Some(state.back_off(&key, Arc::new(refusal), Instant::now()));
        }
    }
    if let Some(due) = due {
        forget(pool, key, due).await;
    }
}

async fn forget<D>(pool: Weak<Shared<D>>, key: TunnelKey, due: Instant) {
    sleep_until(due).await;
    if let Some(pool) = pool.upgrade() {
        pool.state().forget(&key, Instant::now());
    }
}

#[cfg(test)]
mod tests;
