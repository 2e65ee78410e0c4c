//! Access for tests: custom plans, the netlink backend, socket options, files that replace
//! namespaces, and listeners for connections that the product only opens. The product does not use
//! it.

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

/// A file that replaces a namespace. It has an identity and needs no privilege, but cannot be
/// entered.
///
/// # Errors
///
/// The process has no free descriptor.
pub fn fake_namespace() -> io::Result<Namespace> {
    Namespace::fake(File::from(memfd_create("stand-in", MemfdFlags::CLOEXEC)?))
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
    nftables::apply(entered, plan, None).await
}

/// Lists the installed and the planned sections.
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

/// The keepalive options of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// The idle time before the first probe.
    pub first: Duration,
    /// The interval of the other probes.
    pub every: Duration,
    /// The number of unanswered probes that close the connection.
    pub probes: u32,
}

/// Reads the keepalive options of `stream`. `None` if keepalive is disabled.
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

/// The sections of a listing: heads with their lines.
pub type Sections = Vec<(String, Vec<String>)>;

/// Creates two connected ends.
///
/// # Errors
///
/// The error of the kernel.
pub fn seqpacket_pair() -> io::Result<(SeqPacket, SeqPacket)> {
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
    Ok((SeqPacket::new(one)?, SeqPacket::new(other)?))
}

/// A listener like a node agent's. One connection can wait to be accepted.
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
