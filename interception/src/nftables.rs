//! The netlink backend: puts a plan into nf_tables, reads its counters, takes it out again.
//!
//! Not here: which rules there are (`plan.rs`). Everything acts on the calling thread's network
//! namespace.

use std::net::IpAddr;

use nlink::netlink::nftables::{
    BaseChain, Chain as KernelChain, CmpOp, CtKey, Expr, Family, FilterHook, MetaKey,
    NFTA_CT_DIRECTION, NFTA_CT_KEY, NFTA_CT_SREG, NatHook, PayloadBase, Policy, Priority, RawExpr,
    RedirExpr, Register, Rule as KernelRule, RuleExpr, Verdict,
};
use nlink::netlink::{Connection, Nftables};

use crate::InterceptionError;
use crate::netlink::{failed, into_io};
use crate::plan::{Action, Chain, MARK_MASK, Match, Rule, RulePlan, TABLE};

/// How often a rule matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleCounter {
    /// The id of the rule.
    pub id: String,
    /// Packets that matched; in a nat chain, connections.
    pub packets: u64,
    /// The bytes of those packets.
    pub bytes: u64,
}

/// Asks for the ruleset's generation: changes nothing, and fails where there is no nf_tables.
pub(crate) async fn reach() -> Result<(), InterceptionError> {
    const OPERATION: &str = "read the nftables ruleset";
    match connect(OPERATION)?.generation().await {
        Ok(_) => Ok(()),
        Err(error) if error.is_permission_denied() => Err(failed(OPERATION)(error)),
        // Whatever else the answer is, nobody answered for nf_tables: EINVAL from nfnetlink without
        // it.
        Err(error) => Err(InterceptionError::Unsupported {
            operation: OPERATION,
            module: "nf_tables",
            source: into_io(error),
        }),
    }
}

/// Replaces our table by the plan, in one transaction: packets see the old rules or the new ones.
///
/// Add, delete, add: the first makes the delete right whether or not there was a table. (The
/// kernel's own word for it, NFT_MSG_DESTROYTABLE, exists since Linux 6.3 only.)
pub(crate) async fn apply(plan: &RulePlan) -> Result<(), InterceptionError> {
    const OPERATION: &str = "install the nftables rules";
    let connection = connect(OPERATION)?;
    let mut transaction = connection
        .transaction()
        .update_table(TABLE, Family::Inet, 0)
        .del_table(TABLE, Family::Inet)
        .add_table(TABLE, Family::Inet);
    for chain in Chain::ALL {
        transaction = transaction.add_chain(kernel_chain(chain).map_err(failed(OPERATION))?);
    }
    for rule in plan.rules() {
        transaction = transaction.add_rule(kernel_rule(rule));
    }
    transaction.commit(&connection).await.map_err(failed(OPERATION))
}

/// The counters of the rules that are in the kernel, in their order; none if our table is not.
pub(crate) async fn counters() -> Result<Vec<RuleCounter>, InterceptionError> {
    const OPERATION: &str = "read the nftables rules";
    let rules =
        connect(OPERATION)?.list_rules(TABLE, Family::Inet).await.map_err(failed(OPERATION))?;
    Ok(rules
        .into_iter()
        .filter_map(|rule| {
            let counted = rule.expressions().into_iter().find_map(|expression| match expression {
                RuleExpr::Counter { packets, bytes, .. } => Some((packets, bytes)),
                _ => None,
            });
            let (packets, bytes) = counted?;
            Some(RuleCounter { id: rule.comment_text?, packets, bytes })
        })
        .collect())
}

/// Takes our table out; `false` if there was none.
pub(crate) async fn remove() -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the nftables rules";
    connect(OPERATION)?.del_table_if_exists(TABLE, Family::Inet).await.map_err(failed(OPERATION))
}

fn connect(operation: &'static str) -> Result<Connection<Nftables>, InterceptionError> {
    Connection::<Nftables>::new().map_err(failed(operation))
}

