//! Sockets that the rules recognize, with marks and preserved source addresses.
//!
//! Opening a socket requires its namespace and privileges; connecting it later requires neither.
//! `listener` accepts; callers set deadlines.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::Instant;
use underpass_config::{InboundMode, InterceptionSettings, Profile};

use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::{Family, PROXY_MARK};
use crate::process::privileges::ProxyUser;
use crate::process::user::as_user;
use crate::sockets::listener::{BoundListener, ListenerTransport};
use crate::sockets::pacing::{Pacing, UndecidedPacing};
use crate::sockets::{canonical, listener};

/// The number of unanswered keepalive probes after which a connection is closed. Linux has the same
/// default.
pub const KEEPALIVE_PROBES: u32 = 9;

/// The socket options of a profile.
#[derive(Debug, Clone)]
pub struct Sockets {
    /// The mark of all sockets. `None` if the profile identifies the proxy by its user.
    mark: Option<u32>,
    last_hop: LastHop,
    /// True if listeners accept connections that TPROXY delivers.
    transparent: bool,
    ipv6: bool,
    /// The user by which the rules recognize the packets of the DNS proxy, if the process changes
    /// to it later.
    user: Option<ProxyUser>,
    keepalive: Option<Duration>,
    pacing: Option<Pacing>,
}

/// Address and purpose of a listener.
#[derive(Debug, Clone, Copy)]
pub struct ListenerRequest {
    /// `[::]` accepts IPv4 too. If the kernel lacks IPv6, it becomes `0.0.0.0`.
    pub address: SocketAddr,
    /// How clients send to it.
    pub transport: ListenerTransport,
    /// True if the address need not exist yet.
    pub may_be_absent: bool,
    /// The options of accepted connections.
    pub accepted: AcceptedOptions,
    /// The purpose of the listener, for error messages.
    pub purpose: &'static str,
    /// The setting that contains the address, for error messages.
    pub setting: &'static str,
}

/// Options that a listener's connections inherit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptedOptions {
    /// The effect of closing a connection.
    pub closing: Closing,
    /// True if connections start without pacing: the clients are on this host, or their distance is
    /// measured ([`Sockets::undecided_pacing`]).
    pub unpaced: bool,
}

/// The purpose of a socket, before its destination is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketKind {
    /// The address family of the destination.
    pub family: Family,
    /// The role of the destination.
    pub role: SocketRole,
}

/// The role of a socket's destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketRole {
    /// A peer, or a destination outside of the mesh. The source is the pod's address.
    Upstream,
    /// The workload. The profile determines the source address.
    Workload,
    /// A DNS server that is asked over UDP.
    NameServer,
}

impl SocketKind {
    /// The kind of socket for connections to `destination`.
    #[must_use]
    pub fn new(role: SocketRole, destination: SocketAddr) -> Self {
        let v4 = canonical(destination).is_ipv4();
        Self { family: if v4 { Family::V4 } else { Family::V6 }, role }
    }
}

/// A socket in a namespace with all its options, not connected yet. The kernel checks the
/// privileges for SO_MARK and IP_TRANSPARENT when they are set (`sk_setsockopt`, net/core/sock.c;
/// `do_ip_setsockopt`, net/ipv4/ip_sockglue.c). A thread without capabilities can therefore bind
/// and connect it.
#[derive(Debug)]
pub struct ReadySocket {
    socket: Socket,
    kind: SocketKind,
    /// The pacing to decide on when connecting shows how long the peer takes.
    pacing: Option<Pacing>,
}

/// The effect of closing an accepted connection, until it is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// The kernel sends the written data, then FIN.
    End,
    /// The kernel sends RST, as after [`reset_on_close`].
    Reset,
}

/// The source address of connections to the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LastHop {
    /// The client's own address. `mark` routes the replies back to the proxy.
    ClientAddress { mark: u32 },
    /// A loopback address, by which the rules recognize the connections.
    Loopback { v4: Ipv4Addr, v6: Ipv6Addr },
    /// The kernel chooses the address.
    Any,
}

