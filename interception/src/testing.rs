//! Access for tests: custom plans, the netlink backend, options of sockets, stand-ins of
//! namespaces, and the listening end of connections that the product only opens. The product does
//! not use it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    socketpair,
};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::backend::nftables;
use crate::error::InterceptionError;
use crate::namespace::{Entered, Namespace};
use crate::plan::{Chain, Rule, RulePlan};
use crate::sockets::seqpacket::SeqPacket;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A stand-in for a namespace. It has its own identity and needs no privilege, but it cannot be
/// entered.
///
/// # Errors
///
/// The process has no free descriptor.
pub fn stand_in_namespace() -> io::Result<Namespace> {
    Namespace::stand_in(File::from(memfd_create("stand-in", MemfdFlags::CLOEXEC)?))
}

/// A plan with these chains and rules.
#[must_use]
pub fn plan(chains: Vec<Chain>, rules: Vec<Rule>) -> RulePlan {
    RulePlan { chains, rules, routes: Vec::new(), addresses: Vec::new() }
}

/// Installs the plan in the namespace.
///
/// # Errors
///
/// The kernel rejected it.
pub async fn apply(entered: &Entered, plan: &RulePlan) -> Result<(), InterceptionError> {
    nftables::apply(entered, plan).await
}

/// The installed and the planned sections.
///
/// # Errors
///
/// The kernel rejected the request.
pub async fn listings(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<[Option<Sections>; 2], InterceptionError> {
    let sections = |listing: crate::backend::verify::Listing| {
        listing.sections.into_iter().map(|section| (section.head, section.lines)).collect()
    };
    let expected = nftables::expected(plan);
    Ok([nftables::installed(entered).await?.map(sections), Some(sections(expected))])
}

/// The keepalive probes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// The idle time before the first probe.
    pub first: Duration,
    /// The interval of the other probes.
    pub every: Duration,
    /// The number of unanswered probes that close the connection.
    pub probes: u32,
}

/// The keepalive probes of `stream`; `None` if it sends none.
///
/// # Errors
///
/// The kernel rejected the operation.
pub fn keepalive(stream: &impl AsFd) -> io::Result<Option<Keepalive>> {
    let socket = SockRef::from(stream);
    if !socket.keepalive()? {
        return Ok(None);
    }
    let (first, every) = (socket.tcp_keepalive_time()?, socket.tcp_keepalive_interval()?);
    Ok(Some(Keepalive { first, every, probes: socket.tcp_keepalive_retries()? }))
}

/// Heads with their lines.
pub type Sections = Vec<(String, Vec<String>)>;

/// Two connected ends.
///
/// # Errors
///
/// The error of the kernel.
pub fn seqpacket_pair() -> io::Result<(SeqPacket, SeqPacket)> {
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
    Ok((SeqPacket::new(one)?, SeqPacket::new(other)?))
}

/// Listens as a node agent does. One connection can wait to be accepted.
#[derive(Debug)]
pub struct SeqPacketListener(UnixStream);

impl SeqPacketListener {
    /// Listens at `path`.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 0)?;
        Ok(Self(UnixStream::from_std(StdUnixStream::from(socket))?))
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub async fn accept(&self) -> io::Result<SeqPacket> {
        let accept = || Ok(accept_with(&self.0, FLAGS)?);
        let accepted: OwnedFd = self.0.async_io(Interest::READABLE, accept).await?;
        SeqPacket::new(accepted)
    }
}
