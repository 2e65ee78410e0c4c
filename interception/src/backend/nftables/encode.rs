//! Encodes chains and netlink attributes. `sets` encodes sets, `expressions` rules.

use std::net::IpAddr;

use nlink::netlink::nftables::{
    BaseChain, Chain as KernelChain, Family, FilterHook, NatHook, Policy, Priority,
};

use crate::plan::nft::ChainKind;
use crate::plan::{Chain, Hook, TABLE};

/// NLA_F_NESTED, include/uapi/linux/netlink.h.
const NESTED: u16 = 1 << 15;

/// Encodes a chain with the policy `accept`.
pub(super) fn chain(chain: &Chain) -> nlink::Result<KernelChain> {
    let kernel_chain = KernelChain::new(TABLE, chain.id.nftables_name())?.family(Family::Inet);
    let Some(hook) = chain.hook else { return Ok(kernel_chain) };
    let priority = Priority::Custom(chain.id.table.priority());
    let base = match (chain.kind(), hook) {
        (ChainKind::Route, _) => BaseChain::route(priority),
        (ChainKind::Nat, Hook::Prerouting) => BaseChain::nat(NatHook::Prerouting, priority),
        (ChainKind::Nat, Hook::Input) => BaseChain::nat(NatHook::Input, priority),
        (ChainKind::Nat, Hook::Output) => BaseChain::nat(NatHook::Output, priority),
        (ChainKind::Filter, Hook::Prerouting) => {
            BaseChain::filter(FilterHook::Prerouting, priority)
        }
        (ChainKind::Filter, Hook::Input) => BaseChain::filter(FilterHook::Input, priority),
        (ChainKind::Filter, Hook::Output) => BaseChain::filter(FilterHook::Output, priority),
    };
    Ok(kernel_chain.base(base.policy(Policy::Accept)))
}

/// An interface name as a set key: padded to IFNAMSIZ.
pub(super) fn interface_key(name: &str) -> Vec<u8> {
    const IFNAMSIZ: usize = 16;
    let mut key = name.as_bytes().to_vec();
    key.resize(IFNAMSIZ, 0);
    key
}

/// Encodes an address in network byte order.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Encodes a netlink attribute: length and type in native byte order, the value, padding to four
/// bytes (netlink(7)).
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_attribute(&mut bytes, kind, |bytes| bytes.extend_from_slice(value));
    bytes
}

/// An attribute that contains attributes.
pub(super) fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(kind | NESTED, attributes)
}

/// Appends an attribute. `write` appends its value.
pub(super) fn write_attribute(bytes: &mut Vec<u8>, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
    const HEADER: usize = 4;
    let start = bytes.len();
    bytes.extend([0; HEADER]);
    write(bytes);
    let length = u16::try_from(bytes.len() - start).unwrap_or_default();
    let header = length.to_ne_bytes().into_iter().chain(kind.to_ne_bytes());
    bytes.iter_mut().skip(start).zip(header).for_each(|(byte, value)| *byte = value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Appends an attribute that contains attributes. `write` appends those.
pub(super) fn write_nested(bytes: &mut Vec<u8>, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
    write_attribute(bytes, kind | NESTED, write);
}

/// A string attribute, which ends with a zero byte.
pub(super) fn text(kind: u16, name: &str) -> Vec<u8> {
    attribute(kind, &[name.as_bytes(), &[0]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attribute_length_excludes_padding() {
        let expected = [&6u16.to_ne_bytes()[..], &3u16.to_ne_bytes(), b"a\0", &[0, 0]].concat();
        assert_eq!(text(3, "a"), expected);
        assert_eq!(nested(1, &expected).len(), 12);
    }
}
