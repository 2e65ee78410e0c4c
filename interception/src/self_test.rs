//! Sockets for the self-test of the rules: their connections must arrive at the proxy with their
//! original destination.
//!
//! The plan decides which connections are captured. The kernel matches the user that opened a
//! socket (`sk->sk_socket->file->f_cred`, net/netfilter/nft_meta.c), so [`ProbeSockets`] are opened
//! before the process changes to the proxy's user. Connecting to AF_UNSPEC makes a socket reusable
//! (connect(2)), so the test can also run after the change. The proxy reports the connections that
//! arrive.

pub(crate) mod packets;
pub(crate) mod return_path;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::unistd::{getegid, geteuid};
use rustix::net::connect_unspec;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpSocket;
use underpass_config::{InterceptionSettings, PortRange};

use crate::namespace::{Entered, ipv6};
use crate::plan::{ConntrackState, Entry, Environment, Packet, Ports, Protocol, RulePlan, Verdict};

/// Addresses that no host has (TEST-NET-1, RFC 5737; documentation prefix, RFC 3849).
pub(crate) const UNUSED_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
pub(crate) const UNUSED_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
/// The port that linkerd's network validator uses for the same purpose.
const PORT: u16 = 1404;

/// Sockets of the user that starts the proxy. The rules treat their connections as the workload's.
#[derive(Debug)]
pub struct ProbeSockets {
    v4: Socket,
    /// `None` if the kernel does not support IPv6.
    v6: Option<Socket>,
    uid: u32,
    gid: u32,
}

/// A connection of the self-test. Dropping it closes the connection.
#[derive(Debug)]
pub struct Probe {
    socket: Socket,
    /// The destination, which must arrive as the original destination.
    pub destination: SocketAddr,
    /// The port of the proxy at which the connection must arrive.
    pub port: u16,
}

impl ProbeSockets {
    /// Opens the sockets in the namespace. The current user of the process owns them.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn open(_: &Entered) -> io::Result<Self> {
        let open = |domain| Socket::new(domain, Type::STREAM.nonblocking(), None);
        let v6 = ipv6::ipv6_available().then(|| open(Domain::IPV6)).transpose()?;
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        Ok(Self { v4: open(Domain::IPV4)?, v6, uid, gid })
    }

    /// Prepares a connection for each family whose outbound connections the plan captures. Leaves
    /// out a family without a socket. Only one probe per family may be in use at a time.
    ///
    /// # Errors
    ///
    /// The kernel has no free descriptor.
    pub fn probes(
        &self,
        environment: &Environment,
        plan: &RulePlan,
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> io::Result<Vec<Probe>> {
        let candidates = candidates(settings);
        let mut probes = Vec::new();
        // While IPv6 is disabled on the loopback interface, it has no ::1, so a redirect to ::1
        // does not arrive.
        let v6 = self.v6.as_ref().filter(|_| has_v6_loopback(environment));
        for (v6, socket) in [(false, Some(&self.v4)), (true, v6)] {
            let captured = candidates
                .iter()
                .filter(|destination| destination.is_ipv6() == v6)
                .find(|to| self.is_captured(plan, environment, **to, ports.outbound));
            if let (Some(&destination), Some(socket)) = (captured, socket) {
                let socket = socket.try_clone()?;
                probes.push(Probe { socket, destination, port: ports.outbound });
            }
        }
        Ok(probes)
    }

    /// Returns true if the plan captures a connection from these sockets to `destination`.
    fn is_captured(
        &self,
        plan: &RulePlan,
        environment: &Environment,
        destination: SocketAddr,
        port: u16,
    ) -> bool {
        let Some(source) = environment.address(destination.is_ipv6()) else {
            return false;
        };
        let packet = Packet {
            protocol: Protocol::Tcp,
            source: SocketAddr::new(source, PORT),
            destination,
            entry: Entry::Out {
                interface: environment.interface_to(destination.ip()).to_owned(),
                uid: self.uid,
                gid: self.gid,
            },
            state: ConntrackState::New,
            mark: 0,
            connection_mark: 0,
        };
        plan.walk(&packet, environment).end == Verdict::Redirected(port)
    }
}

impl Probe {
    /// Connects. Returns `false` if there is no route to the destination: such a connection cannot
    /// leave the namespace, whether captured or not.
    ///
    /// # Errors
    ///
    /// The error of the kernel. A refusal means that the connection was captured without a
    /// listener, or that it was not captured.
    pub async fn connect(&self) -> io::Result<bool> {
        disconnect(&self.socket);
        let socket = TcpSocket::from_std_stream(self.socket.try_clone()?.into());
        match socket.connect(self.destination).await {
            Ok(_) => Ok(true),
            Err(error) if is_unroutable(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        disconnect(&self.socket);
    }
}

/// Disconnects a socket, so that it can connect again.
pub(crate) fn disconnect(socket: &Socket) {
    let _not_connected = connect_unspec(socket);
}

fn is_unroutable(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), AddrNotAvailable | HostUnreachable | NetworkUnreachable)
}

/// Possible destinations of the probes: unused addresses, and the first address and port of each
/// inclusion.
fn candidates(settings: &InterceptionSettings) -> Vec<SocketAddr> {
    let outbound = &settings.outbound;
    let included = outbound.include_cidrs.iter().flatten();
    let addresses = [UNUSED_V4, UNUSED_V6]
        .into_iter()
        .chain(included.filter_map(|cidr| cidr.hosts().next()))
        .collect::<Vec<_>>();
    let ports =
        [PORT].into_iter().chain(outbound.include_ports.iter().map(first)).collect::<Vec<_>>();
    let to_all = |address: &IpAddr| {
        ports.iter().map(|port| SocketAddr::new(*address, *port)).collect::<Vec<_>>()
    };
    addresses.iter().flat_map(to_all).collect()
}

fn has_v6_loopback(environment: &Environment) -> bool {
    let mut networks = environment.interfaces.iter().flat_map(|one| &one.addresses);
    networks.any(|network| network.addr() == Ipv6Addr::LOCALHOST)
}

fn first(range: &PortRange) -> u16 {
    range.first
}
