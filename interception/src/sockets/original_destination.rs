//! The original destinations of captured connections.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use socket2::SockRef;

use crate::sockets::canonical;

/// The destination of an accepted connection before any rule redirected it. Never an IPv4-mapped
/// address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OriginalDestination(SocketAddr);

impl OriginalDestination {
    /// Converts `address`.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self(canonical(address))
    }

    /// Asks conntrack for the destination of a connection of `client` that a rule may have
    /// redirected.
    ///
    /// # Errors
    ///
    /// The error of the kernel. ENOENT if conntrack has no entry of the connection.
    pub fn redirected(stream: &impl AsFd, client: IpAddr) -> io::Result<Self> {
        let socket = SockRef::from(stream);
        // Use the family of the packets. On a dual-stack listener the socket has the other one,
        // with which conntrack would look up wrong addresses.
        let original = if client.to_canonical().is_ipv4() {
            socket.original_dst_v4()?
        } else {
            socket.original_dst_v6()?
        };
        inet(original).map(Self::new)
    }

    /// The destination of a connection that no rule redirects: the local address of `stream`.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation.
    pub fn local(stream: &impl AsFd) -> io::Result<Self> {
        inet(SockRef::from(stream).local_addr()?).map(Self::new)
    }

    /// The destination's address and port.
    #[must_use]
    pub fn address(self) -> SocketAddr {
        self.0
    }
}

fn inet(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    address.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}
