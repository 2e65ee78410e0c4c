//! Asks the kernel's routing tables whether an address is local to this namespace: the same
//! criterion as `fib daddr type local` of nftables and `-m addrtype --dst-type LOCAL` of iptables.
//!
//! An address is local as soon as it is added; so are the addresses of a `local` route (AnyIP). A
//! query takes two system calls; callers may cache the answer.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::namespace::Entered;

/// include/uapi/linux/rtnetlink.h and include/uapi/linux/netlink.h.
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const RTA_DST: u16 = 1;
const RTN_LOCAL: u8 = 2;
/// sizeof(struct nlmsghdr), sizeof(struct rtmsg), sizeof(struct rtattr).
const HEADER: u16 = 16;
const ROUTE: u16 = 12;
const ATTRIBUTE: u16 = 4;
/// The offset of `rtm_type` in a message: the eighth octet of struct rtmsg.
const ROUTE_TYPE: usize = 16 + 7;

/// The maximum number of answers to earlier queries that may precede the current answer.
const MAX_EARLIER_ANSWERS: usize = 8;

/// Looks up addresses in the namespace in which it was opened.
#[derive(Debug)]
pub struct LocalAddresses {
    socket: OwnedFd,
    /// The number of the last query. The lock keeps each answer together with its query.
    sequence: Mutex<u32>,
}

impl From<OwnedFd> for LocalAddresses {
    /// Uses a socket that another process opened for such lookups.
    fn from(socket: OwnedFd) -> Self {
        Self { socket, sequence: Mutex::default() }
    }
}

impl From<LocalAddresses> for OwnedFd {
    /// The socket, to pass it to another process.
    fn from(addresses: LocalAddresses) -> Self {
        addresses.socket
    }
}

impl LocalAddresses {
    /// Opens a netlink socket in the namespace.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn open(_: &Entered) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol `None` is 0: NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        Ok(Self { socket, sequence: Mutex::default() })
    }

    /// Returns true if packets to `address` are delivered in this namespace.
    ///
    /// # Errors
    ///
    /// The error of the kernel, or a missing answer.
    pub fn contain(&self, address: IpAddr) -> io::Result<bool> {
        let address = address.to_canonical();
        if address.is_loopback() {
            return Ok(true);
        }
        let mut sequence = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
        *sequence = sequence.wrapping_add(1);
        self.ask(*sequence, address)
    }

    /// Sends a query and reads its answer. The kernel answers before `send` returns
    /// (`netlink_unicast_kernel`, net/netlink/af_netlink.c).
    fn ask(&self, sequence: u32, address: IpAddr) -> io::Result<bool> {
        send(&self.socket, &request(sequence, address), SendFlags::empty())?;
        let mut answer = [0; 1024];
        for _ in 0..MAX_EARLIER_ANSWERS {
            let (read, _) = recv(&self.socket, &mut answer, RecvFlags::empty())?;
            if let Some(local) = is_local(answer.get(..read).unwrap_or_default(), sequence) {
                return Ok(local);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn request(sequence: u32, address: IpAddr) -> Vec<u8> {
    // AF_INET and AF_INET6 (include/linux/socket.h), and the length of an address.
    let (family, size, octets) = match address {
        IpAddr::V4(address) => (2, 4_u8, address.octets().to_vec()),
        IpAddr::V6(address) => (10, 16, address.octets().to_vec()),
    };
    let attribute = ATTRIBUTE + u16::from(size);
    let length = u32::from(HEADER) + u32::from(ROUTE) + u32::from(attribute);
    let mut request = Vec::new();
    request.extend(length.to_ne_bytes());
    request.extend(RTM_GETROUTE.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend(sequence.to_ne_bytes());
    // The sender's port, which the kernel sets.
    request.extend(0u32.to_ne_bytes());
    // struct rtmsg: family, length of the destination; source, TOS, table, protocol, scope, type,
    // flags.
    request.extend([family, size * 8]);
    request.extend([0; 10]);
    request.extend(attribute.to_ne_bytes());
    request.extend(RTA_DST.to_ne_bytes());
    request.extend(octets);
    request
}

/// Returns true if the answer contains a local route, false if it contains another route or an
/// error, which means no route. `None` for an answer to another query.
fn is_local(answer: &[u8], sequence: u32) -> Option<bool> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let answered = u32::from_ne_bytes(answer.get(8..12)?.try_into().ok()?);
    match kind {
        _ if answered != sequence => None,
        RTM_NEWROUTE => Some(*answer.get(ROUTE_TYPE)? == RTN_LOCAL),
        NLMSG_ERROR => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_local_and_documentation_addresses_are_not() {
        let local = LocalAddresses::open(&Entered::current().unwrap()).unwrap();
        for address in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"] {
            assert!(local.contain(address.parse().unwrap()).unwrap(), "{address}");
        }
        for address in ["192.0.2.1", "2001:db8::1"] {
            assert!(!local.contain(address.parse().unwrap()).unwrap(), "{address}");
        }
    }

    #[test]
    fn answers_to_other_queries_are_ignored() {
        let answer = |kind: u16, sequence: u32, route: u8| {
            let mut answer = vec![0; ROUTE_TYPE + 5];
            answer[4..6].copy_from_slice(&kind.to_ne_bytes());
            answer[8..12].copy_from_slice(&sequence.to_ne_bytes());
            answer[ROUTE_TYPE] = route;
            answer
        };
        assert_eq!(is_local(&answer(RTM_NEWROUTE, 7, RTN_LOCAL), 7), Some(true));
        assert_eq!(is_local(&answer(RTM_NEWROUTE, 7, 1), 7), Some(false));
        assert_eq!(is_local(&answer(NLMSG_ERROR, 7, 0), 7), Some(false));
        assert_eq!(is_local(&answer(RTM_NEWROUTE, 6, RTN_LOCAL), 7), None);
        assert_eq!(is_local(&answer(3, 7, RTN_LOCAL), 7), None);
        assert_eq!(is_local(&[], 7), None);
        assert_eq!(is_local(&answer(RTM_NEWROUTE, 7, RTN_LOCAL)[..ROUTE_TYPE], 7), None);
    }
}
