//! Tunnels kept open, to be shared by all connections to the same peer.
//!
//! Not here: sockets. They come from [`Dial`]. A pool belongs to one runtime; no lock is held across an await.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use underpass_config::SpiffeId;

use crate::link::{Link, OpenStream};
use crate::{ConnectRequest, Connector, HboneError, Tunnel, TunnelStream};

/// Opens the connection under a tunnel: the owner of sockets, marks and source addresses.
pub trait Dial: Send + Sync + 'static {
    /// What a tunnel runs over.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

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
    /// For a tunnel without streams before it is closed.
    pub idle: Duration,
    /// How many streams share a tunnel, if the peer allows as many.
    pub streams_per_tunnel: usize,
}

/// Which tunnels may be shared: those to the same address, where the same peers are expected.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Where to dial.
    pub address: SocketAddr,
    /// Who may answer. Nobody, if empty.
    pub peers: Arc<[SpiffeId]>,
}

/// Shares tunnels. Dropping it closes each as its last stream ends.
#[derive(Debug)]
pub struct Pool<D>(Arc<Shared<D>>);

#[derive(Debug)]
struct Shared<D> {
    dial: D,
    connector: Connector,
    settings: PoolSettings,
    entries: Mutex<HashMap<TunnelKey, Entry>>,
}

/// Removed when it has neither tunnels nor a dial.
#[derive(Debug, Default)]
struct Entry {
    tunnels: Vec<Tunnel>,
    dialing: Option<Dialing>,
}

/// The outcome of a dial, for all who wait for it; no value yet while it is under way.
type Dialing = watch::Receiver<Option<Result<Tunnel, HboneError>>>;

enum Checkout {
    Reserved(Tunnel, OpenStream),
    Wait(Dialing),
}

impl<D: Dial> Pool<D> {
    /// A pool that dials with `dial` and handshakes with `connector`.
    pub fn new(dial: D, connector: Connector, settings: PoolSettings) -> Self {
        Self(Arc::new(Shared { dial, connector, settings, entries: Mutex::default() }))
    }

    /// Opens a stream to `request.authority` through a tunnel to `key`, which is dialled if there is none with room.
    ///
    /// # Errors
    /// Why the dial, the handshake or the request failed. Nothing is tried twice, and no failure is remembered.
    pub async fn connect(
        &self,
        key: &TunnelKey,
        request: ConnectRequest,
    ) -> Result<TunnelStream, HboneError> {
        let (tunnel, open) = self.tunnel(key).await?;
        let asked = Instant::now();
        let answer = tunnel.connect_reserved(request, self.0.settings.reply, open).await;
        let timed_out = matches!(answer, Err(HboneError::ReplyTimeout { .. }));
        if timed_out && tunnel.link().last_heard() < asked {
            // Not a slow answer but silence: the peer may be gone without a word, so the next one dials anew.
            self.0.remove(key, tunnel.link());
        }
        answer
    }

    /// Forgets all tunnels, so that each closes as its last stream ends.
    pub fn drain(&self) {
        self.0.entries().retain(|_, entry| {
            entry.tunnels.clear();
            entry.dialing.is_some()
        });
    }

    /// How many tunnels are held.
    pub fn tunnels(&self) -> usize {
        self.0.entries().values().map(|entry| entry.tunnels.len()).sum()
    }

    async fn tunnel(&self, key: &TunnelKey) -> Result<(Tunnel, OpenStream), HboneError> {
        loop {
            let mut dialing = match self.0.checkout(key) {
                Checkout::Reserved(tunnel, open) => return Ok((tunnel, open)),
                Checkout::Wait(dialing) => dialing,
            };
            let outcome = dialing.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
            // The dialling task only goes without a word when the runtime ends.
            let tunnel =
                outcome.ok().flatten().unwrap_or(Err(HboneError::Lost { source: None }))?;
            if let Some(open) = tunnel.reserve(self.0.settings.streams_per_tunnel) {
                return Ok((tunnel, open));
            }
            // Others that waited filled it: each round serves at least one of us.
        }
    }
}

