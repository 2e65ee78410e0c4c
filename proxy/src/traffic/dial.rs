//! Dials applications and plain destinations, and HBONE listeners of peers for the pool.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;
use underpass_hbone::Dial;
use underpass_interception::{
    NamespaceAccess, SocketKind, SocketRole, Sockets, enable_keepalive, end_on_close,
    is_out_of_files,
};

use crate::decide::policy::Permit;
use crate::error::ProxyError;

/// Connects to the permitted destination within `deadline`.
pub(crate) async fn dial(permit: &Permit<'_>, deadline: Duration) -> Result<TcpStream, ProxyError> {
    let connect = pin!(permit.pod().sockets.connect(permit.destination()));
    within(permit, deadline, connect).await
}

/// Connects to the workload, from the address of `client` if the profile supports it.
pub(crate) async fn dial_workload(
    permit: &Permit<'_>,
    client: IpAddr,
    deadline: Duration,
) -> Result<TcpStream, ProxyError> {
    let connect = pin!(permit.pod().sockets.connect_workload(permit.destination(), client));
    within(permit, deadline, connect).await
}

/// Connects to the permitted port on loopback. An application that trusts PROXY headers should
/// accept connections only there.
pub(crate) async fn dial_loopback(
    permit: &Permit<'_>,
    deadline: Duration,
) -> Result<TcpStream, ProxyError> {
    let destination = permit.destination();
    let loopback = match destination {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let here = SocketAddr::new(loopback, destination.port());
    let connect = pin!(permit.pod().sockets.connect(here));
    within(permit, deadline, connect).await
}

/// Connects within `deadline`. The caller pins `connect`: moving it into this future would double
/// its size.
async fn within(
    permit: &Permit<'_>,
    deadline: Duration,
    connect: impl Future<Output = io::Result<TcpStream>> + Unpin,
) -> Result<TcpStream, ProxyError> {
    let destination = permit.destination();
    match timeout(deadline, connect).await {
        // The socket resets on close, unless both directions have ended cleanly.
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if is_out_of_files(&error) => Err(ProxyError::OutOfDescriptors),
        Ok(Err(error)) => Err(ProxyError::Connect { destination, source: error }),
        Err(_) => Err(ProxyError::ConnectTimeout { destination, after: deadline }),
    }
}

/// The first keepalive probe and the interval of the others, to servers that the proxy depends on.
/// With [`KEEPALIVE_PROBES`](underpass_interception::KEEPALIVE_PROBES) a dead connection is
/// detected after 33 s without data, for example during a watch.
const FIRST_KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// Dials certificate issuers, control planes, collectors and the API server from the proxy's own
/// sockets, which the rules do not catch.
#[derive(Debug, Clone)]
pub(crate) struct PlainDialer {
    pub(crate) access: NamespaceAccess,
    pub(crate) sockets: Sockets,
}

impl Dial for PlainDialer {
    type Io = TcpStream;

    async fn dial(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let kind = SocketKind::new(SocketRole::Upstream, address);
        let opened = self.access.open_sockets(&self.sockets, kind, 1).await?;
        let socket = opened.into_iter().next().ok_or(io::ErrorKind::NotFound)?;
        let stream = socket.connect(address).await?;
        end_on_close(&stream);
        enable_keepalive(&stream, FIRST_KEEPALIVE, KEEPALIVE_INTERVAL);
        Ok(stream)
    }
}
