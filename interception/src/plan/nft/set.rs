//! The values that a rule compares with. A single value is part of the rule; several values form a
//! set.
//!
//! The kernel looks up a set in constant time (addresses, ids) or logarithmic time (ranges). It
//! would evaluate a rule for each value one by one.

use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;

use ipnet::IpNet;
use underpass_config::PortRange;

use crate::plan::{HASHED_NETWORKS_MIN, Match, Rule};

/// The right-hand side of a match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Operand {
    /// The match has no value that a set could contain.
    Fixed,
    /// One value.
    Value(Values),
    /// A lookup in a set.
    Set(NamedSet),
}

/// A named set in the nftables table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedSet {
    /// The id of the rule that uses the set, and the kind of its values.
    pub(crate) name: String,
    pub(crate) values: Values,
}

/// Values of one type, sorted, without duplicates or overlaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Values {
    /// Networks of one family.
    Cidrs(Vec<IpNet>),
    /// At least [`HASHED_NETWORKS_MIN`] networks of one family and prefix length. The masked
    /// address is looked up.
    Prefixes(Vec<IpNet>),
    /// Ports.
    Ports(Vec<PortRange>),
    /// Users.
    Uids(Vec<u32>),
    /// Groups.
    Gids(Vec<u32>),
    /// Interfaces.
    Interfaces(Vec<String>),
}

/// The operand of each match of the rule, in order.
pub(crate) fn operands(rule: &Rule) -> Vec<Operand> {
    let mut names = Vec::new();
    rule.matches
        .iter()
        .map(|condition| match Values::of(condition) {
            None => Operand::Fixed,
            Some(values) if values.is_single() => Operand::Value(values),
            Some(values) => {
                let name = unused_name(&names, &rule.id, values.kind());
                names.push(name.clone());
                Operand::Set(NamedSet { name, values })
            }
        })
        .collect()
}

/// The operand of a match with at most one value.
pub(crate) fn operand_of(condition: &Match) -> Operand {
    Values::of(condition).map_or(Operand::Fixed, Operand::Value)
}

/// A name such as `exclude-ports-ports`. A number distinguishes sets of the same kind in a rule.
/// nft does not parse a name that starts with a digit, so such a name gets a prefix.
fn unused_name(names: &[String], id: &str, kind: &str) -> String {
    let prefix = if id.starts_with(|first: char| first.is_ascii_digit()) { "rule-" } else { "" };
    let name = format!("{prefix}{id}-{kind}");
    let taken = names.iter().filter(|other| other.starts_with(&name)).count();
    if taken == 0 { name } else { format!("{name}-{}", taken + 1) }
}

impl Operand {
    pub(crate) fn into_set(self) -> Option<NamedSet> {
        match self {
            Self::Set(set) => Some(set),
            Self::Fixed | Self::Value(_) => None,
        }
    }

    /// Returns true if the values are IPv6 addresses.
    pub(crate) fn is_v6(&self) -> bool {
        self.values().is_some_and(Values::is_v6)
    }

    /// The mask that is applied to an address before the comparison.
    pub(crate) fn mask(&self) -> Option<IpAddr> {
        self.values().and_then(Values::mask)
    }

    fn values(&self) -> Option<&Values> {
        match self {
            Self::Fixed => None,
            Self::Value(values) | Self::Set(NamedSet { values, .. }) => Some(values),
        }
    }
}

impl Values {
    fn of(condition: &Match) -> Option<Self> {
        Some(match condition {
            Match::Source(cidrs) | Match::Destination(cidrs) => Self::of_networks(cidrs),
            Match::NotDestination(cidr) => Self::Cidrs(vec![cidr.trunc()]),
            Match::SourcePort(_, port) => Self::Ports(vec![PortRange::from(*port)]),
            Match::DestinationPort(_, ports) | Match::NotDestinationPort(_, ports) => {
                Self::Ports(merged(ports))
            }
            Match::In(interfaces) | Match::Out(interfaces) => Self::Interfaces(unique(interfaces)),
            Match::NotOut(interface) => Self::Interfaces(vec![interface.clone()]),
            Match::Uid(uids) | Match::NotUid(uids) => Self::Uids(unique(uids)),
            Match::Gid(gids) | Match::NotGid(gids) => Self::Gids(unique(gids)),
            Match::Protocol(_)
            | Match::TcpModule
            | Match::NotOpening
            | Match::Invalid
            | Match::Established
            | Match::Direction(_)
            | Match::PacketMark(_)
            | Match::NotPacketMark(_)
            | Match::ConnectionMark(_) => return None,
        })
    }

