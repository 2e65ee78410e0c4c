//! A cap on what one source or identity may have at once, whatever it is: handshakes, connections,
//! tunnels.
//!
//! Not here: what becomes of those who are not admitted.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The network part of an IPv6 address: one subscriber has all the addresses below it (RFC 6177).
const SUBSCRIBER: u128 = !0 << 64;

/// Counts by key. Cheap to clone; clones count together.
#[derive(Debug)]
pub struct CountLimit<K: Eq + Hash>(Arc<Shared<K>>);

#[derive(Debug)]
struct Shared<K> {
    each: usize,
    /// Only keys that have something.
    counts: Mutex<HashMap<K, usize>>,
}

/// One of the things that a key has, for as long as it lives.
#[derive(Debug)]
pub struct CountGuard<K: Eq + Hash> {
    limit: CountLimit<K>,
    key: K,
}

/// Counts by source address. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub struct SourceLimit(CountLimit<IpAddr>);

/// One of the things that a source has, for as long as it lives.
pub type SourceGuard = CountGuard<IpAddr>;

impl<K: Eq + Hash + Clone> CountLimit<K> {
    /// A limit of `each` at once for each key.
    pub fn new(each: usize) -> Self {
        Self(Arc::new(Shared { each, counts: Mutex::default() }))
    }

    /// One more of `key`; `None` when it has too many.
    pub fn admit(&self, key: &K) -> Option<CountGuard<K>> {
        let mut counts = self.counts();
        match counts.get_mut(key) {
            Some(count) if *count >= self.0.each => return None,
            Some(count) => *count += 1,
            None if self.0.each == 0 => return None,
            None => {
                counts.insert(key.clone(), 1);
            }
        }
        Some(CountGuard { limit: self.clone(), key: key.clone() })
    }
}

impl<K: Eq + Hash> CountLimit<K> {
    fn counts(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        // Nothing panics while it is held.
        self.0.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Clone for CountLimit<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Eq + Hash> Drop for CountGuard<K> {
    fn drop(&mut self) {
        let mut counts = self.limit.counts();
        match counts.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                counts.remove(&self.key);
            }
        }
    }
}

impl SourceLimit {
    /// A limit of `per_source` at once.
    pub fn new(per_source: usize) -> Self {
        Self(CountLimit::new(per_source))
    }

    /// One more of `source`; `None` when it has too many. An IPv6 source is its /64, and an IPv4
    /// address that came in through an IPv6 socket is an IPv4 address.
    pub fn admit(&self, source: IpAddr) -> Option<SourceGuard> {
        self.0.admit(&network(source))
    }
}

/// What counts as one source: an IPv4 address, or the /64 of an IPv6 address.
pub(crate) fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & SUBSCRIBER)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_source_has_no_more_than_allowed_and_others_are_not_concerned() {
        let limit = SourceLimit::new(2);
        let (first, _second) = (limit.admit(ip("10.0.0.1")), limit.admit(ip("10.0.0.1")));
        assert!(first.is_some() && limit.admit(ip("10.0.0.1")).is_none());
        assert!(limit.clone().admit(ip("10.0.0.1")).is_none(), "clones count together");
        assert!(limit.admit(ip("10.0.0.2")).is_some());
        drop(first);
        assert!(limit.admit(ip("10.0.0.1")).is_some());
    }

    #[test]
    fn an_ipv6_source_is_its_64_and_a_mapped_address_is_ipv4() {
        let limit = SourceLimit::new(1);
        let _held = limit.admit(ip("2001:db8:0:1::1"));
        assert!(limit.admit(ip("2001:db8:0:1:ffff::2")).is_none());
        assert!(limit.admit(ip("2001:db8:0:2::1")).is_some());
        let _held = limit.admit(ip("::ffff:10.0.0.1"));
        assert!(limit.admit(ip("10.0.0.1")).is_none());
        assert!(limit.admit(ip("::ffff:10.0.0.2")).is_some());
    }

    #[test]
    fn sources_that_have_nothing_are_not_remembered() {
        let limit = SourceLimit::new(3);
        for last in 0..=255 {
            let source = IpAddr::from([10, 0, 0, last]);
            let guards = [limit.admit(source), limit.admit(source)];
            assert_eq!(limit.0.counts().len(), 1);
            drop(guards);
        }
        assert!(SourceLimit::new(0).admit(ip("10.0.0.1")).is_none());
        assert_eq!(limit.0.counts().len(), 0);
    }
}
