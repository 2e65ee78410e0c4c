//! Parses address ranges (CIDRs) and converts them to the canonical form that comparisons use.

use std::net::IpAddr;

use ipnet::IpNet;

/// Parses a CIDR in the way of iptables: an address alone is a range of one address, host bits are
/// cleared, and an IPv4-mapped range becomes IPv4.
pub(crate) fn parse(text: &str) -> Option<IpNet> {
    let net = match text.split_once('/') {
        Some((address, bits)) => {
            // The standard parser would accept "+8".
            let is_number = bits.bytes().all(|c| c.is_ascii_digit());
            let bits = bits.parse().ok().filter(|_| is_number)?;
            IpNet::new(address.parse::<IpAddr>().ok()?, bits).ok()?
        }
        None => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    Some(canonical(net))
}

/// Clears host bits, and converts an IPv4-mapped range to IPv4.
pub(crate) fn canonical(net: IpNet) -> IpNet {
    let net = net.trunc();
    let mapped = net.addr().to_canonical();
    let bits = net.prefix_len().checked_sub(96).filter(|_| mapped != net.addr());
    bits.and_then(|bits| IpNet::new(mapped, bits).ok()).unwrap_or(net)
}
