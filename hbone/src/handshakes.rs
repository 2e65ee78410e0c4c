//! A cap on the TLS handshakes that one source may have under way: each costs us signatures and memory before we know who
//! it is.
//!
//! Not here: how long one may take (the caller's deadline), and what becomes of those who are not admitted.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The network part of an IPv6 address: one subscriber has all the addresses below it (RFC 6177).
const SUBSCRIBER: u128 = !0 << 64;

/// Counts the handshakes under way by their source. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub struct HandshakeLimit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    per_source: usize,
    /// Only sources that have a handshake under way.
    under_way: Mutex<HashMap<IpAddr, usize>>,
}

/// One handshake under way, for as long as it lives.
#[derive(Debug)]
pub struct HandshakeGuard {
    limit: HandshakeLimit,
    source: IpAddr,
}

impl HandshakeLimit {
    /// A limit of `per_source` handshakes at once.
    pub fn new(per_source: usize) -> Self {
        Self(Arc::new(Shared { per_source, under_way: Mutex::default() }))
    }

    /// Begins a handshake with `source`; `None` when it has too many under way. An IPv6 source is its /64, and an IPv4
    /// address that came in through an IPv6 socket is an IPv4 address.
    pub fn admit(&self, source: IpAddr) -> Option<HandshakeGuard> {
        let source = match source.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & SUBSCRIBER)),
            v4 @ IpAddr::V4(_) => v4,
        };
        let mut under_way = self.under_way();
        let count = under_way.get(&source).copied().unwrap_or(0);
        if count >= self.0.per_source {
            return None;
        }
        under_way.insert(source, count + 1);
        Some(HandshakeGuard { limit: self.clone(), source })
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // Nothing panics while it is held.
        self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HandshakeGuard {
    fn drop(&mut self) {
        let mut under_way = self.limit.under_way();
        match under_way.get_mut(&self.source) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                under_way.remove(&self.source);
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
    fn a_source_has_no_more_under_way_than_allowed_and_others_are_not_concerned() {
        let limit = HandshakeLimit::new(2);
        let (first, _second) = (limit.admit(ip("10.0.0.1")), limit.admit(ip("10.0.0.1")));
        assert!(first.is_some() && limit.admit(ip("10.0.0.1")).is_none());
        assert!(limit.clone().admit(ip("10.0.0.1")).is_none(), "clones count together");
        assert!(limit.admit(ip("10.0.0.2")).is_some());
        drop(first);
        assert!(limit.admit(ip("10.0.0.1")).is_some());
    }

    #[test]
    fn an_ipv6_source_is_its_64_and_a_mapped_address_is_ipv4() {
        let limit = HandshakeLimit::new(1);
        let _held = limit.admit(ip("2001:db8:0:1::1"));
        assert!(limit.admit(ip("2001:db8:0:1:ffff::2")).is_none());
        assert!(limit.admit(ip("2001:db8:0:2::1")).is_some());
        let _held = limit.admit(ip("::ffff:10.0.0.1"));
        assert!(limit.admit(ip("10.0.0.1")).is_none());
        assert!(limit.admit(ip("::ffff:10.0.0.2")).is_some());
    }

    #[test]
    fn sources_without_a_handshake_are_not_remembered() {
        let limit = HandshakeLimit::new(3);
        for last in 0..=255 {
            let source = IpAddr::from([10, 0, 0, last]);
            let guards = [limit.admit(source), limit.admit(source)];
            assert_eq!(limit.under_way().len(), 1);
            drop(guards);
        }
        assert!(HandshakeLimit::new(0).admit(ip("10.0.0.1")).is_none());
        assert_eq!(limit.under_way().len(), 0);
    }
}
