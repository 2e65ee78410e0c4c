//! Tests of the resolver's cache: lifetimes, shared lookups and eviction.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use tokio::time::{advance, sleep};

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);
const TTL: Duration = Duration::from_secs(30);

/// A resolver with configured answers and delay, which counts its lookups.
#[derive(Clone, Default)]
struct Dns {
    answer: Arc<Mutex<Option<Vec<IpAddr>>>>,
    delay: Arc<Mutex<Duration>>,
    ttl: Arc<Mutex<Duration>>,
    lookups: Arc<AtomicUsize>,
}

impl Dns {
    fn new(addresses: &[&str]) -> Self {
        let dns = Self::default();
        *dns.delay.lock().unwrap() = Duration::from_secs(1);
        *dns.ttl.lock().unwrap() = TTL;
        dns.answers(Some(addresses));
        dns
    }

    fn answers(&self, addresses: Option<&[&str]>) {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        *self.answer.lock().unwrap() = addresses.map(parse);
    }

    fn delays(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }

    fn lookups(&self) -> usize {
        self.lookups.load(Ordering::Relaxed)
    }

    fn resolver(&self) -> Resolver {
        let dns = self.clone();
        Resolver::by(move |_| {
            let dns = dns.clone();
            async move {
                dns.lookups.fetch_add(1, Ordering::Relaxed);
                let delay = *dns.delay.lock().unwrap();
                sleep(delay).await;
                let answer = dns.answer.lock().unwrap().clone();
                let ttl = *dns.ttl.lock().unwrap();
                let found = answer.map(|answer| (answer.into(), ttl));
                found.ok_or_else(|| Arc::new(HostLookupError::NotFound))
            }
            .boxed()
        })
    }
}

fn hop(hostname: &str, families: IpFamilies, prefer_v6: bool) -> NextHop {
    NextHop::Hostname { hostname: hostname.into(), port: 80, families, prefer_v6 }
}

async fn resolve(resolver: &Resolver) -> Result<String, ResolveError> {
    let found = resolver.resolve(&hop("a.example", IpFamilies::Any, false), DEADLINE).await;
    found.map(|address| address.to_string())
}

#[tokio::test(start_paused = true)]
async fn next_hop_with_address_needs_no_dns_lookup() {
    let dns = Dns::new(&[]);
    let address = "10.0.0.1:80".parse().unwrap();
    let found = dns.resolver().resolve(&NextHop::Address(address), DEADLINE).await;
    assert_eq!((found.unwrap(), dns.lookups()), (address, 0));
}

