//! Encodes rules as nf_tables expressions.
//!
//! They are the expressions that `nft` generates from the text in `plan::nft`, so that rules
//! installed either way have the same listing.

use ipnet::IpNet;
use nlink::netlink::nftables::{
    ChainName, CmpOp, CtKey, Expr, Family, LookupExpr, MetaKey, NFT_REJECT_ICMP_UNREACH,
    NFT_REJECT_ICMPX_PORT_UNREACH, NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_TCP_RST, NFTA_CT_DIRECTION,
    NFTA_CT_KEY, NFTA_CT_SREG, PayloadBase, RawExpr, RedirExpr, Register, Rule as KernelRule,
    Verdict,
};

use super::encode::{attribute, interface_key, octets};
use crate::plan::nft::{IpVersion, Operand, Values, operands};
use crate::plan::{Action, Direction, Mark, Match, Protocol, Rule, TABLE};

/// The register for all values. Each expression uses its value at once.
const REGISTER: Register = Register::R0;

/// Encodes a rule with its id as the comment.
pub(super) fn rule(rule: &Rule) -> nlink::Result<KernelRule> {
    let kernel_rule = KernelRule::new(TABLE, &rule.chain.nftables_name()).family(Family::Inet);
    let expressions = expressions(rule)?;
    Ok(expressions.into_iter().fold(kernel_rule, KernelRule::then).comment(&rule.id))
}

/// Encodes a rule for the chain `chain` that exempts the packets of `rule` from conntrack.
pub(super) fn untracked(rule: &Rule, chain: &str) -> KernelRule {
    let mut body = RuleEncoder::default();
    body.conditions(rule);
    body.add(Expr::Notrack);
    let kernel_rule = KernelRule::new(TABLE, chain).family(Family::Inet);
    body.expressions.into_iter().fold(kernel_rule, KernelRule::then)
}

/// The expressions of a rule in order.
pub(super) fn expressions(rule: &Rule) -> nlink::Result<Vec<Expr>> {
    let mut body = RuleEncoder::default();
    body.conditions(rule);
    body.add(Expr::Counter);
    body.action(rule)?;
    Ok(body.expressions)
}

/// Builds the expressions of a rule.
#[derive(Debug, Default)]
pub(super) struct RuleEncoder {
    pub(super) expressions: Vec<Expr>,
    /// The protocol checks that the rule already contains. nft generates each check once.
    guards: Vec<(MetaKey, u8)>,
}

impl RuleEncoder {
    pub(super) fn add(&mut self, expression: impl Into<Expr>) {
        self.expressions.push(expression.into());
    }

    /// Adds the matches of a rule.
    fn conditions(&mut self, rule: &Rule) {
        if let Some(version) = rule.explicit_family() {
            self.family(version);
        }
        for (condition, operand) in rule.matches.iter().zip(operands(rule)) {
            self.condition(condition, &operand);
        }
    }

