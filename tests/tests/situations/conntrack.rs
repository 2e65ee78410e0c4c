//! Fills the table of tracked connections of a pod by netlink, without connections.
//!
//! The messages are those of include/uapi/linux/netfilter/nfnetlink_conntrack.h.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};
use underpass_tests::Pod;

/// A table with more entries takes too long, and too much memory of the kernel.
pub(crate) const MAX_LIMIT: u32 = 1 << 19;
/// The size of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// The number of source ports of an address.
const PORTS: u32 = 1 << 14;

/// The limit of the host; `None` if the kernel does not track connections.
pub(crate) fn limit() -> Option<u32> {
    fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").ok()?.trim().parse().ok()
}

/// Adds established connections to the table of the pod, up to this percentage of the limit.
pub(crate) fn fill(pod: &Pod, percent: u32) {
    let entries = limit().expect("connections are tracked") / 100 * percent;
    pod.run(|| add(entries)).expect("entries are added");
}

fn add(entries: u32) -> io::Result<()> {
    let (family, flags) = (AddressFamily::Netlink, SockFlag::SOCK_CLOEXEC);
    let socket = socket(family, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
    let mut batch = Vec::new();
    for index in 0..entries {
        batch.extend(message(index));
        if batch.len() > 32 << 10 || index + 1 == entries {
            send(socket.as_raw_fd(), &batch, MsgFlags::empty())?;
            batch.clear();
        }
    }
    Ok(())
}

/// `IPCTNL_MSG_CT_NEW` with the entry of an established connection.
fn message(index: u32) -> Vec<u8> {
    /// `NLM_F_REQUEST`, `NLM_F_CREATE` and `NLM_F_EXCL`.
    const FLAGS: u16 = 0x601;
    const NEW: u16 = 1 << 8;
    /// `IPS_SEEN_REPLY`, `IPS_ASSURED` and `IPS_CONFIRMED`.
    const STATUS: u32 = 0xe;
    const AF_INET: u8 = 2;
    const TIMEOUT: u32 = 600;
    const ESTABLISHED: u8 = 3;
    let [_, _, high, low] = (index / PORTS).to_be_bytes();
    let port = u16::try_from(1024 + index % PORTS).expect("a port");
    let (client, server) = (([10, 200, high, low], port), ([10, 201, 0, 1], 80));
    let state = attribute(1, &[ESTABLISHED]);
    let body = [
        vec![AF_INET, 0, 0, 0],
        attribute(1 | NESTED, &tuple(client, server)),
        attribute(2 | NESTED, &tuple(server, client)),
        attribute(3, &STATUS.to_be_bytes()),
        attribute(7, &TIMEOUT.to_be_bytes()),
        attribute(4 | NESTED, &attribute(1 | NESTED, &state)),
    ]
    .concat();
    let length = u32::try_from(HEADER + body.len()).expect("a length").to_ne_bytes();
    let rest = [index.to_ne_bytes(), 0_u32.to_ne_bytes()].concat();
    [&length[..], &NEW.to_ne_bytes(), &FLAGS.to_ne_bytes(), &rest, &body].concat()
}

/// `CTA_TUPLE_IP` and `CTA_TUPLE_PROTO` of a TCP connection.
fn tuple(from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Vec<u8> {
    const TCP: u8 = 6;
    let addresses = [attribute(1, &from.0), attribute(2, &to.0)].concat();
    let ports = [
        attribute(1, &[TCP]),
        attribute(2, &from.1.to_be_bytes()),
        attribute(3, &to.1.to_be_bytes()),
    ];
    [attribute(1 | NESTED, &addresses), attribute(2 | NESTED, &ports.concat())].concat()
}

/// An attribute, padded to four bytes.
fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + content.len()).expect("a length").to_ne_bytes();
    let mut bytes = [&length[..], &kind.to_ne_bytes(), content].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
