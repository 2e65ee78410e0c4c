//! Sockets that fit the rules: marked, from the client's address where that is wanted, and where a
//! caught connection was going.
//!
//! Not here: accepting (`listener.rs`), deadlines (the caller's), and what flows through a
//! connection.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};
use underpass_config::Profile;

use crate::InterceptionError;
use crate::listener::{self, BoundListener};
use crate::plan::PROXY_MARK;

/// After how long without data a connection is probed, and how long after each probe.
///
/// A caught connection lives only as long as its conntrack entry; NAT gateways and load balancers
/// on the way forget after as little as 240 s. A connection that they forgot hangs (istio #38982,
/// #43301). ztunnel has the same value.
pub const KEEPALIVE: Duration = Duration::from_secs(180);
/// How many probes stay unanswered before the connection is given up: Linux's own default.
pub const KEEPALIVE_PROBES: u32 = 9;

/// How the sockets of a profile are made.
#[derive(Debug, Clone)]
pub struct Sockets {
    mark: Option<u32>,
    keep_source: bool,
    ipv6: bool,
}

impl Sockets {
    /// Sockets of `profile`, in a namespace that has IPv6 or not ([`crate::ipv6_available`]).
    #[must_use]
    pub fn new(profile: Profile, ipv6: bool) -> Self {
        match profile {
            Profile::Ambient => Self { mark: Some(PROXY_MARK), keep_source: true, ipv6 },
            Profile::None => Self { mark: None, keep_source: false, ipv6 },
        }
    }

    /// Listens on `port` of every address, in both families where there are both.
    ///
    /// `purpose` and `setting` are for the message of a failure.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Listen`].
    pub fn listen(
        &self,
        port: u16,
        purpose: &'static str,
        setting: &'static str,
    ) -> Result<BoundListener, InterceptionError> {
        let any = SocketAddr::from(([0u16; 8], port));
        self.listen_on(any, purpose, setting)
    }

    /// Listens on `address`. `[::]` takes IPv4 too, and without IPv6 is `0.0.0.0`.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Listen`].
    pub fn listen_on(
        &self,
        address: SocketAddr,
        purpose: &'static str,
        setting: &'static str,
    ) -> Result<BoundListener, InterceptionError> {
        let any_v6 = address.ip().is_unspecified() && address.is_ipv6();
        let address = if any_v6 && !self.ipv6 {
            SocketAddr::from(([0u8; 4], address.port()))
        } else {
            address
        };
        listener::bind(address, self.mark).map_err(|source| InterceptionError::Listen {
            purpose,
            address,
            setting,
            source,
        })
    }

    /// Opens a connection to `destination`; with a `source`, from that address, if the profile
    /// keeps sources.
    ///
    /// The source is left out where it would not work: when it is of the other family, and when it
    /// is the destination itself, whose replies to itself would never leave it.
    ///
    /// # Errors
    ///
    /// The kernel's, as it gave them: refused, unreachable, not permitted. The wait has no end of
    /// its own.
    pub async fn connect(
        &self,
        destination: SocketAddr,
        source: Option<IpAddr>,
    ) -> io::Result<TcpStream> {
        let destination = canonical(destination);
        let socket =
            Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None)?;
        self.mark(&socket)?;
        tune(&socket)?;
        let source = source
            .map(|source| source.to_canonical())
            .filter(|source| self.keep_source && source.is_ipv4() == destination.is_ipv4())
            .filter(|source| *source != destination.ip());
        if let Some(source) = source {
            imitate(&socket, source)?;
        }
        TcpSocket::from_std_stream(socket.into()).connect(destination).await
    }

    fn mark(&self, socket: &Socket) -> io::Result<()> {
        self.mark.map_or(Ok(()), |mark| socket.set_mark(mark))
    }
}

/// Where a caught connection was going before the rules redirected it. Of a connection that was
/// not, the address that it was made to.
///
/// # Errors
///
/// The kernel's: ENOENT if conntrack does not know the connection.
pub fn original_destination(stream: &impl AsFd) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    // The family is that of the packets, which on a dual-stack listener is not the socket's. Asked
    // for the other one, conntrack would look up addresses that are not the connection's.
    let original = if canonical(inet(socket.local_addr()?)?).is_ipv4() {
        socket.original_dst_v4()?
    } else {
        socket.original_dst_v6()?
    };
    inet(original).map(canonical)
}

/// Sets what every connection of the proxy has: no delay of small segments, and [`KEEPALIVE`].
///
/// # Errors
///
/// The kernel's.
pub fn tune(stream: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// From now on, dropping `stream` sends RST instead of FIN: an abort stays an abort on the other
/// side. A connection that is gone already needs no reset, so that this cannot fail.
pub fn reset_on_close(stream: &impl AsFd) {
    let _gone = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Binds `socket` to an address that is not ours, which takes NET_ADMIN or NET_RAW.
fn imitate(socket: &Socket, source: IpAddr) -> io::Result<()> {
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    // The port is chosen when the destination is known: else bind takes one that no other
    // destination may use, and 28,000 connections from one client are all there can be. The option
    // is IPv4's and holds for both (ipv6_setsockopt hands SOL_IP on).
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
