//! Encodes the sets of a plan as netlink messages, and prints their elements for a listing.
//!
//! nlink's own encoding omits metadata that nft needs to list ids and names, and is many times
//! slower for ten thousand networks. `plan::nft::set` decides which sets exist.

use std::net::{Ipv4Addr, Ipv6Addr};

use nlink::netlink::message::{NLM_F_CREATE, NLM_F_EXCL};
use nlink::netlink::nftables::{
    Family, NFT_MSG_DELSETELEM, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, NFT_SET_ELEM_INTERVAL_END,
    NFTA_DATA_VALUE, NFTA_LIST_ELEM, NFTA_SET_DESC, NFTA_SET_DESC_SIZE, NFTA_SET_ELEM_FLAGS,
    NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_FLAGS, NFTA_SET_ID, NFTA_SET_KEY_LEN, NFTA_SET_KEY_TYPE,
    NFTA_SET_NAME, NFTA_SET_TABLE, NFTA_SET_USERDATA, RawMessage, SetElement, SetFlags, SetKeyType,
};

use super::encode::{
    attribute, interface_key, nested, octets, text, write_attribute, write_nested,
};
use crate::plan::nft::{NamedSet, Values};

/// The maximum size of an element in bytes: both ends of a range of IPv6 addresses.
pub(super) const MAX_ELEMENT_BYTES: usize = 64;
/// The number of elements per message. They form one attribute, which is limited to 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 1000;

/// Type numbers of nft that nlink lacks (enum datatypes, include/datatype.h of nftables). The
/// kernel stores them, so that nft can list the elements.
const UID: SetKeyType = SetKeyType::Other { type_id: 24, len: 4 };
const GID: SetKeyType = SetKeyType::Other { type_id: 25, len: 4 };
const IFNAME: SetKeyType = SetKeyType::Other { type_id: 41, len: 16 };

/// An element: the first and the last key of a range, as numbers. Keys in big-endian order sort
/// like numbers.
type Range = (u128, u128);

/// Encodes the messages that create and fill a set. `id` is its number within the transaction.
pub(super) fn messages(table: &str, set: &NamedSet, id: u32) -> Vec<RawMessage> {
    [create(table, set, id)].into_iter().chain(additions(table, set)).collect()
}

/// Encodes the messages that add elements to a set.
pub(super) fn additions(table: &str, set: &NamedSet) -> Vec<RawMessage> {
    let add = |elements: Vec<u8>| {
        RawMessage::new(NFT_MSG_NEWSETELEM, Family::Inet).flags(NLM_F_CREATE).attrs(elements)
    };
    elements(table, set).into_iter().map(add).collect()
}

/// Encodes the messages that remove elements from a set.
pub(super) fn removals(table: &str, set: &NamedSet) -> Vec<RawMessage> {
    let remove =
        |elements: Vec<u8>| RawMessage::new(NFT_MSG_DELSETELEM, Family::Inet).attrs(elements);
    elements(table, set).into_iter().map(remove).collect()
}

/// The type of the keys.
pub(super) fn key_type(values: &Values) -> SetKeyType {
    match values {
        Values::Cidrs(_) | Values::Prefixes(_) if values.is_v6() => SetKeyType::Ipv6Addr,
        Values::Cidrs(_) | Values::Prefixes(_) => SetKeyType::Ipv4Addr,
        Values::Ports(_) => SetKeyType::InetService,
        Values::Uids(_) => UID,
        Values::Gids(_) => GID,
        Values::Interfaces(_) => IFNAME,
    }
}

/// The flags of a set. A set with ranges is an interval set.
pub(super) fn flags(values: &Values) -> SetFlags {
    if values.has_ranges() { SetFlags::INTERVAL } else { SetFlags::empty() }
}

/// The planned elements, one per line.
pub(super) fn planned_lines(values: &Values) -> Vec<String> {
    lines(&key_type(values), values.has_ranges(), ranges(values))
}

/// The installed elements, one per line. `interval` is true for a set with ranges.
pub(super) fn installed_lines(
    key: &SetKeyType,
    interval: bool,
    elements: &[SetElement],
) -> Vec<String> {
    let mut ranges = Vec::new();
    let mut others = Vec::new();
    for element in elements {
        let last = element.key_end().unwrap_or_else(|| element.key());
        // Planned elements have no data and no timeout.
        let plain = element.data().is_none() && element.timeout().is_none();
        if plain && !element.is_catchall() && last.len() <= size_of::<u128>() {
            ranges.push((number(element.key()), number(last)));
        } else {
            others.push(format!("{element:?}"));
        }
    }
    others.sort();
    lines(key, interval, ranges).into_iter().chain(others).collect()
}

