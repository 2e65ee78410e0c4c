//! Resolves the hostnames of workloads without an address by the client of the DNS proxy, and
//! caches the answers.

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use thiserror::Error;
use tokio::time::{Instant, timeout};
use underpass_config::{Hint, IpFamilies, Name};

use crate::decide::route::NextHop;
use crate::dns::cache::{MAX_STALE, STALE_WAIT};
use crate::dns::lookup::{Addresses, HostLookup, HostLookupError};

/// The limits of the lifetime of cached addresses, which is their TTL: it spares the servers, and a
/// changed address is used soon.
const MIN_FRESH_TIME: Duration = Duration::from_secs(1);
const MAX_FRESH_TIME: Duration = Duration::from_mins(5);
/// A lookup that began longer ago is started again: its answer would be stale on arrival.
const MAX_LOOKUP_TIME: Duration = Duration::from_secs(30);
/// The lifetime of a cached failure: it spares an overloaded resolver, and delays recovery only
/// briefly.
const FAILURE_CACHE_TIME: Duration = Duration::from_secs(2);
/// The maximum number of cached names.
const MAX_NAMES: usize = 4096;

/// The reason why a hostname has no address.
#[derive(Debug, Error)]
pub(crate) enum ResolveError {
    #[error("cannot look up {hostname}")]
    Lookup { hostname: Name, source: Arc<HostLookupError> },
    #[error("no answer from the resolver for {hostname} within {} s", after.as_secs_f32())]
    Timeout { hostname: Name, after: Duration },
    #[error("{hostname} has no address of the families in `ipFamilies` of its service")]
    NoAddress { hostname: Name },
}

impl Hint for ResolveError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Lookup { .. } | Self::Timeout { .. } => {
                "check the servers in dns.resolv_conf and the workload's `hostname`"
            }
            Self::NoAddress { .. } => "change `ipFamilies` of the service, or the name's addresses",
        };
        Some(fixed.into())
    }
}

/// Looks up the addresses of a name.
type Lookup = Box<dyn Fn(Name) -> BoxFuture<'static, LookupResult> + Send + Sync>;

/// The result of a lookup, shared by all connections that wait for it.
type LookupResult = Result<Addresses, Arc<HostLookupError>>;

/// Resolves hostnames, with at most one lookup per name at a time.
pub(crate) struct Resolver {
    lookup: Lookup,
    names: Mutex<HashMap<Name, Entry>>,
}

/// The cached results of one name. Ages count from the start of the lookup.
struct Entry {
    addresses: Option<(Addresses, Instant)>,
    failure: Option<(Arc<HostLookupError>, Instant)>,
    /// The running lookup. It continues when the connection that started it is closed.
    pending: Option<(Shared<BoxFuture<'static, LookupResult>>, Instant)>,
    /// The time of the last request for this name.
    used: Instant,
    /// The number of requests, to use several addresses in turn.
    turn: usize,
}

impl Resolver {
    /// A resolver that looks up names by `lookup`.
    pub(crate) fn new(lookup: HostLookup) -> Self {
        let lookup = Arc::new(lookup);
        Self::by(move |name| {
            let lookup = lookup.clone();
            async move { lookup.addresses(&name).await.map_err(Arc::new) }.boxed()
        })
    }

    fn by(
        lookup: impl Fn(Name) -> BoxFuture<'static, LookupResult> + Send + Sync + 'static,
    ) -> Self {
        Self { lookup: Box::new(lookup), names: Mutex::default() }
    }

    /// Resolves the address of `hop`. Several addresses of the same family are used in turn.
    ///
    /// # Errors
    /// The lookup fails, finds no usable address, or exceeds `deadline`.
    pub(crate) async fn resolve(
        &self,
        hop: &NextHop,
        deadline: Duration,
    ) -> Result<SocketAddr, ResolveError> {
        let (hostname, port, families, prefer_v6) = match hop {
            NextHop::Address(address) => return Ok(*address),
            NextHop::Hostname { hostname, port, families, prefer_v6 } => {
                (hostname, *port, *families, *prefer_v6)
            }
        };
        let (addresses, turn) = self.addresses(hostname, deadline).await?;
        let address = pick(&addresses, families, prefer_v6, turn);
        let none = || ResolveError::NoAddress { hostname: hostname.clone() };
        Ok(SocketAddr::new(address.ok_or_else(none)?, port))
    }