    pub(super) fn condition(&mut self, condition: &Match, operand: &Operand) {
        match condition {
            Match::Protocol(protocol) => self.protocol(*protocol),
            Match::TcpModule => self.protocol(Protocol::Tcp),
            Match::NotOpening => self.not_opening(),
            // Bits of NF_CT_STATE_BIT (include/uapi/linux/netfilter/nf_conntrack_common.h): invalid
            // is bit 0, established bit 1, related bit 2.
            Match::Invalid => self.state(0b001),
            Match::Established => self.state(0b110),
            Match::Direction(direction) => {
                self.load_ct(CtKey::Direction);
                self.compare(CmpOp::Eq, [number(*direction)]);
            }
            Match::Source(_) => self.address(Address::Source, CmpOp::Eq, operand),
            Match::Destination(_) => self.address(Address::Destination, CmpOp::Eq, operand),
            Match::NotDestination(_) => self.address(Address::Destination, CmpOp::Neq, operand),
            // The source port precedes the destination port (RFC 9293 section 3.1 and RFC 768).
            Match::SourcePort(protocol, _) => self.port(*protocol, 0, CmpOp::Eq, operand),
            Match::DestinationPort(protocol, _) => self.port(*protocol, 2, CmpOp::Eq, operand),
            Match::NotDestinationPort(protocol, _) => self.port(*protocol, 2, CmpOp::Neq, operand),
            Match::In(_) => self.meta(MetaKey::IifName, CmpOp::Eq, operand),
            Match::Out(_) => self.meta(MetaKey::OifName, CmpOp::Eq, operand),
            Match::NotOut(_) => self.meta(MetaKey::OifName, CmpOp::Neq, operand),
            Match::Uid(_) => self.meta(MetaKey::SkUid, CmpOp::Eq, operand),
            Match::NotUid(_) => self.meta(MetaKey::SkUid, CmpOp::Neq, operand),
            Match::Gid(_) => self.meta(MetaKey::SkGid, CmpOp::Eq, operand),
            Match::NotGid(_) => self.meta(MetaKey::SkGid, CmpOp::Neq, operand),
            Match::PacketMark(mark) => {
                self.load(MetaKey::Mark);
                self.mark(CmpOp::Eq, *mark);
            }
            Match::NotPacketMark(mark) => {
                self.load(MetaKey::Mark);
                self.mark(CmpOp::Neq, *mark);
            }
            Match::ConnectionMark(mark) => {
                self.load_ct(CtKey::Mark);
                self.mark(CmpOp::Eq, *mark);
            }
        }
    }

    fn action(&mut self, rule: &Rule) -> nlink::Result<()> {
        match rule.action {
            Action::Accept => self.add(Expr::Verdict(Verdict::Accept)),
            Action::Return => self.add(Expr::Verdict(Verdict::Return)),
            Action::Drop => self.add(Expr::Verdict(Verdict::Drop)),
            Action::Reject => self.add(reject(rule)),
            Action::Jump(chain) => {
                let chain = ChainName::new(chain.nftables_name())?;
                self.add(Expr::Verdict(Verdict::JumpTo(chain)));
            }
            Action::Redirect(port) => {
                self.immediate(port.to_be_bytes());
                self.add(RedirExpr::new().port(port));
            }
            Action::Tproxy(port, mark) => {
                self.immediate(port.to_be_bytes());
                let family = rule.family().map_or(0, nfproto);
                self.add(Expr::Tproxy { family, sreg_addr: None, sreg_port: Some(REGISTER) });
                self.set_packet_mark(mark);
                self.add(Expr::Verdict(Verdict::Accept));
            }
            Action::MarkPacket(mark) => self.set_packet_mark(mark),
            Action::MarkConnection(mark) => {
                self.new_mark(Expr::Ct { dreg: REGISTER, key: CtKey::Mark }, mark);
                self.add(Expr::CtSet { key: CtKey::Mark, sreg: REGISTER });
            }
            Action::SaveMark => {
                self.load(MetaKey::Mark);
                self.add(Expr::CtSet { key: CtKey::Mark, sreg: REGISTER });
            }
            Action::RestoreMark => {
                self.load_ct(CtKey::Mark);
                self.add(Expr::MetaSet { key: MetaKey::Mark, sreg: REGISTER });
            }
            Action::Zone(zone, direction) => {
                self.immediate(zone.to_ne_bytes());
                match direction {
                    None => self.add(Expr::CtSet { key: CtKey::Zone, sreg: REGISTER }),
                    Some(direction) => self.add(set_zone(direction)),
                }
            }
        }
        Ok(())
    }

    fn load(&mut self, key: MetaKey) {
        self.add(Expr::Meta { dreg: REGISTER, key });
    }

    fn load_ct(&mut self, key: CtKey) {
        self.add(Expr::Ct { dreg: REGISTER, key });
    }

    fn payload(&mut self, base: PayloadBase, offset: u32, len: u32) {
        self.add(Expr::Payload { dreg: REGISTER, base, offset, len });
    }

    fn compare(&mut self, op: CmpOp, data: impl Into<Vec<u8>>) {
        self.add(Expr::Cmp { sreg: REGISTER, op, data: data.into() });
    }

    pub(super) fn immediate(&mut self, data: impl Into<Vec<u8>>) {
        self.add(Expr::Immediate { dreg: REGISTER, data: data.into() });
    }

