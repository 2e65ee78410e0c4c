//! A cap on what one source may have at once, whatever it is: handshakes, connections.
//!
//! Not here: what becomes of those who are not admitted.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The network part of an IPv6 address: one subscriber has all the addresses below it (RFC 6177).
const SUBSCRIBER: u128 = !0 << 64;

/// Counts by source. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub struct SourceLimit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    per_source: usize,
    /// Only sources that have something.
    counts: Mutex<HashMap<IpAddr, usize>>,
}

/// One of the things that a source has, for as long as it lives.
#[derive(Debug)]
pub struct SourceGuard {
    limit: SourceLimit,
    source: IpAddr,
}

impl SourceLimit {
    /// A limit of `per_source` at once.
    pub fn new(per_source: usize) -> Self {
        Self(Arc::new(Shared { per_source, counts: Mutex::default() }))
    }

    /// One more of `source`; `None` when it has too many. An IPv6 source is its /64, and an IPv4 address that came in
    /// through an IPv6 socket is an IPv4 address.
    pub fn admit(&self, source: IpAddr) -> Option<SourceGuard> {
        let source = network(source);
        let mut counts = self.counts();
        let count = counts.get(&source).copied().unwrap_or(0);
        if count >= self.0.per_source {
            return None;
        }
        counts.insert(source, count + 1);
        Some(SourceGuard { limit: self.clone(), source })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // Nothing panics while it is held.
        self.0.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What counts as one source: an IPv4 address, or the /64 of an IPv6 address.
pub(crate) fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & SUBSCRIBER)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Drop for SourceGuard {
    fn drop(&mut self) {
        let mut counts = self.limit.counts();
        match counts.get_mut(&self.source) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                counts.remove(&self.source);
            }
        }
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
            assert_eq!(limit.counts().len(), 1);
            drop(guards);
        }
        assert!(SourceLimit::new(0).admit(ip("10.0.0.1")).is_none());
        assert_eq!(limit.counts().len(), 0);
    }
}