#[tokio::test(start_paused = true)]
async fn rotates_addresses_of_preferred_family_before_others() {
    let dns = Dns::new(&["10.0.0.1", "fd00::1", "10.0.0.2"]);
    let resolver = dns.resolver();
    let mut turns = Vec::new();
    for _ in 0..4 {
        turns.push(resolve(&resolver).await.unwrap());
    }
    turns.sort();
    assert_eq!(turns, ["10.0.0.1:80", "10.0.0.1:80", "10.0.0.2:80", "10.0.0.2:80"]);
    for (families, prefer_v6, v6) in [
        (IpFamilies::Any, true, true),
        (IpFamilies::V6, false, true),
        (IpFamilies::V4, true, false),
    ] {
        let hop = hop("a.example", families, prefer_v6);
        assert_eq!(resolver.resolve(&hop, DEADLINE).await.unwrap().is_ipv6(), v6);
    }
    assert_eq!(dns.lookups(), 1);
    dns.answers(Some(&["10.0.0.1"]));
    let only_v6 = hop("b.example", IpFamilies::V6, true);
    let error = resolver.resolve(&only_v6, DEADLINE).await.unwrap_err();
    assert!(matches!(error, ResolveError::NoAddress { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn addresses_are_used_until_their_ttl_ends() {
    let dns = Dns::new(&["10.0.0.1"]);
    let resolver = dns.resolver();
    resolve(&resolver).await.unwrap();
    dns.answers(Some(&["10.0.0.2"]));
    advance(TTL - Duration::from_secs(2)).await;
    assert_eq!(resolve(&resolver).await.unwrap(), "10.0.0.1:80");
    advance(Duration::from_secs(1)).await;
    assert_eq!(resolve(&resolver).await.unwrap(), "10.0.0.2:80");
    assert_eq!(dns.lookups(), 2);
}

#[tokio::test(start_paused = true)]
async fn connections_share_dns_lookup_even_if_first_one_closes() {
    let dns = Dns::new(&["10.0.0.1"]);
    let resolver = dns.resolver();
    let hop = hop("a.example", IpFamilies::Any, false);
    let early = resolver.resolve(&hop, Duration::from_millis(500));
    let others = join_all((0..10).map(|_| resolver.resolve(&hop, DEADLINE)));
    let (early, others) = tokio::join!(early, others);
    assert!(matches!(early, Err(ResolveError::Timeout { .. })));
    assert!(others.iter().all(Result::is_ok));
    assert_eq!(dns.lookups(), 1);
}

#[tokio::test(start_paused = true)]
async fn failure_is_cached_for_two_seconds() {
    let dns = Dns::new(&[]);
    dns.answers(None);
    let resolver = dns.resolver();
    for expected in [1, 1] {
        let error = resolve(&resolver).await.unwrap_err();
        assert!(matches!(error, ResolveError::Lookup { .. }), "{error}");
        assert_eq!(dns.lookups(), expected);
    }
    dns.answers(Some(&["10.0.0.1"]));
    advance(FAILURE_CACHE_TIME).await;
    assert_eq!(resolve(&resolver).await.unwrap(), "10.0.0.1:80");
    assert_eq!(dns.lookups(), 2);
}

#[tokio::test(start_paused = true)]
async fn uses_stale_addresses_when_lookup_fails_or_is_slow() {
    let dns = Dns::new(&["10.0.0.1"]);
    let resolver = dns.resolver();
    resolve(&resolver).await.unwrap();
    dns.answers(None);
    advance(TTL).await;
    assert_eq!(resolve(&resolver).await.unwrap(), "10.0.0.1:80");
    dns.delays(Duration::from_mins(1));
    advance(FAILURE_CACHE_TIME).await;
    let begun = Instant::now();
    assert_eq!(resolve(&resolver).await.unwrap(), "10.0.0.1:80");
    assert_eq!(begun.elapsed(), STALE_WAIT);
    advance(MAX_STALE).await;
    let error = resolve(&resolver).await.unwrap_err();
    assert!(matches!(error, ResolveError::Timeout { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn abandoned_lookup_is_restarted() {
    let dns = Dns::new(&["10.0.0.1"]);
    let resolver = dns.resolver();
    let hop = hop("a.example", IpFamilies::Any, false);
    resolver.resolve(&hop, Duration::from_millis(500)).await.unwrap_err();
    dns.answers(Some(&["10.0.0.2"]));
    advance(TTL).await;
    assert_eq!(resolve(&resolver).await.unwrap(), "10.0.0.2:80");
    assert_eq!(dns.lookups(), 2);
}

#[tokio::test(start_paused = true)]
async fn evicts_least_recently_requested_name() {
    let dns = Dns::new(&["10.0.0.1"]);
    dns.delays(Duration::ZERO);
    let resolver = dns.resolver();
    for index in 0..=MAX_NAMES {
        let hop = hop(&format!("{index}.example"), IpFamilies::Any, false);
        resolver.resolve(&hop, DEADLINE).await.unwrap();
        advance(Duration::from_nanos(1)).await;
    }
    let names = resolver.lock();
    assert_eq!(names.len(), MAX_NAMES);
    assert!(!names.contains_key("0.example") && names.contains_key("1.example"));
}

#[tokio::test(start_paused = true)]
async fn very_short_and_very_long_ttls_are_bounded() {
    for (ttl, lifetime) in
        [(Duration::ZERO, MIN_FRESH_TIME), (Duration::from_hours(24), MAX_FRESH_TIME)]
    {
        let dns = Dns::new(&["10.0.0.1"]);
        *dns.ttl.lock().unwrap() = ttl;
        *dns.delay.lock().unwrap() = Duration::ZERO;
        let resolver = dns.resolver();
        for (wait, lookups) in [(Duration::ZERO, 1), (lifetime / 2, 1), (lifetime, 2)] {
            advance(wait).await;
            resolve(&resolver).await.unwrap();
            assert_eq!(dns.lookups(), lookups, "{ttl:?}");
        }
    }
}
