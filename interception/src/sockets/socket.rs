//! Sockets that fit the rules: marked, from the client's address where that is wanted, and where a
//! caught connection was going.
//!
//! Opening a socket takes its namespace and its privileges; connecting it later takes neither.
//!
//! Not here: accepting (`listener.rs`), deadlines (the caller's), and what flows through a
//! connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use rustix::net::{SendFlags, send};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;
use underpass_config::{InboundMode, InterceptionSettings, Profile};

use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::{Family, PROXY_MARK};
use crate::sockets::listener::BoundListener;
use crate::sockets::{canonical, listener};

/// How many probes stay unanswered before the connection is given up: Linux's own default.
pub const KEEPALIVE_PROBES: u32 = 9;

/// How the sockets of a profile are made.
#[derive(Debug, Clone)]
pub struct Sockets {
    /// The mark of every socket; else the profile tells the proxy by its user.
    mark: Option<u32>,
    last_hop: LastHop,
    /// Whether listeners take what TPROXY delivers.
    transparent: bool,
    ipv6: bool,
    keepalive: Option<Duration>,
}

/// Where a listener is to listen, and what it is for.
#[derive(Debug, Clone, Copy)]
pub struct ListenerRequest {
    /// `[::]` takes IPv4 too, and without IPv6 is `0.0.0.0`.
    pub address: SocketAddr,
    /// What closing its connections does.
    pub closing: Closing,
    /// What it is for, in the message of a failure.
    pub purpose: &'static str,
    /// The setting that chooses the address, in the message of a failure.
    pub setting: &'static str,
}

/// What a socket is opened for, before its destination is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketKind {
    /// The family of the destination.
    pub family: Family,
    /// What kind of destination that is.
    pub role: SocketRole,
}

/// What kind of destination a socket is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketRole {
    /// A peer, or a destination outside of the mesh: the connection comes from the pod's address.
    Upstream,
    /// The workload: the connection comes from where the profile has it come from.
    Workload,
}

impl SocketKind {
    /// The kind for connections to `destination`.
    #[must_use]
    pub fn new(role: SocketRole, destination: SocketAddr) -> Self {
        let v4 = canonical(destination).is_ipv4();
        Self { family: if v4 { Family::V4 } else { Family::V6 }, role }
    }
}

/// A socket of a namespace with all options of its kind, not yet connected. The kernel checks the
/// privileges for SO_MARK and IP_TRANSPARENT as they are set (`sk_setsockopt`, net/core/sock.c;
/// `do_ip_setsockopt`, net/ipv4/ip_sockglue.c), so that a thread without capabilities can bind and
/// connect it.
#[derive(Debug)]
pub struct ReadySocket {
    socket: Socket,
    kind: SocketKind,
}

/// What closing a connection that a listener accepted does, as long as nobody says otherwise of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// What was written still arrives, and a FIN behind it.
    End,
    /// RST, as after [`reset_on_close`].
    Reset,
}

/// Where connections to the workload come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LastHop {
    /// The client's own address, with this mark for the way back.
    Imitated { mark: u32 },
    /// An address of the loopback interface, by which the rules know them.
    Loopback { v4: Ipv4Addr, v6: Ipv6Addr },
    /// Whatever the kernel chooses.
    Any,
}

