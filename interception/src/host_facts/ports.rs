//! The sockets that listen in a network namespace, and the processes that own them, as far as /proc
//! shows them.
//!
//! The kernel shows the open files of another user's processes only to root or with SYS_PTRACE.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::namespace::Entered;
use crate::sockets::listener::ListenerTransport;

/// TCP_LISTEN of include/net/tcp_states.h.
const LISTEN: &str = "0A";
/// TCP_CLOSE, the state of a UDP socket without a peer.
const UNCONNECTED: &str = "07";

/// A socket that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListeningSocket {
    /// Its protocol.
    pub transport: ListenerTransport,
    /// Its address.
    pub address: SocketAddr,
    /// The processes that have it; none if they are not visible. A service manager may hold
    /// duplicates of the listeners of a service.
    pub owners: Vec<SocketOwner>,
}

/// The process that has a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOwner {
    /// The process id.
    pub pid: u32,
    /// The command name.
    pub name: String,
}

impl ListeningSocket {
    /// Returns true if another socket cannot listen at `address`.
    #[must_use]
    pub fn blocks(&self, transport: ListenerTransport, address: SocketAddr) -> bool {
        let (own, other) = (self.address.ip(), address.ip());
        let is_any = |ip: IpAddr| ip.is_unspecified();
        // A socket at [::] also takes connections to IPv4 addresses.
        let overlaps = own == other
            || is_any(own) && (own.is_ipv6() || other.is_ipv4())
            || is_any(other) && (other.is_ipv6() || own.is_ipv4());
        self.transport == transport && self.address.port() == address.port() && overlaps
    }
}

/// The sockets of the entered namespace that listen on one of `ports`, with their owners.
#[must_use]
pub fn listening_sockets(_: &Entered, ports: &[u16]) -> Vec<ListeningSocket> {
    use ListenerTransport::{Datagram, Stream};
    let tables = [("tcp", Stream), ("tcp6", Stream), ("udp", Datagram), ("udp6", Datagram)];
    let mut found = Vec::new();
    for (table, transport) in tables {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        let rows = text.lines().skip(1).filter_map(|line| row(line, transport));
        found.extend(rows.filter(|(address, _)| ports.contains(&address.port())).map(
            |(address, inode)| (ListeningSocket { transport, address, owners: Vec::new() }, inode),
        ));
    }
    let owners = if found.is_empty() { HashMap::new() } else { owners() };
    let with_owners = |(socket, inode): (ListeningSocket, u64)| {
        let pids = owners.get(&inode).into_iter().flatten();
        ListeningSocket { owners: pids.filter_map(|pid| owner(*pid)).collect(), ..socket }
    };
    found.into_iter().map(with_owners).collect()
}

/// The address and the inode of a listening socket in a row of /proc/net/tcp and similar tables.
fn row(line: &str, transport: ListenerTransport) -> Option<(SocketAddr, u64)> {
    let mut fields = line.split_whitespace();
    let address = fields.nth(1)?;
    let state = fields.nth(1)?;
    let listening = match transport {
        ListenerTransport::Stream => LISTEN,
        ListenerTransport::Datagram => UNCONNECTED,
    };
    let inode = fields.nth(5)?.parse().ok()?;
    let (ip, port) = address.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    (state == listening).then_some((SocketAddr::new(ip_address(ip)?, port), inode))
}

/// An address as the kernel prints it: words of 32 bits in the byte order of the host.
fn ip_address(hex: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let digits = hex.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// The processes of each socket that is visible, by inode.
fn owners() -> HashMap<u64, Vec<u32>> {
    let mut owners = HashMap::<_, Vec<u32>>::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        for file in fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten() {
            let Ok(target) = fs::read_link(file.path()) else { continue };
            if let Some(inode) = target.to_str().and_then(socket_inode) {
                let pids = owners.entry(inode).or_default();
                // A process may have several descriptors of a socket.
                if pids.last() != Some(&pid) {
                    pids.push(pid);
                }
            }
        }
    }
    owners
}

/// The inode in `socket:[INODE]`.
fn socket_inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn owner(pid: u32) -> Option<SocketOwner> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(SocketOwner { pid, name: name.trim_end().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::ListenerTransport::{Datagram, Stream};
    use super::*;
    use crate::namespace::{Namespace, NamespaceThread};

    #[test]
    fn rows_of_proc_have_address_and_inode_of_listeners() {
        let line = "   0: 0100007F:3AAE 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0";
        let expected: SocketAddr = "127.0.0.1:15022".parse().unwrap();
        assert_eq!(row(line, Stream), Some((expected, 4711)));
        assert_eq!(row(&line.replace(" 0A ", " 01 "), Stream), None);
        assert_eq!(row(line, Datagram), None);
        assert_eq!(row("sl local_address", Stream), None);
        let loopback = "00000000000000000000000001000000";
        assert_eq!(ip_address(loopback), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!(ip_address("0x"), None);
        assert_eq!([socket_inode("socket:[7]"), socket_inode("pipe:[7]")], [Some(7), None]);
    }

    #[test]
    fn overlapping_addresses_block_each_other() {
        let blocks = |own: &str, other: &str| {
            let socket = |address: &str| address.parse::<SocketAddr>().unwrap();
            let socket_at =
                |address| ListeningSocket { transport: Stream, address, owners: Vec::new() };
            socket_at(socket(own)).blocks(Stream, socket(other))
        };
        assert!(blocks("127.0.0.1:80", "[::]:80") && blocks("[::]:80", "127.0.0.1:80"));
        assert!(blocks("0.0.0.0:80", "[::]:80") && blocks("127.0.0.1:80", "127.0.0.1:80"));
        assert!(!blocks("127.0.0.1:80", "[::]:81") && !blocks("127.0.0.1:80", "127.0.0.2:80"));
        assert!(!blocks("0.0.0.0:80", "[::1]:80"));
    }

    #[tokio::test]
    async fn own_listener_is_found_with_this_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (thread, namespace) =
            (NamespaceThread::start().unwrap(), Namespace::current().unwrap());
        let list = move |inside: &Entered| listening_sockets(inside, &[address.port()]);
        let found = thread.call(&namespace, list).await.unwrap();
        let own = found.iter().find(|socket| socket.address == address).expect("the listener");
        assert!(own.owners.iter().any(|owner| owner.pid == std::process::id()), "{own:?}");
        assert_eq!(own.transport, Stream);
    }
}