/// nft's name of a key type that plans use.
pub(super) fn type_name(key: &SetKeyType) -> String {
    match key {
        SetKeyType::Ipv4Addr => "ipv4_addr".to_owned(),
        SetKeyType::Ipv6Addr => "ipv6_addr".to_owned(),
        SetKeyType::InetService => "inet_service".to_owned(),
        key if *key == UID => "uid".to_owned(),
        key if *key == GID => "gid".to_owned(),
        key if *key == IFNAME => "ifname".to_owned(),
        key => format!("{key:?}"),
    }
}

fn create(table: &str, set: &NamedSet, id: u32) -> RawMessage {
    /// The metadata key for the byte order of a set's keys (NFTNL_UDATA_SET_KEYBYTEORDER,
    /// include/libnftnl/udata.h).
    const KEY_BYTE_ORDER: u8 = 0;
    // enum byteorder (include/datatype.h of nftables): 1 is native order, 2 is network order.
    let order: u32 = match set.values {
        Values::Uids(_) | Values::Gids(_) | Values::Interfaces(_) => 1,
        Values::Cidrs(_) | Values::Prefixes(_) | Values::Ports(_) => 2,
    };
    let key = key_type(&set.values);
    let attributes = [
        text(NFTA_SET_TABLE, table),
        text(NFTA_SET_NAME, &set.name),
        attribute(NFTA_SET_FLAGS, &flags(&set.values).bits().to_be_bytes()),
        attribute(NFTA_SET_KEY_TYPE, &key.type_id().to_be_bytes()),
        attribute(NFTA_SET_KEY_LEN, &key.len().to_be_bytes()),
        attribute(NFTA_SET_ID, &id.to_be_bytes()),
        values_size(&set.values),
        attribute(NFTA_SET_USERDATA, &[&[KEY_BYTE_ORDER, 4][..], &order.to_ne_bytes()].concat()),
    ];
    let message = RawMessage::new(NFT_MSG_NEWSET, Family::Inet);
    message.flags(NLM_F_CREATE | NLM_F_EXCL).attrs(attributes.concat())
}

/// The number of elements, for sets whose memory the kernel allocates in advance.
fn values_size(values: &Values) -> Vec<u8> {
    let size = values.size().and_then(|size| u32::try_from(size).ok());
    let attributes = size.map(|size| attribute(NFTA_SET_DESC_SIZE, &size.to_be_bytes()));
    attributes.map(|size| nested(NFTA_SET_DESC, &size)).unwrap_or_default()
}

/// Encodes the elements of a set, as the attributes of one or more messages.
fn elements(table: &str, set: &NamedSet) -> Vec<Vec<u8>> {
    let ranges = ranges(&set.values);
    ranges.chunks(ELEMENTS_PER_MESSAGE).map(|chunk| attributes(table, set, chunk)).collect()
}

/// Encodes ranges. A range is two elements: its first key, and the key after its last one. A range
/// up to the highest key has no second element.
fn attributes(table: &str, set: &NamedSet, ranges: &[Range]) -> Vec<u8> {
    let length = key_length(&key_type(&set.values));
    let mut elements = Vec::with_capacity(ranges.len() * MAX_ELEMENT_BYTES);
    for &(first, last) in ranges {
        write_element(&mut elements, first, length, false);
        if set.values.has_ranges()
            && let Some(next) = next(last, length)
        {
            write_element(&mut elements, next, length, true);
        }
    }
    let attributes = [
        text(NFTA_SET_ELEM_LIST_TABLE, table),
        text(NFTA_SET_ELEM_LIST_SET, &set.name),
        nested(NFTA_SET_ELEM_LIST_ELEMENTS, &elements),
    ];
    attributes.concat()
}

/// Encodes an element. `is_end` is true for the end of a range.
fn write_element(bytes: &mut Vec<u8>, key: u128, length: usize, is_end: bool) {
    write_nested(bytes, NFTA_LIST_ELEM, |bytes| {
        write_nested(bytes, NFTA_SET_ELEM_KEY, |bytes| {
            write_attribute(bytes, NFTA_DATA_VALUE, |bytes| write_key(bytes, key, length));
        });
        if is_end {
            write_attribute(bytes, NFTA_SET_ELEM_FLAGS, |bytes| {
                bytes.extend(NFT_SET_ELEM_INTERVAL_END.to_be_bytes());
            });
        }
    });
}

fn ranges(values: &Values) -> Vec<Range> {
    let one = |key: &[u8]| (number(key), number(key));
    match values {
        Values::Prefixes(networks) => {
            networks.iter().map(|network| one(&octets(network.network()))).collect()
        }
        Values::Cidrs(cidrs) => cidrs
            .iter()
            .map(|cidr| (number(&octets(cidr.network())), number(&octets(cidr.broadcast()))))
            .collect(),
        Values::Ports(ports) => {
            ports.iter().map(|port| (port.first.into(), port.last.into())).collect()
        }
        Values::Uids(ids) | Values::Gids(ids) => {
            ids.iter().map(|id| one(&id.to_ne_bytes())).collect()
        }
        Values::Interfaces(names) => names.iter().map(|name| one(&interface_key(name))).collect(),
    }
}