impl Sockets {
    /// Sockets for these settings. `ipv6`: whether the kernel has IPv6, enabled here or not: a
    /// listener at `[::]` takes connections of a family from when it is enabled
    /// ([`crate::namespace::ipv6::ipv6_available`]).
    #[must_use]
    pub fn new(settings: &InterceptionSettings, ipv6: bool) -> Self {
        let imitated = LastHop::Imitated { mark: PROXY_MARK };
        let (mark, last_hop) = match (settings.profile, settings.inbound.mode) {
            (Profile::Ambient, _) => (Some(PROXY_MARK), imitated),
            (Profile::Sidecar, InboundMode::Tproxy) => (None, imitated),
            (Profile::Sidecar, InboundMode::Redirect) => {
                let v6 = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);
                (None, LastHop::Loopback { v4: Ipv4Addr::new(127, 0, 0, 6), v6 })
            }
            (Profile::Osm, _) => {
                let (v4, v6) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
                (None, LastHop::Loopback { v4, v6 })
            }
            (Profile::None, _) => (None, LastHop::Any),
        };
        let transparent = settings.inbound.mode == InboundMode::Tproxy;
        Self { mark, last_hop, transparent, ipv6, keepalive: None }
    }

    /// The same, whose connections are probed when they were silent for this long, and as long
    /// after each probe.
    ///
    /// A caught connection lives only as long as its conntrack entry, and what NAT gateways and
    /// load balancers on the way forgot hangs (istio #38982, #43301).
    #[must_use]
    pub fn with_keepalive(self, keepalive: Duration) -> Self {
        Self { keepalive: Some(keepalive), ..self }
    }

    /// Whether connecting needs the capability NET_ADMIN: for marks, and for addresses that are not
    /// ours.
    #[must_use]
    pub fn need_net_admin(&self) -> bool {
        self.mark.is_some() || self.imitate_clients()
    }

    /// Whether listeners also take connections to addresses that are not this namespace's own, so
    /// that the local address of such a connection proves nothing.
    #[must_use]
    pub fn are_transparent(&self) -> bool {
        self.transparent
    }

    /// Listens in the namespace.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Listen`].
    pub fn listen(
        &self,
        entered: &Entered,
        ListenerRequest { address, closing, purpose, setting }: ListenerRequest,
    ) -> Result<BoundListener, InterceptionError> {
        let any_v6 = address.ip().is_unspecified() && address.is_ipv6();
        let address = if any_v6 && !self.ipv6 {
            SocketAddr::from(([0u8; 4], address.port()))
        } else {
            address
        };
        let prepare = |socket: &Socket| self.prepare(socket, closing);
        listener::bind(entered, address, self.mark, self.transparent, prepare)
            .map_err(|source| InterceptionError::Listen { purpose, address, setting, source })
    }

    /// Sets what the connections of `listener` have from it: the kernel copies its options to each
    /// (`sk_clone_lock`, net/core/sock.c), which costs nothing, and six calls for each less.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn prepare(&self, listener: &impl AsFd, closing: Closing) -> io::Result<()> {
        self.tune(listener)?;
        match closing {
            Closing::End => end_on_close(listener),
            Closing::Reset => reset_on_close(listener),
        }
        Ok(())
    }

    /// Opens a socket in the namespace, for a later [`connect`](ReadySocket::connect). Closing it
    /// sends RST, until [`end_on_close`].
    ///
    /// # Errors
    ///
    /// The kernel's: no descriptor, no privilege, no such family.
    pub fn open(&self, _: &Entered, kind: SocketKind) -> io::Result<ReadySocket> {
        let (domain, workload) = (domain(kind.family), kind.role == SocketRole::Workload);
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
        let mark = match self.last_hop {
            LastHop::Imitated { mark } if workload => Some(mark),
            _ => self.mark,
        };
        if let Some(mark) = mark {
            socket.set_mark(mark)?;
        }
        self.tune(&socket)?;
        // A connection that is given up half-way ends with a RST: the kernel may have it by then,
        // and to its acceptor a FIN would be a complete end.
        reset_on_close(&socket);
        if workload && self.last_hop != LastHop::Any {
            // A bound socket gets its port when its destination is known: else bind takes one that
            // no other destination may use, and one address can have 28,000 connections at most.
            // The option is IPv4's and holds for both (ipv6_setsockopt hands SOL_IP on).
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        }
        if workload && self.imitate_clients() {
            match kind.family {
                Family::V4 => socket.set_ip_transparent_v4(true)?,
                Family::V6 => socket.set_ip_transparent_v6(true)?,
            }
        }
        Ok(ReadySocket { socket, kind })
    }

    /// Binds `socket` to the address from which the workload at `destination` is connected to for
    /// `client`: the client's own or one of the loopback interface, as the profile has it.
    ///
    /// The client's address is left out where it would not work: when it is of the other family,
    /// and when it is the destination itself, whose replies to itself would never leave it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn bind_for(
        &self,
        socket: &ReadySocket,
        destination: SocketAddr,
        client: IpAddr,
    ) -> io::Result<()> {
        let (destination, client) = (canonical(destination), client.to_canonical());
        let source = match self.last_hop {
            LastHop::Imitated { .. } => {
                let same_family = client.is_ipv4() == destination.is_ipv4();
                (same_family && client != destination.ip()).then_some(client)
            }
            LastHop::Loopback { v4, v6 } => {
                Some(if destination.is_ipv4() { v4.into() } else { v6.into() })
            }
            LastHop::Any => None,
        };
        let bind = |source| socket.socket.bind(&SocketAddr::new(source, 0).into());
        source.map_or(Ok(()), bind)
    }

    /// Whether the workload sees its clients' own addresses, so that its answers need a way back.
    #[must_use]
    pub(crate) fn imitate_clients(&self) -> bool {
        matches!(self.last_hop, LastHop::Imitated { .. })
    }

    /// Sets what every connection of the proxy has: no delay of small segments, and keepalive.
    fn tune(&self, stream: &impl AsFd) -> io::Result<()> {
        let socket = SockRef::from(stream);
        socket.set_tcp_nodelay(true)?;
        let Some(keepalive) = self.keepalive else {
            return Ok(());
        };
        let probes = TcpKeepalive::new().with_time(keepalive).with_interval(keepalive);
        socket.set_tcp_keepalive(&probes.with_retries(KEEPALIVE_PROBES))
    }
}

