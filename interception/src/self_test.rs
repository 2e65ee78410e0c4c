//! The test that the rules work, not only that they are there: connections that must come back to
//! the proxy with the destination that they were made for.
//!
//! The plan says which connection is caught (the walk of its first packet); [`Probe::prepare`]
//! opens a socket for it while the process may still be another user than the proxy, since the
//! owner of a socket is who made it. Not here: the proxy's side, which tells what arrived.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::unistd::{getegid, geteuid};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use underpass_config::{InterceptionSettings, PortRange};

use crate::ipv6;
use crate::plan::{End, Environment, Packet, Ports, Protocol, RulePlan, State, Way};

/// Addresses that nobody has (TEST-NET-1, RFC 5737; documentation prefix, RFC 3849).
pub(crate) const NOBODY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
pub(crate) const NOBODY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
/// The port that linkerd's validator has made known for this.
const PORT: u16 = 1404;

/// A connection to be made.
#[derive(Debug)]
pub struct Probe {
    socket: Socket,
    /// What it is to connect to, and so the original destination that has to arrive.
    pub destination: SocketAddr,
    /// The port of ours at which it has to arrive.
    pub port: u16,
}

impl Probe {
    /// One for each family whose outbound connections the plan catches, where this process can make
    /// one that is caught.
    ///
    /// # Errors
    ///
    /// The kernel's: no socket, or no list of interfaces.
    pub fn prepare(
        plan: &RulePlan,
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> io::Result<Vec<Self>> {
        let environment = Environment::current()?;
        let candidates = candidates(settings);
        let mut probes = Vec::new();
        // What is redirected to ::1 does not arrive while IPv6 is disabled on the loopback interface.
        let families: &[bool] = if ipv6::on_loopback() { &[false, true] } else { &[false] };
        for &v6 in families {
            let caught = candidates
                .iter()
                .filter(|destination| destination.is_ipv6() == v6)
                .find(|destination| is_caught(plan, &environment, **destination, ports.outbound));
            if let Some(&destination) = caught {
                let domain = Domain::for_address(destination);
                let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
                probes.push(Self { socket, destination, port: ports.outbound });
            }
        }
        Ok(probes)
    }

    /// Connects; `None` where the namespace has no route to such a destination, so that no
    /// connection to it can leave either.
    ///
    /// # Errors
    ///
    /// The kernel's: refused means that the connection was caught and nobody listened, or that it
    /// was not caught at all.
    pub async fn connect(self) -> io::Result<Option<TcpStream>> {
        let socket = TcpSocket::from_std_stream(self.socket.into());
        match socket.connect(self.destination).await {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if is_unroutable(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
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

/// Whether this process, as it is, would be caught on its way to `destination`.
fn is_caught(
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
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
        },
        state: State::New,
        mark: 0,
        connection_mark: 0,
    };
    plan.walk(&packet, environment).end == End::Redirected(port)
}