    fn of_networks(cidrs: &Vec<IpNet>) -> Self {
        let one_length =
            cidrs.windows(2).all(|pair| matches!(pair, [a, b] if a.prefix_len() == b.prefix_len()));
        if one_length && cidrs.len() >= HASHED_NETWORKS_MIN {
            Self::Prefixes(unique(cidrs))
        } else {
            Self::Cidrs(IpNet::aggregate(cidrs))
        }
    }

    /// The mask that is applied to an address before the lookup.
    pub(crate) fn mask(&self) -> Option<IpAddr> {
        let Self::Prefixes(networks) = self else { return None };
        let network = networks.first()?;
        (network.prefix_len() < network.max_prefix_len()).then(|| network.netmask())
    }

    /// Returns true if the rule itself can contain the value: one value, not a range.
    fn is_single(&self) -> bool {
        match self {
            Self::Cidrs(cidrs) => cidrs.len() == 1,
            Self::Prefixes(_) => false,
            Self::Ports(ports) => matches!(ports.as_slice(), [port] if port.first == port.last),
            Self::Uids(ids) | Self::Gids(ids) => ids.len() == 1,
            Self::Interfaces(interfaces) => interfaces.len() == 1,
        }
    }

    /// Returns true if an element is a range, which needs an interval set.
    pub(crate) fn has_ranges(&self) -> bool {
        match self {
            Self::Cidrs(cidrs) => {
                cidrs.iter().any(|cidr| cidr.prefix_len() < cidr.max_prefix_len())
            }
            Self::Ports(ports) => ports.iter().any(|port| port.first < port.last),
            Self::Prefixes(_) | Self::Uids(_) | Self::Gids(_) | Self::Interfaces(_) => false,
        }
    }

    /// The number of elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Cidrs(cidrs) | Self::Prefixes(cidrs) => cidrs.len(),
            Self::Ports(ports) => ports.len(),
            Self::Uids(ids) | Self::Gids(ids) => ids.len(),
            Self::Interfaces(interfaces) => interfaces.len(),
        }
    }

    /// The initial size of a hash set, so that the kernel need not enlarge it while it is filled.
    pub(crate) fn size(&self) -> Option<usize> {
        matches!(self, Self::Prefixes(_)).then(|| self.len())
    }

    /// Returns true for IPv6 networks.
    pub(crate) fn is_v6(&self) -> bool {
        let (Self::Cidrs(cidrs) | Self::Prefixes(cidrs)) = self else { return false };
        matches!(cidrs.first(), Some(IpNet::V6(_)))
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Cidrs(_) | Self::Prefixes(_) => "cidrs",
            Self::Ports(_) => "ports",
            Self::Uids(_) => "uids",
            Self::Gids(_) => "gids",
            Self::Interfaces(_) => "interfaces",
        }
    }

    /// nft's name of the element type.
    fn data_type(&self) -> &'static str {
        match self {
            Self::Cidrs(_) | Self::Prefixes(_) if self.is_v6() => "ipv6_addr",
            Self::Cidrs(_) | Self::Prefixes(_) => "ipv4_addr",
            Self::Ports(_) => "inet_service",
            Self::Uids(_) => "uid",
            Self::Gids(_) => "gid",
            Self::Interfaces(_) => "ifname",
        }
    }
}

/// Joins ranges that overlap or are adjacent.
fn merged(ports: &[PortRange]) -> Vec<PortRange> {
    let mut merged: Vec<PortRange> = Vec::new();
    for port in unique(ports) {
        match merged.last_mut() {
            Some(last) if port.first <= last.last.saturating_add(1) => {
                last.last = last.last.max(port.last);
            }
            _ => merged.push(port),
        }
    }
    merged
}

fn unique<T: Clone + Ord>(values: &[T]) -> Vec<T> {
    let mut values = values.to_vec();
    values.sort();
    values.dedup();
    values
}

impl NamedSet {
    /// Prints the set as an operand of `nft add`.
    pub(crate) fn statement(&self, table: &str) -> String {
        let interval = if self.values.has_ranges() { " flags interval;" } else { "" };
        let size = self.values.size().map(|size| format!(" size {size};")).unwrap_or_default();
        let (name, data_type, values) = (&self.name, self.values.data_type(), &self.values);
        format!(
            "set inet {table} {name} {{ type {data_type};{interval}{size} elements = {{ {values} }} }}"
        )
    }
}

impl Display for Operand {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed => Ok(()),
            Self::Value(values) => values.fmt(f),
            Self::Set(set) => write!(f, "@{}", set.name),
        }
    }
}