impl Sockets {
    /// Creates the socket options for these settings. `ipv6` is true if the kernel supports IPv6,
    /// even if it is disabled ([`crate::namespace::ipv6::ipv6_available`]): a listener at `[::]`
    /// accepts connections of a family as soon as it is enabled.
    #[must_use]
    pub fn new(settings: &InterceptionSettings, ipv6: bool) -> Self {
        let client_address = LastHop::ClientAddress { mark: PROXY_MARK };
        let (mark, last_hop) = match (settings.profile, settings.inbound.mode) {
            (Profile::Ambient, _) => (Some(PROXY_MARK), client_address),
            (Profile::Sidecar, InboundMode::Tproxy) => (None, client_address),
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
        // If the change of user is impossible, preparing the rules fails.
        let user = ProxyUser::required(settings).ok().flatten();
        Self { mark, last_hop, transparent, ipv6, user, keepalive: None, pacing: None }
    }

    /// Adds keepalive: the first probe after this time without data, and more at this interval.
    ///
    /// A captured connection ends with its conntrack entry, and hangs if a NAT gateway or load
    /// balancer on the path drops its state (istio #38982, #43301).
    #[must_use]
    pub fn with_keepalive(self, keepalive: Duration) -> Self {
        Self { keepalive: Some(keepalive), ..self }
    }

    /// Sets the pacing. `None` if the kernel does not pace.
    #[must_use]
    pub fn with_pacing(self, pacing: Option<Pacing>) -> Self {
        Self { pacing, ..self }
    }

    /// Returns true if opening a socket requires NET_ADMIN, for marks and preserved source
    /// addresses.
    #[must_use]
    pub fn need_net_admin(&self) -> bool {
        self.mark.is_some() || self.preserve_client_addresses()
    }

    /// Returns true if listeners also accept connections to addresses that are not local to the
    /// namespace. The local address of such a connection proves nothing.
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
        request: ListenerRequest,
    ) -> Result<BoundListener, InterceptionError> {
        let ListenerRequest { address, transport, may_be_absent, accepted, purpose, setting } =
            request;
        let any_v6 = address.ip().is_unspecified() && address.is_ipv6();
        let address = if any_v6 && !self.ipv6 {
            SocketAddr::from(([0u8; 4], address.port()))
        } else {
            address
        };
        let prepare = |socket: &Socket| self.prepare(socket, accepted);
        let (mark, transparent) = (self.mark, self.transparent);
        let bound = match transport {
            ListenerTransport::Stream => {
                listener::bind(entered, address, mark, transparent, may_be_absent, prepare)
            }
            ListenerTransport::Datagram => {
                as_user(self.user, || listener::bind_datagram(entered, address, mark))
            }
        };
        bound.map_err(|source| InterceptionError::Listen { purpose, address, setting, source })
    }

