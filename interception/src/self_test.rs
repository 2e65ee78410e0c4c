//! The test that the rules work, not only that they are there: connections that must come back to
//! the proxy with the destination that they were made for.
//!
//! The plan says which connection is caught (the walk of its first packet). [`ProbeSockets`] are
//! opened while the process may still be another user than the proxy: the kernel compares the user
//! that opened a socket (`sk->sk_socket->file->f_cred`, net/netfilter/nft_meta.c), not the user
//! of the process that uses it later. So the test can run again after the process has become the proxy's user: connecting to
//! AF_UNSPEC makes a socket ready for another connection (connect(2)).
//!
//! Not here: the proxy's side, which reports what arrived.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::unistd::{getegid, geteuid};
use rustix::net::connect_unspec;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpSocket;
use underpass_config::{InterceptionSettings, PortRange};

use crate::plan::{End, Environment, Packet, Ports, Protocol, RulePlan, State, Way};
use crate::{Entered, ipv6};

/// Addresses that nobody has (TEST-NET-1, RFC 5737; documentation prefix, RFC 3849).
pub(crate) const NOBODY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
pub(crate) const NOBODY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
/// The port that linkerd's validator has made known for this.
const PORT: u16 = 1404;

/// Sockets of the user that starts the proxy, whose connections the rules take for the workload's.
#[derive(Debug)]
pub struct ProbeSockets {
    v4: Socket,
    /// `None` where the kernel has no IPv6.
    v6: Option<Socket>,
    uid: u32,
    gid: u32,
}

/// A connection to be made. Dropping it ends the connection.
#[derive(Debug)]
pub struct Probe {
    socket: Socket,
    /// What it is to connect to, and so the original destination that has to arrive.
    pub destination: SocketAddr,
    /// The port of ours at which it has to arrive.
    pub port: u16,
}

impl ProbeSockets {
    /// Opens them in the namespace, as the user that the process is now.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(_: &Entered) -> io::Result<Self> {
        let open = |domain| Socket::new(domain, Type::STREAM.nonblocking(), None);
        let v6 = ipv6::ipv6_available().then(|| open(Domain::IPV6)).transpose()?;
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        Ok(Self { v4: open(Domain::IPV4)?, v6, uid, gid })
    }

    /// One connection for each family whose outbound connections the plan catches, where these
    /// sockets can make one that is caught. Of all probes of a family, one may be in use.
    ///
    /// # Errors
    ///
    /// The kernel's: no descriptor, or no list of interfaces.
    pub fn probes(
        &self,
        entered: &Entered,
        plan: &RulePlan,
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> io::Result<Vec<Probe>> {
        let environment = Environment::of(entered)?;
        let candidates = candidates(settings);
        let mut probes = Vec::new();
        // What is redirected to ::1 does not arrive while IPv6 is disabled on the loopback
        // interface.
        let v6 = self.v6.as_ref().filter(|_| ipv6::on_loopback(entered));
        for (v6, socket) in [(false, Some(&self.v4)), (true, v6)] {
            let caught = candidates
                .iter()
                .filter(|destination| destination.is_ipv6() == v6)
                .find(|to| self.is_caught(plan, &environment, **to, ports.outbound));
            if let (Some(&destination), Some(socket)) = (caught, socket) {
                let socket = socket.try_clone()?;
                probes.push(Probe { socket, destination, port: ports.outbound });
            }
        }
        Ok(probes)
    }

    /// Whether a connection of these sockets would be caught on its way to `destination`.
    fn is_caught(
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
            way: Way::Out {
                interface: environment.interface_to(destination.ip()).to_owned(),
                uid: self.uid,
                gid: self.gid,
            },
            state: State::New,
            mark: 0,
            connection_mark: 0,
        };
        plan.walk(&packet, environment).end == End::Redirected(port)
    }
}

impl Probe {
    /// Connects; `false` where the namespace has no route to such a destination, so that no
    /// connection to it can leave either.
    ///
    /// # Errors
    ///
    /// The kernel's: refused means that the connection was caught and nobody listened, or that it
    /// was not caught at all.
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

/// Makes a socket ready for another connection. One that was never connected is.
pub(crate) fn disconnect(socket: &Socket) {
    let _not_connected = connect_unspec(socket);
}

fn is_unroutable(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), AddrNotAvailable | HostUnreachable | NetworkUnreachable)
}

/// Destinations of which one is caught, whatever is included and excluded.
fn candidates(settings: &InterceptionSettings) -> Vec<SocketAddr> {
    let outbound = &settings.outbound;
    let included = outbound.include_cidrs.iter().flatten();
    let addresses = [NOBODY_V4, NOBODY_V6]
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

fn first(range: &PortRange) -> u16 {
    range.first
}