impl ReadySocket {
    /// What it was opened for.
    #[must_use]
    pub fn kind(&self) -> SocketKind {
        self.kind
    }

    /// Connects to `destination`, which is of its family.
    ///
    /// # Errors
    ///
    /// The kernel's, as it gave them: refused, unreachable, not permitted. The wait has no end of
    /// its own.
    pub async fn connect(self, destination: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket;
        match socket.connect(&canonical(destination).into()) {
            Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
                return Err(error);
            }
            Ok(()) | Err(_) => {}
        }
        // A peer on the same host, as an application is, has answered by now, as a rule: its
        // packets are delivered before the call returns, which does not look at them itself.
        let connected = socket.peer_addr().is_ok();
        let stream = TcpStream::from_std(socket.into())?;
        if !connected {
            stream.writable().await?;
            stream.take_error()?.map_or(Ok(()), Err)?;
        }
        Ok(stream)
    }

    /// The socket itself, for the self-test.
    pub(crate) fn into_socket(self) -> Socket {
        self.socket
    }
}

/// The address that the client of an accepted connection connected to, before any rule redirected
/// the connection. An IPv4 address is never in its IPv6 form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OriginalDestination(SocketAddr);

impl OriginalDestination {
    /// The destination `address`.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self(canonical(address))
    }

    /// The destination of a connection of `client` that a rule may have redirected.
    ///
    /// # Errors
    ///
    /// The kernel's: ENOENT if conntrack does not know the connection.
    pub fn redirected(stream: &impl AsFd, client: IpAddr) -> io::Result<Self> {
        let socket = SockRef::from(stream);
        // The family is that of the packets, which on a dual-stack listener is not the socket's.
        // Asked for the other one, conntrack would look up addresses that are not the connection's.
        let original = if client.to_canonical().is_ipv4() {
            socket.original_dst_v4()?
        } else {
            socket.original_dst_v6()?
        };
        inet(original).map(Self::new)
    }

    /// The destination of a connection that no rule redirects: the address of `stream` itself.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn local(stream: &impl AsFd) -> io::Result<Self> {
        inet(SockRef::from(stream).local_addr()?).map(Self::new)
    }

    /// The address.
    #[must_use]
    pub fn address(self) -> SocketAddr {
        self.0
    }
}

/// From now on, closing `stream` sends RST instead of FIN, whoever closes it: the kernel too, when
/// the process is killed. A connection that is gone already needs no reset, so that this cannot
/// fail.
pub fn reset_on_close(stream: &impl AsFd) {
    let _gone = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Takes [`reset_on_close`] back: what was written still arrives, and a FIN behind it.
pub fn end_on_close(stream: &impl AsFd) {
    let _gone = SockRef::from(stream).set_linger(None);
}

/// Probes the other side of `stream` when it was silent for `first`, and then `every` so often,
/// both in whole seconds; it is given up after [`KEEPALIVE_PROBES`] without an answer. A connection
/// that is gone needs no probes, so that this cannot fail.
pub fn probe_every(stream: &impl AsFd, first: Duration, every: Duration) {
    let probes = TcpKeepalive::new().with_time(first).with_interval(every);
    let _gone = SockRef::from(stream).set_tcp_keepalive(&probes.with_retries(KEEPALIVE_PROBES));
}

/// Sends a FIN behind what was written; reading goes on.
///
/// # Errors
///
/// The kernel's; none if the connection is gone already, which whoever reads it learns.
pub fn end_writing(stream: &impl AsFd) -> io::Result<()> {
    match SockRef::from(stream).shutdown(Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        ended => ended,
    }
}

/// Writes to `stream` what [`end_writing`] follows at once: with room for all of it, the FIN leaves
/// in the same segment. How much was written.
///
/// # Errors
///
/// The kernel's.
pub fn write_before_end(stream: &impl AsFd, data: &[u8]) -> io::Result<usize> {
    Ok(send(stream, data, SendFlags::MORE | SendFlags::NOSIGNAL)?)
}

fn domain(family: Family) -> Domain {
    match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    }
}

fn inet(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    address.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
mod tests;