fn kernel_chain(chain: Chain) -> nlink::Result<KernelChain> {
    let priority = Priority::Custom(chain.priority());
    let base = match chain {
        Chain::RawOutput => BaseChain::filter(FilterHook::Output, priority),
        Chain::ManglePrerouting => BaseChain::filter(FilterHook::Prerouting, priority),
        Chain::MangleOutput => BaseChain::route(priority),
        Chain::NatPrerouting => BaseChain::nat(NatHook::Prerouting, priority),
        Chain::NatOutput => BaseChain::nat(NatHook::Output, priority),
    };
    let chain = KernelChain::new(TABLE, chain.name())?;
    Ok(chain.family(Family::Inet).base(base.policy(Policy::Accept)))
}

fn kernel_rule(rule: &Rule) -> KernelRule {
    let expressions = rule
        .matches
        .iter()
        .flat_map(|condition| match_expressions(*condition))
        .chain([Expr::Counter])
        .chain(action_expressions(rule.action));
    expressions
        .fold(KernelRule::new(TABLE, rule.chain.name()), KernelRule::then)
        .family(Family::Inet)
        .comment(rule.id)
}

/// The register that every value passes through; each expression is done with it before the next.
const REGISTER: Register = Register::R0;

/// The expressions that `nft` makes of the same words, so that both ways give one listing.
fn match_expressions(condition: Match) -> Vec<Expr> {
    match condition {
        Match::Tcp => tcp().into(),
        Match::NotOpening => not_opening(),
        Match::Source(address) => address_is(address, Direction::Source, CmpOp::Eq),
        Match::Destination(address) => address_is(address, Direction::Destination, CmpOp::Eq),
        Match::NotDestination(address) => address_is(address, Direction::Destination, CmpOp::Neq),
        Match::DestinationPort(port) => {
            let [protocol, is_tcp] = tcp();
            // RFC 9293 3.1: the destination port is the third and fourth octet.
            vec![protocol, is_tcp, transport(2, 2), compare(CmpOp::Eq, port.to_be_bytes())]
        }
        Match::OutLoopback => {
            // The loopback interface is number 1 in every namespace (LOOPBACK_IFINDEX,
            // include/net/flow.h).
            vec![meta(MetaKey::Oif), compare(CmpOp::Eq, 1u32.to_ne_bytes())]
        }
        Match::PacketMark(mark) => masked_mark(meta(MetaKey::Mark), CmpOp::Eq, mark),
        Match::NotPacketMark(mark) => masked_mark(meta(MetaKey::Mark), CmpOp::Neq, mark),
        Match::ConnectionMark(mark) => masked_mark(ct(CtKey::Mark), CmpOp::Eq, mark),
        // enum ip_conntrack_dir: 0 is the original direction, 1 the reply's.
        Match::Original => vec![ct(CtKey::Direction), compare(CmpOp::Eq, [0])],
        Match::Reply => vec![ct(CtKey::Direction), compare(CmpOp::Eq, [1])],
    }
}

fn action_expressions(action: Action) -> Vec<Expr> {
    match action {
        Action::Accept => vec![Expr::Verdict(Verdict::Accept)],
        Action::Redirect(port) => vec![
            Expr::Immediate { dreg: REGISTER, data: port.to_be_bytes().into() },
            // nlink's redirect reads the port from R0 and leaves loading it to us.
            RedirExpr::new().port(port).into(),
        ],
        Action::MarkConnection(mark) => vec![
            ct(CtKey::Mark),
            replace_masked(mark),
            Expr::CtSet { key: CtKey::Mark, sreg: REGISTER },
        ],
        Action::MarkPacket(mark) => vec![
            meta(MetaKey::Mark),
            replace_masked(mark),
            Expr::MetaSet { key: MetaKey::Mark, sreg: REGISTER },
        ],
        Action::Zone(zone) => vec![
            Expr::Immediate { dreg: REGISTER, data: zone.to_ne_bytes().into() },
            set_original_zone(),
        ],
    }
}