    /// Computes `register & mask ^ xor`.
    fn bitwise(&mut self, len: u32, mask: impl Into<Vec<u8>>, xor: impl Into<Vec<u8>>) {
        let (mask, xor) = (mask.into(), xor.into());
        self.add(Expr::Bitwise { sreg: REGISTER, dreg: REGISTER, len, mask, xor });
    }

    /// Compares the register with the values: equal to one of them, or to none with [`CmpOp::Neq`].
    fn one_of(&mut self, op: CmpOp, operand: &Operand) {
        match operand {
            Operand::Fixed => {}
            Operand::Value(value) => self.compare(op, key(value)),
            Operand::Set(set) => {
                let lookup = LookupExpr::new(&set.name, REGISTER);
                self.add(if op == CmpOp::Neq { lookup.invert() } else { lookup });
            }
        }
    }

    fn meta(&mut self, key: MetaKey, op: CmpOp, operand: &Operand) {
        self.load(key);
        self.one_of(op, operand);
    }

    fn guard(&mut self, key: MetaKey, value: u8) {
        if !self.guards.contains(&(key, value)) {
            self.guards.push((key, value));
            self.load(key);
            self.compare(CmpOp::Eq, [value]);
        }
    }

    fn family(&mut self, version: IpVersion) {
        self.guard(MetaKey::NfProto, nfproto(version));
    }

    fn protocol(&mut self, protocol: Protocol) {
        const IPPROTO_TCP: u8 = 6;
        const IPPROTO_UDP: u8 = 17;
        let number = match protocol {
            Protocol::Tcp => IPPROTO_TCP,
            Protocol::Udp => IPPROTO_UDP,
        };
        self.guard(MetaKey::L4Proto, number);
    }

    fn port(&mut self, protocol: Protocol, offset: u32, op: CmpOp, operand: &Operand) {
        self.protocol(protocol);
        self.payload(PayloadBase::Transport, offset, 2);
        self.one_of(op, operand);
    }

    /// `tcp flags & (fin | syn | rst | ack) != syn`. The flags are octet 13 of the header (RFC 9293
    /// section 3.1). A SYN may carry ECN bits, which the mask excludes.
    fn not_opening(&mut self) {
        const FIN_SYN_RST_ACK: u8 = 0x17;
        const SYN: u8 = 0x02;
        self.protocol(Protocol::Tcp);
        self.payload(PayloadBase::Transport, 13, 1);
        self.bitwise(1, [FIN_SYN_RST_ACK], [0]);
        self.compare(CmpOp::Neq, [SYN]);
    }

    /// Matches any of these conntrack states, a bit set in native byte order.
    fn state(&mut self, states: u32) {
        self.load_ct(CtKey::State);
        self.bitwise(4, states.to_ne_bytes(), [0; 4]);
        self.compare(CmpOp::Neq, [0; 4]);
    }

    fn address(&mut self, address: Address, op: CmpOp, operand: &Operand) {
        let version = if operand.is_v6() { IpVersion::V6 } else { IpVersion::V4 };
        // Offsets of addresses: RFC 791 section 3.1 and RFC 8200 section 3.
        let (offset, len) = match (version, address) {
            (IpVersion::V4, Address::Source) => (12, 4),
            (IpVersion::V4, Address::Destination) => (16, 4),
            (IpVersion::V6, Address::Source) => (8, 16),
            (IpVersion::V6, Address::Destination) => (24, 16),
        };
        self.family(version);
        match operand {
            Operand::Value(Values::Cidrs(cidrs)) => {
                for cidr in cidrs {
                    self.network(*cidr, offset, op);
                }
            }
            operand => {
                self.payload(PayloadBase::Network, offset, len);
                if let Some(mask) = operand.mask() {
                    let mask = octets(mask);
                    let unchanged = vec![0; mask.len()];
                    self.bitwise(len, mask, unchanged);
                }
                self.one_of(op, operand);
            }
        }
    }