impl Display for Values {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cidrs(cidrs) => list(f, cidrs, |cidr, f| match cidr.prefix_len() {
                length if length == cidr.max_prefix_len() => cidr.addr().fmt(f),
                _ => cidr.fmt(f),
            }),
            Self::Prefixes(networks) => list(f, networks, |net, f| net.network().fmt(f)),
            Self::Ports(ports) => list(f, ports, Display::fmt),
            Self::Uids(ids) | Self::Gids(ids) => list(f, ids, Display::fmt),
            Self::Interfaces(interfaces) => list(f, interfaces, |name, f| write!(f, "\"{name}\"")),
        }
    }
}

fn list<T>(
    f: &mut Formatter<'_>,
    values: &[T],
    show: impl Fn(&T, &mut Formatter<'_>) -> fmt::Result,
) -> fmt::Result {
    for (index, value) in values.iter().enumerate() {
        if index > 0 {
            f.write_str(", ")?;
        }
        show(value, f)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::nft::testing::rule;
    use crate::plan::{Protocol, TABLE};

    fn set(condition: Match) -> String {
        let mut operands = operands(&rule("id", vec![condition])).into_iter();
        operands.find_map(Operand::into_set).expect("a set").statement(TABLE)
    }

    fn ports(texts: &[&str]) -> Vec<PortRange> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn overlapping_or_adjacent_networks_merge() {
        let cidrs = ["10.1.0.0/16", "10.0.0.0/8", "192.168.0.0/25", "192.168.0.128/25"];
        let cidrs = cidrs.map(|cidr| cidr.parse().unwrap()).to_vec();
        assert_eq!(
            set(Match::Destination(cidrs)),
            "set inet underpass id-cidrs { type ipv4_addr; flags interval; \
             elements = { 10.0.0.0/8, 192.168.0.0/24 } }"
        );
    }

    #[test]
    fn many_networks_of_one_length_form_hash_of_masked_addresses() {
        let networks = |length: u8, many: u32| -> Vec<IpNet> {
            let network =
                |n: u32| IpNet::new((0x0a00_0000 + (n << 8)).to_be_bytes().into(), length);
            (0..many).map(|n| network(n).unwrap()).collect()
        };
        let many = u32::try_from(HASHED_NETWORKS_MIN).unwrap();
        for (length, mask) in [(24, Some("255.255.255.0")), (32, None)] {
            let operand =
                operands(&rule("id", vec![Match::Destination(networks(length, many))])).remove(0);
            assert_eq!(operand.mask(), mask.map(|mask| mask.parse().unwrap()));
            let set = operand.into_set().unwrap().statement(TABLE);
            let head = "set inet underpass id-cidrs { type ipv4_addr; size 256; elements = { 10.0.0.0, 10.0.1.0,";
            assert!(set.starts_with(head), "{set}");
        }
        let few = operands(&rule("id", vec![Match::Destination(networks(32, many - 1))])).remove(0);
        assert_eq!(few.values().unwrap().size(), None);
    }

    #[test]
    fn addresses_form_plain_set() {
        let cidrs = ["fd00::1/128", "fd00::9/128"].map(|cidr| cidr.parse().unwrap()).to_vec();
        assert_eq!(
            set(Match::Source(cidrs)),
            "set inet underpass id-cidrs { type ipv6_addr; elements = { fd00::1, fd00::9 } }"
        );
    }

    #[test]
    fn overlapping_or_adjacent_port_ranges_merge() {
        let list = ports(&["8000-8100", "80", "8050-8200", "81", "65535", "443"]);
        assert_eq!(
            set(Match::DestinationPort(Protocol::Tcp, list)),
            "set inet underpass id-ports { type inet_service; flags interval; \
             elements = { 80-81, 443, 8000-8200, 65535 } }"
        );
    }

    #[test]
    fn duplicate_value_needs_no_set_but_range_does() {
        let operand = |condition| operands(&rule("id", vec![condition])).remove(0);
        assert_eq!(operand(Match::Uid(vec![7, 7])), Operand::Value(Values::Uids(vec![7])));
        let range = Match::NotDestinationPort(Protocol::Udp, ports(&["1-2"]));
        assert!(matches!(operand(range), Operand::Set(_)));
        assert_eq!(operand(Match::NotOpening), Operand::Fixed);
    }

    #[test]
    fn sets_of_one_kind_get_distinct_names() {
        let conditions = vec![
            Match::DestinationPort(Protocol::Tcp, ports(&["1-2"])),
            Match::Gid(vec![1, 2]),
            Match::NotDestinationPort(Protocol::Tcp, ports(&["3-4"])),
        ];
        let operands = operands(&rule("id", conditions)).into_iter();
        let names: Vec<_> = operands.filter_map(Operand::into_set).map(|set| set.name).collect();
        assert_eq!(names, ["id-ports", "id-gids", "id-ports-2"]);
    }
}
