//! Encodes the blackhole's ip rules as netlink messages and sends them in batches.

use ipnet::IpNet;
use nix::errno::Errno;
use nlink::netlink::message::NlMsgError;
use nlink::netlink::types::rule::{FibRuleAction, FibRuleHdr, FraAttr};
use nlink::netlink::{MessageBuilder, MessageIter, NetlinkSocket, NlMsgType};
use underpass_config::PortRange;

use super::{
    BLACKHOLE_PRIORITY, EXEMPTION_PRIORITY, IpRule, Selector, TARGET_PRIORITY, TCP, Verdict,
};
use crate::backend::routes::{PROTOCOL, Version, family};
use crate::plan::Mark;

/// The number of requests per batch. Their answers must fit into the receive buffer of the socket
/// (212,992 bytes by default; each answer needs less than 1 KiB).
pub(super) const BATCH_SIZE: usize = 32;

impl Selector {
    fn write(&self, message: &mut MessageBuilder) {
        match self {
            Self::Everything => {}
            Self::Mark(Mark { value, mask }) => {
                message.append_attr_u32(FraAttr::Fwmark as u16, *value);
                message.append_attr_u32(FraAttr::Fwmask as u16, *mask);
            }
            Self::Uid(uid) => {
                // struct fib_rule_uid_range (include/uapi/linux/fib_rules.h).
                let range = [uid.to_ne_bytes(), uid.to_ne_bytes()].concat();
                message.append_attr(FraAttr::UidRange as u16, &range);
            }
            Self::To { network, from } => {
                write_destination(message, *network);
                if let Some(ports) = from {
                    write_ports(message, TCP, FraAttr::Sport, *ports);
                }
            }
            Self::Out(interface) => message.append_attr_str(FraAttr::Oifname as u16, interface),
            Self::SourcePorts(ports) => write_ports(message, TCP, FraAttr::Sport, *ports),
            Self::DestinationPorts(ports) => write_ports(message, TCP, FraAttr::Dport, *ports),
            Self::From { interface, protocol, to, ports } => {
                message.append_attr_str(FraAttr::Iifname as u16, interface);
                if let Some(network) = to {
                    write_destination(message, *network);
                }
                match ports {
                    Some(ports) => write_ports(message, *protocol, FraAttr::Dport, *ports),
                    None => message.append_attr_u8(FraAttr::IpProto as u16, *protocol),
                }
            }
        }
    }

    /// The prefix length of the destination in the message header.
    fn destination_bits(&self) -> u8 {
        match self {
            Self::To { network, .. } | Self::From { to: Some(network), .. } => network.prefix_len(),
            _ => 0,
        }
    }
}

fn write_destination(message: &mut MessageBuilder, network: IpNet) {
    let kind = FraAttr::Dst as u16;
    // A prefix of length 0 has no address attribute (fib4_rule_configure, net/ipv4/fib_rules.c).
    if network.prefix_len() > 0 {
        match network {
            IpNet::V4(network) => message.append_attr(kind, &network.network().octets()),
            IpNet::V6(network) => message.append_attr(kind, &network.network().octets()),
        }
    }
}

fn write_ports(message: &mut MessageBuilder, protocol: u8, side: FraAttr, ports: PortRange) {
    message.append_attr_u8(FraAttr::IpProto as u16, protocol);
    // struct fib_rule_port_range, in native byte order.
    let range = [ports.first.to_ne_bytes(), ports.last.to_ne_bytes()].concat();
    message.append_attr(side as u16, &range);
}

impl IpRule {
    pub(super) fn add_request(&self) -> MessageBuilder {
        /// NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL and NLM_F_CREATE (include/uapi/linux/netlink.h).
        const FLAGS: u16 = 0x001 | 0x004 | 0x200 | 0x400;
        let mut message = MessageBuilder::new(NlMsgType::RTM_NEWRULE, FLAGS);
        let mut header = FibRuleHdr::new().with_family(family(self.version));
        header.dst_len = self.selector.destination_bits();
        let (action, priority) = match self.verdict {
            Verdict::Exempt => (FibRuleAction::Goto, EXEMPTION_PRIORITY),
            Verdict::Blackhole => (FibRuleAction::Blackhole, BLACKHOLE_PRIORITY),
            Verdict::End => (FibRuleAction::Nop, TARGET_PRIORITY),
        };
        header.action = action as u8;
        message.append(&header);
        message.append_attr_u32(FraAttr::Priority as u16, priority);
        message.append_attr_u8(FraAttr::Protocol as u16, PROTOCOL);
        if self.verdict == Verdict::Exempt {
            message.append_attr_u32(FraAttr::Goto as u16, TARGET_PRIORITY);
        }
        self.selector.write(&mut message);
        message
    }
}

/// A request that removes underpass's first ip rule with this priority.
pub(super) fn remove_request(version: Version, priority: u32) -> MessageBuilder {
    /// NLM_F_REQUEST and NLM_F_ACK.
    const FLAGS: u16 = 0x001 | 0x004;
    let mut message = MessageBuilder::new(NlMsgType::RTM_DELRULE, FLAGS);
    message.append(&FibRuleHdr::new().with_family(family(version)));
    message.append_attr_u32(FraAttr::Priority as u16, priority);
    message.append_attr_u8(FraAttr::Protocol as u16, PROTOCOL);
    message
}

/// Sends requests in batches, in order. The kernel processes a batch before the call that sends it
/// returns. Sends all requests even after an error, because a blackhole without its exemptions
/// would block the proxy. Returns the first error that is not in `tolerated`.
pub(super) async fn send(
    socket: &NetlinkSocket,
    requests: Vec<MessageBuilder>,
    tolerated: &[Errno],
) -> nlink::Result<()> {
    let stamp = |mut request: MessageBuilder| {
        request.set_seq(socket.next_seq());
        request.set_pid(socket.pid());
        request.finish()
    };
    let requests: Vec<Vec<u8>> = requests.into_iter().map(stamp).collect();
    let mut failed = None;
    for batch in requests.chunks(BATCH_SIZE) {
        // A buffer with several requests requires each to be padded to four bytes.
        socket.send(&batch.concat()).await?;
        let mut answers = 0;
        while answers < batch.len() {
            let received = socket.recv_msg().await?;
            for message in MessageIter::new(&received) {
                let (header, payload) = message?;
                if !header.is_error() {
                    continue;
                }
                answers += 1;
                let answer = NlMsgError::from_bytes(payload)?;
                if !answer.is_ack() && !tolerated.contains(&Errno::from_raw(-answer.error)) {
                    failed.get_or_insert_with(|| answer.into_error(payload));
                }
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
