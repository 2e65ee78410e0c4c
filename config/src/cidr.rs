//! Ranges of addresses as operators write them, in the one form that addresses are compared in.

use std::net::IpAddr;

use ipnet::IpNet;

/// Reads a CIDR as iptables does: a bare address is itself alone, host bits are cut off; an IPv4-mapped one is IPv4.
pub(crate) fn parse(text: &str) -> Option<IpNet> {
    let net = match text.split_once('/') {
        Some((address, bits)) => {
            // `parse` alone would take "+8".
            let digits = bits.bytes().all(|c| c.is_ascii_digit());
            let bits = bits.parse().ok().filter(|_| digits)?;
            IpNet::new(address.parse::<IpAddr>().ok()?, bits).ok()?
        }
        None => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    Some(canonical(net))
}

/// The same range without host bits, and as IPv4 if it is an IPv4-mapped one.
pub(crate) fn canonical(net: IpNet) -> IpNet {
    let net = net.trunc();
    let mapped = net.addr().to_canonical();
    let bits = net.prefix_len().checked_sub(96).filter(|_| mapped != net.addr());
    bits.and_then(|bits| IpNet::new(mapped, bits).ok()).unwrap_or(net)
}
