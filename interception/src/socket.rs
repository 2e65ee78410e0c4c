//! Sockets that fit the rules: marked, from the client's address where that is wanted, and where a
//! caught connection was going.
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

use crate::InterceptionError;
use crate::listener::{self, BoundListener};
use crate::plan::PROXY_MARK;

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
    /// ([`crate::ipv6_available`]).
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
    /// A caught connection lives only as long as its conntrack entry, and what NAT gateways and load
    /// balancers on the way forgot hangs (istio #38982, #43301).
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

    /// Listens on `address`. `[::]` takes IPv4 too, and without IPv6 is `0.0.0.0`.
    ///
    /// `purpose` and `setting` are for the message of a failure.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Listen`].
    pub fn listen_on(
        &self,
        address: SocketAddr,
        closing: Closing,
        purpose: &'static str,
        setting: &'static str,
    ) -> Result<BoundListener, InterceptionError> {
        let any_v6 = address.ip().is_unspecified() && address.is_ipv6();
        let address = if any_v6 && !self.ipv6 {
            SocketAddr::from(([0u8; 4], address.port()))
        } else {
            address
        };
        let prepare = |socket: &Socket| self.prepare(socket, closing);
        listener::bind(address, self.mark, self.transparent, prepare)
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

    /// Opens a connection to `destination`. Closing it sends RST, until [`end_on_close`].
    ///
    /// # Errors
    ///
    /// The kernel's, as it gave them: refused, unreachable, not permitted. The wait has no end of
    /// its own.
    pub async fn connect(&self, destination: SocketAddr) -> io::Result<TcpStream> {
        let destination = canonical(destination);
        let socket = self.open(destination, self.mark)?;
        finish_connecting(socket, destination).await
    }

    /// Opens a connection to the workload at `destination` for `client`: from the client's address
    /// or one of the loopback interface, as the profile has it.
    ///
    /// The client's address is left out where it would not work: when it is of the other family,
    /// and when it is the destination itself, whose replies to itself would never leave it.
    ///
    /// # Errors
    ///
    /// As [`Sockets::connect`].
    pub async fn connect_workload(
        &self,
        destination: SocketAddr,
        client: IpAddr,
    ) -> io::Result<TcpStream> {
        let destination = canonical(destination);
        let socket = self.open_to_workload(destination, client.to_canonical())?;
        finish_connecting(socket, destination).await
    }

    /// Whether the workload sees its clients' own addresses, so that its answers need a way back.
    #[must_use]
    pub(crate) fn imitate_clients(&self) -> bool {
        matches!(self.last_hop, LastHop::Imitated { .. })
    }

    /// The socket of [`connect_workload`](Self::connect_workload).
    pub(crate) fn open_to_workload(
        &self,
        destination: SocketAddr,
        client: IpAddr,
    ) -> io::Result<Socket> {
        let mark = match self.last_hop {
            LastHop::Imitated { mark } => Some(mark),
            LastHop::Loopback { .. } | LastHop::Any => self.mark,
        };
        let socket = self.open(destination, mark)?;
        match self.last_hop {
            LastHop::Imitated { .. } => {
                let same_family = client.is_ipv4() == destination.is_ipv4();
                if same_family && client != destination.ip() {
                    imitate(&socket, client)?;
                }
            }
            LastHop::Loopback { v4, v6 } => {
                let source = if destination.is_ipv4() { v4.into() } else { v6.into() };
                bind(&socket, source)?;
            }
            LastHop::Any => {}
        }
        Ok(socket)
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

    fn open(&self, destination: SocketAddr, mark: Option<u32>) -> io::Result<Socket> {
        let socket =
            Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None)?;
        if let Some(mark) = mark {
            socket.set_mark(mark)?;
        }
        self.tune(&socket)?;
        Ok(socket)
    }
}

/// Waits until `socket` is connected.
///
/// Whoever gives up in the middle of it leaves with a RST: the kernel may have the connection by
/// then, and to whoever accepted it a FIN would say that all is said.
async fn finish_connecting(socket: Socket, destination: SocketAddr) -> io::Result<TcpStream> {
    reset_on_close(&socket);
    match socket.connect(&destination.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // A peer on the same host, as an application is, has answered by now, as a rule: its packets are
    // delivered before the call returns, which does not look at them itself.
    let connected = socket.peer_addr().is_ok();
    let stream = TcpStream::from_std(socket.into())?;
    if !connected {
        stream.writable().await?;
        stream.take_error()?.map_or(Ok(()), Err)?;
    }
    Ok(stream)
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

/// Probes the other side of `stream` when it was silent for `first`, and then `every` so often, both in whole seconds; it is given
/// up after [`KEEPALIVE_PROBES`] without an answer. A connection that is gone needs no probes, so that this cannot fail.
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

/// Binds `socket` to an address that is not ours, which takes NET_ADMIN or NET_RAW.
fn imitate(socket: &Socket, source: IpAddr) -> io::Result<()> {
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    bind(socket, source)
}

/// Binds `socket` to an address; its port is chosen when the destination is known: else bind takes
/// one that no other destination may use, and 28,000 connections from one address are all there can
/// be.
fn bind(socket: &Socket, source: IpAddr) -> io::Result<()> {
    // The option is IPv4's and holds for both (ipv6_setsockopt hands SOL_IP on).
    setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}

/// The address without the IPv4-mapped form that dual-stack sockets give.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, v6.port())),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}

fn inet(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    address.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
mod tests;
