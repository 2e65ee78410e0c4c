//! The test that answers come back: where the proxy connects to the workload from its clients' own
//! addresses, an answer is for somebody outside, and only a mark and an ip rule return it.
//!
//! [`WayBack::prepare`] opens a listener as an application does, and a socket as the proxy does for
//! a client that nobody is, both while the process may still be another user than the proxy. Not
//! here: deadlines, and what is said of a failure (the proxy's side).

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpSocket};

use crate::plan::{Action, Environment, Families, PolicyRoute, RulePlan, is_link_local};
use crate::self_test::{NOBODY_V4, NOBODY_V6, disconnect};
use crate::socket::{Sockets, reset_on_close};
use crate::{Entered, ipv6};

/// A connection to be made from an address that nobody has to a listener of our own.
#[derive(Debug)]
pub struct WayBack {
    listener: Socket,
    socket: Socket,
    /// From where.
    pub client: IpAddr,
    /// To where: an address of this namespace.
    pub destination: SocketAddr,
    /// What has to return the answer.
    pub route: PolicyRoute,
}

impl WayBack {
    /// One for each family in which clients are imitated and this namespace has an address; none
    /// where clients are not imitated.
    ///
    /// # Errors
    ///
    /// The kernel's: no socket, no leave to imitate, or no list of interfaces.
    pub fn prepare(entered: &Entered, plan: &RulePlan, sockets: &Sockets) -> io::Result<Vec<Self>> {
        let Some(&route) = plan.routes().first().filter(|_| sockets.imitate_clients()) else {
            return Ok(Vec::new());
        };
        let environment = Environment::of(entered)?;
        let mut connections = Vec::new();
        for nobody in [NOBODY_V4, NOBODY_V6] {
            let own = environment.address(nobody.is_ipv6());
            let Some(own) = own.filter(|own| !is_link_local(*own) && serves(entered, plan, nobody))
            else {
                continue;
            };
            // Nobody is where no route leads to.
            let Some(client) =
                [nobody, neighbour(own)].into_iter().find(|to| is_route(entered, own, *to))
            else {
                continue;
            };
            if let Some((listener, destination)) = listen(entered, own)? {
                let socket = sockets.open_to_workload(destination, client)?;
                connections.push(Self { listener, socket, client, destination, route });
            }
        }
        Ok(connections)
    }

    /// Whether the address of the workload's end is still one of this namespace's.
    #[must_use]
    pub fn is_current(&self, _: &Entered) -> bool {
        UdpSocket::bind(SocketAddr::new(self.destination.ip(), 0)).is_ok()
    }

    /// Connects; ends when the workload's end has it too, from the address that it was made from.
    /// The wait has no end of its own. May be called again.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn connect(&self) -> io::Result<()> {
        disconnect(&self.socket);
        let listener = TcpListener::from_std(self.listener.try_clone()?.into())?;
        let socket = TcpSocket::from_std_stream(self.socket.try_clone()?.into());
        let accept = async {
            loop {
                let (stream, peer) = listener.accept().await?;
                // Whoever else finds the port is no answer.
                if peer.ip() == self.client {
                    return Ok(stream);
                }
            }
        };
        let (near, far) = tokio::try_join!(socket.connect(self.destination), accept)?;
        // Neither end is to wait for segments of nobody's.
        reset_on_close(&far);
        reset_on_close(&near);
        disconnect(&self.socket);
        Ok(())
    }
}

/// Whether the plan returns answers to clients of this family. A loopback interface without IPv6
/// has no IPv6 connection to return (`routes.rs`).
fn serves(entered: &Entered, plan: &RulePlan, client: IpAddr) -> bool {
    let family = if client.is_ipv6() { Families::V6 } else { Families::V4 };
    let remembers =
        |action: &Action| matches!(action, Action::MarkConnection(_) | Action::SaveMark);
    let by_rule = plan.rules().iter().any(|rule| {
        remembers(&rule.action) && (rule.families == Families::Both || rule.families == family)
    });
    by_rule && (client.is_ipv4() || ipv6::on_loopback(entered))
}

/// The other address of the smallest network that `own` can share with anybody. Whoever has it hears
/// of the test only if that fails.
fn neighbour(own: IpAddr) -> IpAddr {
    match own {
        IpAddr::V4(own) => Ipv4Addr::from_bits(own.to_bits() ^ 1).into(),
        IpAddr::V6(own) => Ipv6Addr::from_bits(own.to_bits() ^ 1).into(),
    }
}

/// Whether an answer from `own` to `client` has a route before the rules mark it: the kernel looks for
/// one first, and sends nothing without.
fn is_route(_: &Entered, own: IpAddr, client: IpAddr) -> bool {
    const DISCARD: u16 = 9;
    let connected = || {
        let socket = UdpSocket::bind(SocketAddr::new(own, 0))?;
        socket.connect(SocketAddr::new(client, DISCARD))
    };
    connected().is_ok()
}

/// Without a mark, as applications do; `None` if the address cannot be used yet (duplicate address
/// detection, RFC 4862 5.4).
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