impl<D: Dial> Shared<D> {
    fn checkout(self: &Arc<Self>, key: &TunnelKey) -> Checkout {
        let mut entries = self.entries();
        let entry = entries.entry(key.clone()).or_default();
        entry.tunnels.retain(|tunnel| !tunnel.is_closed());
        let limit = self.settings.streams_per_tunnel;
        for tunnel in &entry.tunnels {
            if let Some(open) = tunnel.reserve(limit) {
                return Checkout::Reserved(tunnel.clone(), open);
            }
        }
        let under_way = entry.dialing.as_ref().filter(|dialing| dialing.has_changed().is_ok());
        let dialing = under_way.cloned().unwrap_or_else(|| {
            let (done, dialing) = watch::channel(None);
            // In a task of its own, so that it goes on when the one who asked first gives up.
            tokio::spawn(dial_and_watch(self.clone(), key.clone(), done));
            dialing
        });
        entry.dialing = Some(dialing.clone());
        Checkout::Wait(dialing)
    }

    async fn dial(&self, key: &TunnelKey) -> Result<Tunnel, HboneError> {
        let address = key.address;
        let io = timeout(self.settings.dial, self.dial.dial(address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| HboneError::Dial { address, source: Arc::new(error) })?;
        self.connector.open(io, &key.peers, self.settings.handshake).await
    }

    fn dialled(&self, key: &TunnelKey, outcome: &Result<Tunnel, HboneError>) {
        let mut entries = self.entries();
        let entry = entries.entry(key.clone()).or_default();
        entry.dialing = None;
        entry.tunnels.extend(outcome.as_ref().ok().cloned());
        if entry.is_empty() {
            entries.remove(key);
        }
    }

    fn remove(&self, key: &TunnelKey, link: &Arc<Link>) {
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(key) {
            entry.tunnels.retain(|tunnel| !Arc::ptr_eq(tunnel.link(), link));
            if entry.is_empty() {
                entries.remove(key);
            }
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<TunnelKey, Entry>> {
        // Nothing panics while it is held.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.tunnels.is_empty() && self.dialing.is_none()
    }
}

async fn dial_and_watch<D: Dial>(
    shared: Arc<Shared<D>>,
    key: TunnelKey,
    done: watch::Sender<Option<Result<Tunnel, HboneError>>>,
) {
    let outcome = shared.dial(&key).await;
    shared.dialled(&key, &outcome);
    let link = outcome.as_ref().ok().map(|tunnel| tunnel.link().clone());
    done.send_replace(Some(outcome));
    // From here on only the pool and its users hold the tunnel open, and only its owner the pool.
    drop(done);
    let idle = shared.settings.idle;
    let pool = Arc::downgrade(&shared);
    drop(shared);
    if let Some(link) = link {
        watch_tunnel(pool, key, link, idle).await;
    }
}

/// Takes a tunnel out of the pool when it is closed, or had no stream for `idle`. It sleeps in between: a tunnel that
/// was busy when it looked is looked at again after `idle`, so that no stream has to wake it.
async fn watch_tunnel<D: Dial>(
    pool: Weak<Shared<D>>,
    key: TunnelKey,
    link: Arc<Link>,
    idle: Duration,
) {
    loop {
        let look_again =
            link.idle_since().map_or(idle, |since| idle.saturating_sub(since.elapsed()));
        tokio::select! {
            () = link.closed() => {}
            () = sleep(look_again) => {}
        }
        let Some(pool) = pool.upgrade() else { return };
        // A stream that is reserved just now keeps the tunnel alive without the pool.
        let unused = link.idle_since().is_some_and(|since| since.elapsed() >= idle);
        if unused || link.is_closed() {
            pool.remove(&key, &link);
            return;
        }
    }
}

#[cfg(test)]
mod tests;
