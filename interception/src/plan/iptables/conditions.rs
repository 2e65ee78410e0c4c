//! The conditions of a rule in iptables syntax.
//!
//! iptables has no lists, so a rule with lists becomes several lines, one for each combination of
//! list values. `plan::iptables` prints the targets.

use ipnet::IpNet;
use underpass_config::PortRange;

use super::{Family, compared, name};
use crate::plan::{Direction, Match, Protocol};

/// The conditions of a rule in the order of iptables: addresses, interfaces and protocol once each,
/// then the extensions in the order of the rule.
#[derive(Debug, Default)]
pub(super) struct Conditions {
    sources: Option<Vec<IpNet>>,
    destinations: Option<Vec<IpNet>>,
    not_destinations: Vec<IpNet>,
    incoming: Option<Vec<String>>,
    outgoing: Option<Vec<String>>,
    not_outgoing: Option<String>,
    pub(super) protocol: Option<Protocol>,
    /// The position of the protocol's extension. There is at most one: if a rule has `-m tcp`
    /// twice, iptables-nft 1.8.9 lists only the second.
    transport: Option<usize>,
    source_port: Option<String>,
    destination_port: Option<String>,
    not_opening: bool,
    /// For each extension, the alternative texts, of which one must match.
    extensions: Vec<Vec<String>>,
}

impl Conditions {
    pub(super) fn add(&mut self, condition: &Match, family: Family) {
        let of_family = |nets: &[IpNet]| -> Vec<IpNet> {
            nets.iter().filter(|net| family.has(net)).map(IpNet::trunc).collect()
        };
        match condition {
            Match::Protocol(protocol) => self.protocol = Some(*protocol),
            Match::TcpModule => self.transport(Protocol::Tcp),
            Match::NotOpening => {
                self.transport(Protocol::Tcp);
                self.not_opening = true;
            }
            Match::Invalid => self.extension("conntrack --ctstate INVALID"),
            Match::Established => self.extension("conntrack --ctstate RELATED,ESTABLISHED"),
            Match::Direction(Direction::Original) => self.extension("conntrack --ctdir ORIGINAL"),
            Match::Direction(Direction::Reply) => self.extension("conntrack --ctdir REPLY"),
            Match::Source(nets) => self.sources = Some(of_family(nets)),
            Match::Destination(nets) => {
                let nets = of_family(nets);
                self.destinations = Some(match self.destinations.take() {
                    None => nets,
                    Some(others) => intersection(&nets, &others),
                });
            }
            Match::NotDestination(net) if family.has(net) => {
                self.not_destinations.push(net.trunc())
            }
            // As in nftables, the match implies the family of its network, so no packet of this
            // family matches.
            Match::NotDestination(_) => self.destinations = Some(Vec::new()),
            Match::SourcePort(protocol, port) => {
                self.transport(*protocol);
                self.source_port = Some(format!(" --sport {port}"));
            }
            Match::DestinationPort(protocol, ports) => self.ports(*protocol, ports, false),
            Match::NotDestinationPort(protocol, ports) => self.ports(*protocol, ports, true),
            Match::In(interfaces) => self.incoming = Some(interfaces.clone()),
            Match::Out(interfaces) => self.outgoing = Some(interfaces.clone()),
            Match::NotOut(interface) => self.not_outgoing = Some(interface.clone()),
            Match::Uid(uids) => self.owners("--uid-owner", uids),
            Match::Gid(gids) => self.owners("--gid-owner", gids),
            Match::NotUid(uids) => self.not_owners("--uid-owner", uids),
            Match::NotGid(gids) => self.not_owners("--gid-owner", gids),
            Match::PacketMark(mark) => self.extension(&format!("mark --mark {}", compared(*mark))),
            Match::NotPacketMark(mark) => {
                self.extension(&format!("mark ! --mark {}", compared(*mark)));
            }
            Match::ConnectionMark(mark) => {
                self.extension(&format!("connmark --mark {}", compared(*mark)));
            }
        }
    }

    fn extension(&mut self, text: &str) {
        self.extensions.push(vec![format!("-m {text}")]);
    }

    /// Adds the protocol's extension where the rule first needs it.
    fn transport(&mut self, protocol: Protocol) {
        self.protocol = Some(protocol);
        if self.transport.is_none() {
            self.transport = Some(self.extensions.len());
            self.extensions.push(Vec::new());
        }
    }

    fn ports(&mut self, protocol: Protocol, ports: &[PortRange], negative: bool) {
        self.protocol = Some(protocol);
        let not = if negative { "! " } else { "" };
        if let ([port], None) = (ports, &self.destination_port) {
            self.transport(protocol);
            self.destination_port = Some(format!(" {not}--dport {}", range(*port)));
            return;
        }
        let texts = multiport(ports)
            .into_iter()
            .map(|ports| format!("-m multiport {not}--dports {ports}"))
            .collect::<Vec<_>>();
        self.extensions.push(if negative { vec![texts.join(" ")] } else { texts });
    }