/// `ct original zone set`: nlink's expression for conntrack has no direction, so its attributes are written here
/// (enum nft_ct_attributes, include/uapi/linux/netfilter/nf_tables.h).
fn set_original_zone() -> Expr {
    let attributes = [
        attribute(NFTA_CT_KEY, &(CtKey::Zone as u32).to_be_bytes()),
        // IP_CT_DIR_ORIGINAL.
        attribute(NFTA_CT_DIRECTION, &[0]),
        attribute(NFTA_CT_SREG, &REGISTER.wire().to_be_bytes()),
    ];
    RawExpr::new("ct", attributes.concat()).into()
}

/// One netlink attribute: length and type in native byte order, the value, padding to four bytes (netlink(7)).
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    const HEADER: u16 = 4;
    let length = u16::try_from(value.len()).map_or(HEADER, |length| HEADER + length);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn tcp() -> [Expr; 2] {
    const IPPROTO_TCP: u8 = 6;
    [meta(MetaKey::L4Proto), compare(CmpOp::Eq, [IPPROTO_TCP])]
}

/// `tcp flags & (fin | syn | rst | ack) != syn`; the flags are octet 13 of the header (RFC 9293
/// 3.1). The bits of ECN are left out: a SYN may carry them.
fn not_opening() -> Vec<Expr> {
    const FIN_SYN_RST_ACK: u8 = 0x17;
    const SYN: u8 = 0x02;
    vec![transport(13, 1), bitwise([FIN_SYN_RST_ACK], [0]), compare(CmpOp::Neq, [SYN])]
}

#[derive(Clone, Copy)]
enum Direction {
    Source,
    Destination,
}

/// The address's family, then the address (offsets: RFC 791 3.1, RFC 8200 3).
fn address_is(address: IpAddr, direction: Direction, op: CmpOp) -> Vec<Expr> {
    const NFPROTO_IPV4: u8 = 2;
    const NFPROTO_IPV6: u8 = 10;
    let (family, octets, source, destination) = match address {
        IpAddr::V4(address) => (NFPROTO_IPV4, address.octets().to_vec(), 12, 16),
        IpAddr::V6(address) => (NFPROTO_IPV6, address.octets().to_vec(), 8, 24),
    };
    let offset = match direction {
        Direction::Source => source,
        Direction::Destination => destination,
    };
    let len = if address.is_ipv4() { 4 } else { 16 };
    vec![
        meta(MetaKey::NfProto),
        compare(CmpOp::Eq, [family]),
        Expr::Payload { dreg: REGISTER, base: PayloadBase::Network, offset, len },
        compare(op, octets),
    ]
}

/// Marks are numbers of the host, not of the network: native byte order.
fn masked_mark(load: Expr, op: CmpOp, mark: u32) -> Vec<Expr> {
    let mask = bitwise(MARK_MASK.to_ne_bytes(), 0u32.to_ne_bytes());
    vec![load, mask, compare(op, mark.to_ne_bytes())]
}

/// Our bits become `mark`, the others stay.
fn replace_masked(mark: u32) -> Expr {
    bitwise((!MARK_MASK).to_ne_bytes(), mark.to_ne_bytes())
}

fn meta(key: MetaKey) -> Expr {
    Expr::Meta { dreg: REGISTER, key }
}

fn ct(key: CtKey) -> Expr {
    Expr::Ct { dreg: REGISTER, key }
}

fn transport(offset: u32, len: u32) -> Expr {
    Expr::Payload { dreg: REGISTER, base: PayloadBase::Transport, offset, len }
}

/// `register & mask ^ xor`.
fn bitwise<const N: usize>(mask: [u8; N], xor: [u8; N]) -> Expr {
    Expr::Bitwise {
        sreg: REGISTER,
        dreg: REGISTER,
        len: u32::try_from(N).unwrap_or(u32::MAX),
        mask: mask.into(),
        xor: xor.into(),
    }
}

fn compare(op: CmpOp, data: impl Into<Vec<u8>>) -> Expr {
    Expr::Cmp { sreg: REGISTER, op, data: data.into() }
}