    async fn addresses(
        &self,
        hostname: &Name,
        deadline: Duration,
    ) -> Result<(Arc<[IpAddr]>, usize), ResolveError> {
        let (turn, pending, stale) = match self.look_up(hostname) {
            CacheLookup::Known(found, turn) => {
                let failed = |source| ResolveError::Lookup { hostname: hostname.clone(), source };
                return found.map(|(addresses, _)| (addresses, turn)).map_err(failed);
            }
            CacheLookup::Pending { turn, lookup, stale } => (turn, lookup, stale),
        };
        let wait = if stale.is_some() { deadline.min(STALE_WAIT) } else { deadline };
        let error = match timeout(wait, pending.clone()).await {
            Ok(found) => {
                self.store(hostname, &pending, &found);
                match found {
                    Ok((addresses, _)) => return Ok((addresses, turn)),
                    Err(source) => ResolveError::Lookup { hostname: hostname.clone(), source },
                }
            }
            Err(_) => ResolveError::Timeout { hostname: hostname.clone(), after: deadline },
        };
        stale.map(|(addresses, _)| (addresses, turn)).ok_or(error)
    }

    /// The cached addresses of a name, or its running lookup.
    fn look_up(&self, hostname: &Name) -> CacheLookup {
        let now = Instant::now();
        let mut names = self.lock();
        evict_oldest(&mut names, hostname);
        let entry = names.entry(hostname.clone()).or_insert_with(|| Entry::new(now));
        entry.used = now;
        entry.turn = entry.turn.wrapping_add(1);
        let turn = entry.turn;
        let within = |age: Duration| move |since: &Instant| now.duration_since(*since) < age;
        let known = |stale: Duration| {
            let is_known = |((_, ttl), since): &&(Addresses, Instant)| {
                within((*ttl).clamp(MIN_FRESH_TIME, MAX_FRESH_TIME) + stale)(since)
            };
            entry.addresses.as_ref().filter(is_known).map(|(addresses, _)| addresses.clone())
        };
        if let Some(addresses) = known(Duration::ZERO) {
            return CacheLookup::Known(Ok(addresses), turn);
        }
        let stale = known(MAX_STALE);
        if let Some((error, _)) =
            entry.failure.as_ref().filter(|(_, since)| within(FAILURE_CACHE_TIME)(since))
        {
            return CacheLookup::Known(stale.ok_or_else(|| error.clone()), turn);
        }
        entry.pending = entry.pending.take().filter(|(_, since)| within(MAX_LOOKUP_TIME)(since));
        let (lookup, _) =
            entry.pending.get_or_insert_with(|| ((self.lookup)(hostname.clone()).shared(), now));
        CacheLookup::Pending { turn, lookup: lookup.clone(), stale }
    }

    /// Caches the result of a lookup, once.
    fn store(
        &self,
        hostname: &Name,
        lookup: &Shared<BoxFuture<'static, LookupResult>>,
        found: &LookupResult,
    ) {
        let mut names = self.lock();
        let Some(entry) = names.get_mut(hostname) else { return };
        let Some((_, since)) = entry.pending.take_if(|(pending, _)| pending.ptr_eq(lookup)) else {
            return;
        };
        match found {
            Ok(addresses) => {
                entry.addresses = Some((addresses.clone(), since));
                entry.failure = None;
            }
            Err(error) => entry.failure = Some((error.clone(), Instant::now())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Entry>> {
        // No code panics while it holds the lock, and every entry is valid by itself.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of a name in the cache.
enum CacheLookup {
    Known(LookupResult, usize),
    Pending {
        turn: usize,
        lookup: Shared<BoxFuture<'static, LookupResult>>,
        stale: Option<Addresses>,
    },
}

impl Entry {
    fn new(now: Instant) -> Self {
        Self { addresses: None, failure: None, pending: None, used: now, turn: 0 }
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("names", &self.lock().len()).finish_non_exhaustive()
    }
}

/// Evicts the least recently requested name if there is no room for `hostname`.
fn evict_oldest(names: &mut HashMap<Name, Entry>, hostname: &Name) {
    if names.len() < MAX_NAMES || names.contains_key(hostname) {
        return;
    }
    let oldest = names.iter().min_by_key(|(_, entry)| entry.used).map(|(name, _)| name.clone());
    if let Some(oldest) = oldest {
        names.remove(&oldest);
    }
}

/// Selects an accepted address: of the preferred family if there is one, in turn.
fn pick(addresses: &[IpAddr], families: IpFamilies, v6: bool, turn: usize) -> Option<IpAddr> {
    let accepted = || addresses.iter().copied().filter(|address| families.accept(*address));
    let preferred = || accepted().filter(|address| address.is_ipv6() == v6);
    match preferred().count() {
        0 => accepted().nth(turn % accepted().count().max(1)),
        count => preferred().nth(turn % count),
    }
}