fn number(key: &[u8]) -> u128 {
    key.iter().fold(0, |number, byte| number << 8 | u128::from(*byte))
}

/// Encodes a number as a key.
fn bytes(number: u128, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    write_key(&mut bytes, number, length);
    bytes
}

fn write_key(bytes: &mut Vec<u8>, number: u128, length: usize) {
    let digits = number.to_be_bytes();
    let key = digits.len().checked_sub(length).and_then(|start| digits.get(start..));
    bytes.extend_from_slice(key.unwrap_or_default());
}

/// The next key. `None` after the highest key of this length.
fn next(key: u128, length: usize) -> Option<u128> {
    let next = key.checked_add(1)?;
    let fits = length >= size_of::<u128>() || next >> (8 * length) == 0;
    fits.then_some(next)
}

fn key_length(key: &SetKeyType) -> usize {
    usize::try_from(key.len()).unwrap_or(usize::MAX)
}

/// Prints ranges. Merges adjacent ranges, because another tool may have split a planned range.
fn lines(key: &SetKeyType, interval: bool, mut ranges: Vec<Range>) -> Vec<String> {
    ranges.sort_unstable();
    if interval {
        ranges = merged(ranges);
    }
    let length = key_length(key);
    let show = |number| key_text(key, &bytes(number, length));
    let line = |(first, last): Range| match first == last {
        true => show(first),
        false => format!("{}-{}", show(first), show(last)),
    };
    ranges.into_iter().map(line).collect()
}

fn merged(sorted: Vec<Range>) -> Vec<Range> {
    let mut merged: Vec<Range> = Vec::with_capacity(sorted.len());
    for (first, last) in sorted {
        match merged.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn key_text(key: &SetKeyType, bytes: &[u8]) -> String {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        match key {
            SetKeyType::Ipv4Addr => return Ipv4Addr::from(octets).to_string(),
            key if [UID, GID].contains(key) => return u32::from_ne_bytes(octets).to_string(),
            _ => {}
        }
    }
    if let Ok(octets) = <[u8; 16]>::try_from(bytes) {
        match key {
            SetKeyType::Ipv6Addr => return Ipv6Addr::from(octets).to_string(),
            key if *key == IFNAME => {
                return String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
            }
            _ => {}
        }
    }
    match <[u8; 2]>::try_from(bytes) {
        Ok(octets) if *key == SetKeyType::InetService => u16::from_be_bytes(octets).to_string(),
        _ => format!("{bytes:02x?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn cidrs(texts: &[&str]) -> Values {
        Values::Cidrs(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn adjacent_ranges_merge() {
        let split = ["10.0.1.0/24", "10.0.0.0/24"];
        assert_eq!(planned_lines(&cidrs(&split)), ["10.0.0.0-10.0.1.255"]);
        let hosts = ["10.0.0.1/32", "10.0.0.2/32"];
        assert_eq!(planned_lines(&cidrs(&hosts)), ["10.0.0.1", "10.0.0.2"]);
    }

    #[test]
    fn elements_print_by_type() {
        assert_eq!(planned_lines(&Values::Interfaces(vec!["eth0".to_owned()])), ["eth0"]);
        assert_eq!(planned_lines(&Values::Uids(vec![1337])), ["1337"]);
        assert_eq!(planned_lines(&Values::Ports(vec![80.into()])), ["80"]);
        let all = "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        assert_eq!(planned_lines(&cidrs(&["::/0"])), [all]);
    }

    #[test]
    fn element_with_timeout_differs() {
        let lines = |element| installed_lines(&SetKeyType::InetService, false, &[element]);
        assert_eq!(lines(SetElement::port(80)), ["80"]);
        assert_ne!(lines(SetElement::port(80).with_timeout(Duration::from_secs(1))), ["80"]);
    }

    #[test]
    fn range_to_highest_key_has_no_end_element() {
        assert_eq!(next(0xffff, 2), None);
        assert_eq!(next(0xfffe, 2), Some(0xffff));
        assert_eq!(next(u128::MAX, 16), None);
    }

    #[test]
    fn message_size_stays_below_attribute_limit() {
        let range = "2001:db8::/32".parse().unwrap();
        let values = Values::Cidrs(vec![range; ELEMENTS_PER_MESSAGE + 1]);
        let set = NamedSet { name: "n".repeat(200), values };
        let messages = messages("table", &set, 1);
        assert_eq!(messages.len(), 3);
        assert!(messages.iter().all(|message| message.attrs.len() < usize::from(u16::MAX)));
        let mut elements = Vec::new();
        write_element(&mut elements, u128::MAX, 16, false);
        write_element(&mut elements, u128::MAX, 16, true);
        assert!(elements.len() <= MAX_ELEMENT_BYTES);
    }
}
