//! Tests the return path: whether replies to a preserved client address reach the proxy.
//!
//! If the proxy connects to the workload from the client's address, only a mark and an ip rule
//! route the replies back to it. [`ReturnPathProbe::prepare`] opens a listener like an application,
//! and a socket with an unused client address like the proxy. Both must be opened before the
//! process changes to the proxy's user. The proxy sets deadlines and reports failures.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpSocket};

use crate::namespace::{Entered, ipv6};
use crate::plan::{Action, Environment, Families, PolicyRoute, RulePlan, is_link_local};
use crate::self_test::{UNUSED_V4, UNUSED_V6, disconnect};
use crate::sockets::socket::{SocketKind, SocketRole, Sockets, reset_on_close};

/// A connection from an unused address to a listener of this process.
#[derive(Debug)]
pub struct ReturnPathProbe {
    listener: Socket,
    socket: Socket,
    /// The source address of the connection.
    pub client: IpAddr,
    /// The destination, a local address.
    pub destination: SocketAddr,
    /// The ip rule and route that return the reply.
    pub route: PolicyRoute,
}

impl ReturnPathProbe {
    /// Prepares a probe for each address family in which the namespace has an address. Empty if the
    /// rules do not preserve client addresses.
    ///
    /// # Errors
    ///
    /// The error of the kernel: no socket, no permission, or no list of interfaces.
    pub fn prepare(entered: &Entered, plan: &RulePlan, sockets: &Sockets) -> io::Result<Vec<Self>> {
        let Some(&route) = plan.routes().first().filter(|_| sockets.preserve_client_addresses())
        else {
            return Ok(Vec::new());
        };
        let environment = Environment::of(entered)?;
        let mut connections = Vec::new();
        for unused in [UNUSED_V4, UNUSED_V6] {
            let own = environment.address(unused.is_ipv6());
            let Some(own) =
                own.filter(|own| !is_link_local(*own) && returns_replies_to(entered, plan, unused))
            else {
                continue;
            };
            // An address without a route cannot belong to a client.
            let Some(client) =
                [unused, neighbour(own)].into_iter().find(|to| is_route(entered, own, *to))
            else {
                continue;
            };
            if let Some((listener, destination)) = listen(entered, own)? {
                let kind = SocketKind::new(SocketRole::Workload, destination);
                let socket = sockets.open(entered, kind)?;
                sockets.bind_for(&socket, destination, client)?;
                let socket = socket.into_socket();
                connections.push(Self { listener, socket, client, destination, route });
            }
        }
        Ok(connections)
    }

    /// Connects, and waits until the listener accepts the connection from the client address. Has
    /// no timeout. May be called again.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub async fn connect(&self) -> io::Result<()> {
        disconnect(&self.socket);
        let listener = TcpListener::from_std(self.listener.try_clone()?.into())?;
        let socket = TcpSocket::from_std_stream(self.socket.try_clone()?.into());
        let accept = async {
            loop {
                let (stream, peer) = listener.accept().await?;
                // Another client may connect to the same port.
                if peer.ip() == self.client {
                    return Ok(stream);
                }
            }
        };
        let (near, far) = tokio::try_join!(socket.connect(self.destination), accept)?;
        // Neither end should wait for segments from the unused address.
        reset_on_close(&far);
        reset_on_close(&near);
        disconnect(&self.socket);
        Ok(())
    }
}

/// Returns true if the plan returns replies to clients of this family. While IPv6 is disabled on
/// the loopback interface, there are no IPv6 connections to return.
fn returns_replies_to(entered: &Entered, plan: &RulePlan, client: IpAddr) -> bool {
    let family = if client.is_ipv6() { Families::V6 } else { Families::V4 };
    let marks_connection =
        |action: &Action| matches!(action, Action::MarkConnection(_) | Action::SaveMark);
    let by_rule = plan.rules().iter().any(|rule| {
        marks_connection(&rule.action)
            && (rule.families == Families::Both || rule.families == family)
    });
    by_rule && (client.is_ipv4() || ipv6::on_loopback(entered))
}

/// The other address of the smallest network that contains `own`. A host with this address receives
/// the probe only if the test fails.
fn neighbour(own: IpAddr) -> IpAddr {
    match own {
        IpAddr::V4(own) => Ipv4Addr::from_bits(own.to_bits() ^ 1).into(),
        IpAddr::V6(own) => Ipv6Addr::from_bits(own.to_bits() ^ 1).into(),
    }
}

/// Returns true if the kernel has a route for a reply from `own` to `client` before rules mark it.
/// The kernel sends nothing otherwise.
fn is_route(_: &Entered, own: IpAddr, client: IpAddr) -> bool {
    const DISCARD: u16 = 9;
    let connected = || {
        let socket = UdpSocket::bind(SocketAddr::new(own, 0))?;
        socket.connect(SocketAddr::new(client, DISCARD))
    };
    connected().is_ok()
}

/// Opens a listener without a mark, as applications do. `None` while the address is tentative
/// (duplicate address detection, RFC 4862 section 5.4).
fn listen(_: &Entered, own: IpAddr) -> io::Result<Option<(Socket, SocketAddr)>> {
    let any_port = SocketAddr::new(own, 0);
    let socket = Socket::new(Domain::for_address(any_port), Type::STREAM.nonblocking(), None)?;
    match socket.bind(&any_port.into()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => return Ok(None),
        Err(error) => return Err(error),
    }
    socket.listen(1)?;
    let address = socket.local_addr()?.as_socket();
    Ok(address.map(|address| (socket, address)))
}