    fn owners(&mut self, option: &str, ids: &[u32]) {
        self.extensions.push(ids.iter().map(|id| format!("-m owner {option} {id}")).collect());
    }

    fn not_owners(&mut self, option: &str, ids: &[u32]) {
        let texts: Vec<_> = ids.iter().map(|id| format!("-m owner ! {option} {id}")).collect();
        self.extensions.push(vec![texts.join(" ")]);
    }

    /// The alternative texts for each part of the line, in the order of iptables-save.
    pub(super) fn alternatives(mut self, family: Family) -> Vec<Vec<String>> {
        let sources = self
            .sources
            .take()
            .map_or_else(nothing, |nets| nets.iter().map(|net| addresses("-s", *net)).collect());
        let destinations = self.destination_texts(family);
        let incoming = interfaces("-i", self.incoming.take());
        let outgoing = match (self.outgoing.take(), self.not_outgoing.take()) {
            (None, Some(not)) => vec![format!("! -o {not}")],
            (Some(mut names), Some(not)) => {
                names.retain(|name| *name != not);
                interfaces("-o", Some(names))
            }
            (names, None) => interfaces("-o", names),
        };
        let protocol = self.protocol.map(|protocol| format!("-p {}", name(protocol)));
        if let (Some(protocol), Some(own)) =
            (self.protocol, self.transport.and_then(|position| self.extensions.get_mut(position)))
        {
            let flags = if self.not_opening { " ! --tcp-flags FIN,SYN,RST,ACK SYN" } else { "" };
            let [source, destination] =
                [self.source_port, self.destination_port].map(Option::unwrap_or_default);
            own.push(format!("-m {}{source}{destination}{flags}", name(protocol)));
        }
        let mut parts =
            vec![sources, destinations, incoming, outgoing, vec![protocol.unwrap_or_default()]];
        parts.append(&mut self.extensions);
        parts
    }

    /// iptables allows one `-d` per rule, so several conditions on the destination are merged into
    /// networks.
    fn destination_texts(&mut self, family: Family) -> Vec<String> {
        let everything = family.everything();
        let anywhere = self.destinations.as_ref().is_none_or(|nets| nets.contains(&everything));
        match (anywhere, self.not_destinations.as_slice()) {
            (true, []) => nothing(),
            (true, [not]) => vec![format!("! -d {not}")],
            (_, not) => {
                let nets = self.destinations.take().unwrap_or_else(|| vec![everything]);
                let nets = not.iter().fold(nets, |nets, hole| {
                    nets.into_iter().flat_map(|net| difference(net, *hole)).collect()
                });
                nets.into_iter().map(|net| addresses("-d", net)).collect()
            }
        }
    }
}

/// The text of a part without a condition.
fn nothing() -> Vec<String> {
    vec![String::new()]
}

/// iptables-save omits `0.0.0.0/0`.
fn addresses(option: &str, net: IpNet) -> String {
    if net.prefix_len() == 0 { String::new() } else { format!("{option} {net}") }
}

fn interfaces(option: &str, names: Option<Vec<String>>) -> Vec<String> {
    let Some(names) = names else { return nothing() };
    names.iter().map(|name| format!("{option} {name}")).collect()
}

fn intersection(nets: &[IpNet], others: &[IpNet]) -> Vec<IpNet> {
    let narrower = |net: &IpNet, other: &IpNet| {
        if other.contains(net) { Some(*net) } else { net.contains(other).then_some(*other) }
    };
    nets.iter()
        .flat_map(|net| others.iter().filter_map(move |other| narrower(net, other)))
        .collect()
}

/// Computes `net` without `hole`: halves the network until each half is either inside or outside of
/// `hole`.
fn difference(net: IpNet, hole: IpNet) -> Vec<IpNet> {
    if hole.contains(&net) {
        return Vec::new();
    }
    if !net.contains(&hole) {
        return vec![net];
    }
    let halves = net.subnets(net.prefix_len() + 1).into_iter().flatten();
    halves.flat_map(|half| difference(half, hole)).collect()
}

fn range(ports: PortRange) -> String {
    let PortRange { first, last } = ports;
    if first == last { first.to_string() } else { format!("{first}:{last}") }
}

/// Splits a port list for the multiport match, which allows 15 ports. A range counts as two
/// (XT_MULTI_PORTS, include/uapi/linux/netfilter/xt_multiport.h).
fn multiport(ports: &[PortRange]) -> Vec<String> {
    const MAX_PORTS: usize = 15;
    let mut lists: Vec<(usize, String)> = Vec::new();
    for &ports in ports {
        let size = if ports.first == ports.last { 1 } else { 2 };
        match lists.last_mut() {
            Some((used, list)) if *used + size <= MAX_PORTS => {
                *used += size;
                *list = format!("{list},{}", range(ports));
            }
            _ => lists.push((size, range(ports))),
        }
    }
    lists.into_iter().map(|(_, list)| list).collect()
}