    /// Compares an address with a network. If the prefix length is a multiple of eight, loads only
    /// the prefix, like nft.
    fn network(&mut self, cidr: IpNet, offset: u32, op: CmpOp) {
        let prefix = u32::from(cidr.prefix_len());
        let len = u32::from(cidr.max_prefix_len()) / 8;
        let mut network = octets(cidr.network());
        if prefix > 0 && prefix.is_multiple_of(8) {
            self.payload(PayloadBase::Network, offset, prefix / 8);
            network.truncate(usize::from(cidr.prefix_len() / 8));
        } else {
            self.payload(PayloadBase::Network, offset, len);
            self.bitwise(len, octets(cidr.netmask()), vec![0; network.len()]);
        }
        self.compare(op, network);
    }

    /// Compares a mark, in native byte order.
    fn mark(&mut self, op: CmpOp, mark: Mark) {
        if !mark.is_full() {
            self.bitwise(4, mark.mask.to_ne_bytes(), [0; 4]);
        }
        self.compare(op, mark.value.to_ne_bytes());
    }

    /// Computes a new mark. `load` provides the bits that stay.
    fn new_mark(&mut self, load: Expr, mark: Mark) {
        if mark.is_full() {
            self.immediate(mark.value.to_ne_bytes());
        } else {
            self.add(load);
            self.bitwise(4, (!mark.mask).to_ne_bytes(), mark.value.to_ne_bytes());
        }
    }

    fn set_packet_mark(&mut self, mark: Mark) {
        self.new_mark(Expr::Meta { dreg: REGISTER, key: MetaKey::Mark }, mark);
        self.add(Expr::MetaSet { key: MetaKey::Mark, sreg: REGISTER });
    }
}

#[derive(Debug, Clone, Copy)]
enum Address {
    Source,
    Destination,
}

/// Encodes a single value as the kernel compares it: ports in network byte order, ids in native
/// byte order.
fn key(value: &Values) -> Vec<u8> {
    match value {
        Values::Cidrs(cidrs) | Values::Prefixes(cidrs) => {
            cidrs.iter().flat_map(|cidr| octets(cidr.network())).collect()
        }
        Values::Ports(ports) => ports.iter().flat_map(|port| port.first.to_be_bytes()).collect(),
        Values::Uids(ids) | Values::Gids(ids) => {
            ids.iter().flat_map(|id| id.to_ne_bytes()).collect()
        }
        Values::Interfaces(names) => names.iter().flat_map(|name| interface_key(name)).collect(),
    }
}

fn reject(rule: &Rule) -> Expr {
    // "Port unreachable" in both families: RFC 792, and RFC 4443 section 3.1.
    let (reject_type, icmp_code) = match rule.family() {
        _ if rule.is_tcp() => (NFT_REJECT_TCP_RST, 0),
        None => (NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_ICMPX_PORT_UNREACH),
        Some(IpVersion::V4) => (NFT_REJECT_ICMP_UNREACH, 3),
        Some(IpVersion::V6) => (NFT_REJECT_ICMP_UNREACH, 4),
    };
    Expr::Reject { reject_type, icmp_code }
}

/// NFPROTO_IPV4 or NFPROTO_IPV6, include/uapi/linux/netfilter.h.
fn nfproto(version: IpVersion) -> u8 {
    match version {
        IpVersion::V4 => 2,
        IpVersion::V6 => 10,
    }
}

/// Values of enum ip_conntrack_dir, include/uapi/linux/netfilter/nf_conntrack_tuple_common.h.
fn number(direction: Direction) -> u8 {
    match direction {
        Direction::Original => 0,
        Direction::Reply => 1,
    }
}

/// Encodes `ct original zone set`. nlink's conntrack expression has no direction, so the attributes
/// (enum nft_ct_attributes, include/uapi/linux/netfilter/nf_tables.h) are written here in the
/// kernel's order.
fn set_zone(direction: Direction) -> RawExpr {
    let attributes = [
        attribute(NFTA_CT_SREG, &REGISTER.wire().to_be_bytes()),
        attribute(NFTA_CT_KEY, &(CtKey::Zone as u32).to_be_bytes()),
        attribute(NFTA_CT_DIRECTION, &[number(direction)]),
    ];
    RawExpr::new("ct", attributes.concat())
}

#[cfg(test)]
mod tests;
