//! The network that counts as one source of connections: an IPv4 address or an IPv6 /64.

use std::net::{IpAddr, Ipv6Addr};

/// The mask of an IPv6 /64, which belongs to one subscriber (RFC 6177).
const SUBSCRIBER_MASK: u128 = !0 << 64;

/// An IPv4 address, or the /64 of an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourceNetwork(IpAddr);

impl SourceNetwork {
    /// The source network of `address`. An IPv4-mapped address counts as IPv4.
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => {
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & SUBSCRIBER_MASK))
            }
            v4 @ IpAddr::V4(_) => v4,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_addresses_in_one_64_network_count_as_one_source() {
        let source = |text: &str| SourceNetwork::of(text.parse().unwrap());
        assert_eq!(source("2001:db8:0:1::1"), source("2001:db8:0:1:ffff::2"));
        assert_ne!(source("2001:db8:0:1::1"), source("2001:db8:0:2::1"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
        assert_ne!(source("::ffff:10.0.0.1"), source("10.0.0.2"));
    }
}