    /// Sets the options that the connections of `listener` inherit (`sk_clone_lock`,
    /// net/core/sock.c). This saves six system calls per connection.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn prepare(&self, listener: &impl AsFd, accepted: AcceptedOptions) -> io::Result<()> {
        self.set_common_options(listener)?;
        if let Some(pacing) = &self.pacing {
            pacing.prepare(listener, accepted.unpaced);
        }
        match accepted.closing {
            Closing::End => end_on_close(listener),
            Closing::Reset => reset_on_close(listener),
        }
        Ok(())
    }

    /// Opens a socket in the namespace, for a later [`connect`](ReadySocket::connect). Closing it
    /// sends RST until [`end_on_close`] is called.
    ///
    /// # Errors
    ///
    /// The error of the kernel: no descriptor, no privilege, or no such address family.
    pub fn open(&self, _: &Entered, kind: SocketKind) -> io::Result<ReadySocket> {
        let (domain, workload) = (domain(kind.family), kind.role == SocketRole::Workload);
        if kind.role == SocketRole::NameServer {
            let socket = Socket::new(domain, Type::DGRAM.nonblocking(), None)?;
            self.mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
            return Ok(ReadySocket { socket, kind, pacing: None });
        }
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
        let mark = match self.last_hop {
            LastHop::ClientAddress { mark } if workload => Some(mark),
            _ => self.mark,
        };
        if let Some(mark) = mark {
            socket.set_mark(mark)?;
        }
        self.set_common_options(&socket)?;
        if let Some(pacing) = &self.pacing {
            pacing.postpone(&socket);
        }
        // A cancelled connect must end with RST: the kernel may have completed the handshake, and
        // the peer would read a FIN as a clean end.
        reset_on_close(&socket);
        if workload && self.last_hop != LastHop::Any {
            // Choose the source port at connect. A port chosen at bind cannot be used for other
            // destinations, which limits an address to about 28,000 connections. The IPv4 option
            // applies to both families (ipv6_setsockopt passes SOL_IP on).
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        }
        if workload && self.preserve_client_addresses() {
            match kind.family {
                Family::V4 => socket.set_ip_transparent_v4(true)?,
                Family::V6 => socket.set_ip_transparent_v6(true)?,
            }
        }
        let pacing = self.pacing.clone().filter(Pacing::depends_on_distance);
        Ok(ReadySocket { socket, kind, pacing })
    }

    /// Uses a socket of this kind that another process has opened with these options.
    #[must_use]
    pub fn adopt(&self, socket: OwnedFd, kind: SocketKind) -> ReadySocket {
        let pacing = self.pacing.clone().filter(Pacing::depends_on_distance);
        ReadySocket { socket: socket.into(), kind, pacing }
    }

    /// The pacing to decide on for an accepted connection, once the peer's distance is known.
    /// `None` if pacing does not depend on the distance.
    #[must_use]
    pub fn undecided_pacing(&self, accepted: &impl AsFd) -> Option<UndecidedPacing> {
        let pacing = self.pacing.clone().filter(Pacing::depends_on_distance)?;
        UndecidedPacing::new(pacing, accepted).ok()
    }

    /// Binds `socket` to the source address for the connection of `client` to the workload at
    /// `destination`: the client's own address or a loopback address, depending on the profile.
    ///
    /// The client's address is not used if it has the other family, or if it equals the
    /// destination, because the replies would not leave it.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn bind_for(
        &self,
        socket: &ReadySocket,
        destination: SocketAddr,
        client: IpAddr,
    ) -> io::Result<()> {
        let (destination, client) = (canonical(destination), client.to_canonical());
        let source = match self.last_hop {
            LastHop::ClientAddress { .. } => {
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

    /// Returns true if the workload sees its clients' own addresses, so that its replies need a
    /// return path.
    #[must_use]
    pub(crate) fn preserve_client_addresses(&self) -> bool {
        matches!(self.last_hop, LastHop::ClientAddress { .. })
    }

    /// Sets TCP_NODELAY and keepalive, which all connections of the proxy have.
    fn set_common_options(&self, stream: &impl AsFd) -> io::Result<()> {
        let socket = SockRef::from(stream);
        socket.set_tcp_nodelay(true)?;
        let Some(keepalive) = self.keepalive else {
            return Ok(());
        };
        let probes = TcpKeepalive::new().with_time(keepalive).with_interval(keepalive);
        socket.set_tcp_keepalive(&probes.with_retries(KEEPALIVE_PROBES))
    }
}

impl From<ReadySocket> for OwnedFd {
    /// The socket, to pass it to another process.
    fn from(ready: ReadySocket) -> Self {
        ready.socket.into()
    }
}

impl ReadySocket {
    /// The purpose of the socket.
    #[must_use]
    pub fn kind(&self) -> SocketKind {
        self.kind
    }

    /// Connects to `destination`, which must have the socket's address family. Has no timeout.
    ///
    /// # Errors
    ///
    /// The error of the kernel: refused, unreachable, not permitted.
    pub async fn connect(self, destination: SocketAddr) -> io::Result<TcpStream> {
        let Self { socket, pacing, .. } = self;
        let began = pacing.is_some().then(Instant::now);
        match socket.connect(&canonical(destination).into()) {
            Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
                return Err(error);
            }
            Ok(()) | Err(_) => {}
        }
        // A destination on the same host has usually answered before the call returns, but the call
        // does not check for the answer.
        let connected = socket.peer_addr().is_ok();
        let stream = TcpStream::from_std(socket.into())?;
        if !connected {
            stream.writable().await?;
            stream.take_error()?.map_or(Ok(()), Err)?;
            if let (Some(pacing), Some(began)) = (pacing, began) {
                pacing.decide(&stream, began.elapsed());
            }
        }
        Ok(stream)
    }

    /// Connects a socket for datagrams to `destination`: it receives only what comes from there.
    /// The kernel chooses a random port.
    ///
    /// # Errors
    ///
    /// The error of the kernel: unreachable, or not a socket for datagrams.
    pub fn connect_datagram(self, destination: SocketAddr) -> io::Result<UdpSocket> {
        if self.kind.role != SocketRole::NameServer {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.socket.connect(&canonical(destination).into())?;
        UdpSocket::from_std(self.socket.into())
    }

    /// The underlying socket, for the self-test.
    pub(crate) fn into_socket(self) -> Socket {
        self.socket
    }
}

/// Makes closing `stream` send RST instead of FIN, also if the process is killed. Cannot fail: a
/// closed connection needs no reset.
pub fn reset_on_close(stream: &impl AsFd) {
    let _gone = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Undoes [`reset_on_close`]: closing sends the written data, then FIN.
pub fn end_on_close(stream: &impl AsFd) {
    let _gone = SockRef::from(stream).set_linger(None);
}

/// Enables keepalive on `stream`: the first probe after `first` without data, then probes at the
/// interval `every`, both in whole seconds. The kernel closes the connection after
/// [`KEEPALIVE_PROBES`] unanswered probes. Cannot fail: a closed connection needs no probes.
pub fn enable_keepalive(stream: &impl AsFd, first: Duration, every: Duration) {
    let probes = TcpKeepalive::new().with_time(first).with_interval(every);
    let _gone = SockRef::from(stream).set_tcp_keepalive(&probes.with_retries(KEEPALIVE_PROBES));
}

/// Sends FIN after the written data. Reading continues.
///
/// # Errors
///
/// The kernel rejected the operation. A closed connection is not an error here: reading reports it.
pub fn end_writing(stream: &impl AsFd) -> io::Result<()> {
    match SockRef::from(stream).shutdown(Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        ended => ended,
    }
}

/// Writes data to `stream` before a call of [`end_writing`]. If all data fits, the FIN is sent in
/// the same segment. Returns the number of written bytes.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn write_before_end(stream: &impl AsFd, data: &[u8]) -> io::Result<usize> {
    Ok(send(stream, data, SendFlags::MORE | SendFlags::NOSIGNAL)?)
}

/// Copies received bytes without removing them from the socket. Returns their number, which is 0
/// after FIN.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn peek(stream: &impl AsFd, bytes: &mut [u8]) -> io::Result<usize> {
    Ok(recv(stream, bytes, RecvFlags::PEEK)?.0)
}

fn domain(family: Family) -> Domain {
    match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    }
}

#[cfg(test)]
mod tests;
