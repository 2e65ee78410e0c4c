//! The tables of listeners of a pod and of the process, and the bound listeners.
//!
//! Listeners are bound at the start, or taken over from the running process. A new listener is one
//! row of a [`ListenerKind::TABLE`].

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use underpass_config::{Dns, Settings};
use underpass_interception::{
    AcceptedOptions, BoundListener, Closing, InterceptionError, ListenerRequest, ListenerTransport,
    NamespaceAccess, Sockets, ipv6_available,
};

/// The kind of connections that a listener of the data path accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Connections that the workload opens, caught by the rules.
    Outbound,
    /// Plaintext connections to the workload, caught by the rules.
    Plaintext,
    /// Tunnels of peers.
    Hbone,
}

/// The HTTP endpoint that a listener of the control thread serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndpointKind {
    Readiness,
    Metrics,
    /// Administration that only reads.
    Admin,
}

/// A listener of the DNS proxy, on the loopback interface. A socket at `[::]` would answer from
/// another address than the one that the rules redirect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DnsKind;

/// A kind of listeners, with their table.
pub(crate) trait ListenerKind: fmt::Debug + Copy + 'static {
    const TABLE: &'static [ListenerSpec<Self>];
    /// Whether the settings can omit listeners of this kind.
    const IS_OPTIONAL: bool = false;

    /// The socket options of accepted connections.
    fn accepted(self) -> AcceptedOptions;
}

/// One row of a table of listeners.
#[derive(Debug)]
pub(crate) struct ListenerSpec<K> {
    kind: K,
    /// The listener's name in logs, metrics and take-overs.
    name: &'static str,
    purpose: &'static str,
    /// The setting that determines its address.
    setting: &'static str,
    transport: ListenerTransport,
    /// `None` if the settings need no such listener.
    address: fn(&Settings) -> Option<SocketAddr>,
}

impl ListenerKind for Kind {
    const TABLE: &'static [ListenerSpec<Self>] = &[
        ListenerSpec {
            kind: Self::Outbound,
            name: Self::Outbound.name(),
            purpose: "caught outbound connections",
            setting: "proxy.outbound_port",
            transport: ListenerTransport::Stream,
            address: |settings| Some(any(settings.proxy.outbound_port)),
        },
        ListenerSpec {
            kind: Self::Hbone,
            name: Self::Hbone.name(),
            purpose: "tunnels",
            setting: "proxy.hbone_port",
            transport: ListenerTransport::Stream,
            address: |settings| Some(any(settings.proxy.hbone_port)),
        },
        ListenerSpec {
            kind: Self::Plaintext,
            name: Self::Plaintext.name(),
            purpose: "caught inbound connections",
            setting: "proxy.inbound_port",
            transport: ListenerTransport::Stream,
            address: |settings| Some(any(settings.proxy.inbound_port)),
        },
    ];

    /// Clients of caught connections saw them open, so only a reset reports an upstream failure.
    /// The workload is on this host. The handshake measures the round-trip time to a tunnel's peer.
    fn accepted(self) -> AcceptedOptions {
        match self {
            Self::Outbound => AcceptedOptions { closing: Closing::Reset, unpaced: true },
            Self::Plaintext => AcceptedOptions { closing: Closing::Reset, unpaced: false },
            Self::Hbone => AcceptedOptions { closing: Closing::End, unpaced: true },
        }
    }
}

impl ListenerKind for EndpointKind {
    const TABLE: &'static [ListenerSpec<Self>] = &[
        ListenerSpec {
            kind: Self::Readiness,
            name: "readiness",
            purpose: "readiness",
            setting: "readiness.address",
            transport: ListenerTransport::Stream,
            address: |settings| Some(settings.readiness),
        },
        ListenerSpec {
            kind: Self::Metrics,
            name: "metrics",
            purpose: "metrics",
            setting: "metrics.address",
            transport: ListenerTransport::Stream,
            address: |settings| Some(settings.metrics),
        },
        ListenerSpec {
            kind: Self::Admin,
            name: "admin",
            purpose: "administration",
            setting: "admin.address",
            transport: ListenerTransport::Stream,
            address: |settings| settings.admin.address,
        },
    ];

    fn accepted(self) -> AcceptedOptions {
        AcceptedOptions { closing: Closing::End, unpaced: false }
    }
}

impl DnsKind {
    const fn spec(
        name: &'static str,
        transport: ListenerTransport,
        address: fn(&Settings) -> Option<SocketAddr>,
    ) -> ListenerSpec<Self> {
        let (purpose, setting) = ("DNS queries", "proxy.dns_port");
        ListenerSpec { kind: Self, name, purpose, setting, transport, address }
    }

    fn at(settings: &Settings, loopback: IpAddr) -> Option<SocketAddr> {
        let is_on = settings.interception.dns == Dns::Capture;
        let exists = loopback.is_ipv4() || ipv6_available();
        (is_on && exists).then_some(SocketAddr::new(loopback, settings.proxy.dns_port))
    }
}

impl ListenerKind for DnsKind {
    const TABLE: &'static [ListenerSpec<Self>] = &[
        Self::spec("dns-udp-v4", ListenerTransport::Datagram, |s| Self::at(s, V4_LOOPBACK)),
        Self::spec("dns-udp-v6", ListenerTransport::Datagram, |s| Self::at(s, V6_LOOPBACK)),
        Self::spec("dns-tcp-v4", ListenerTransport::Stream, |s| Self::at(s, V4_LOOPBACK)),
        Self::spec("dns-tcp-v6", ListenerTransport::Stream, |s| Self::at(s, V6_LOOPBACK)),
    ];
    const IS_OPTIONAL: bool = true;

    /// The clients are on this host.
    fn accepted(self) -> AcceptedOptions {
        AcceptedOptions { closing: Closing::End, unpaced: true }
    }
}

/// The names of all listeners that a process can have.
pub(crate) fn all_names() -> impl Iterator<Item = &'static str> {
    names::<Kind>().chain(names::<EndpointKind>()).chain(names::<DnsKind>())
}

fn names<K: ListenerKind>() -> impl Iterator<Item = &'static str> {
    K::TABLE.iter().map(|spec| spec.name)
}

const V4_LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6_LOOPBACK: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

const fn any(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Plaintext => "inbound",
            Self::Hbone => "hbone",
        }
    }
}

/// The address of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListenAddress {
    /// The setting that determines it.
    pub(crate) setting: &'static str,
    pub(crate) transport: ListenerTransport,
    pub(crate) address: SocketAddr,
}

/// The addresses at which a process with these settings listens in its own network namespace. The
/// pods of a node have other ones.
pub(crate) fn addresses(settings: &Settings) -> Vec<ListenAddress> {
    let mut all: Vec<_> = of_table::<EndpointKind>(settings).collect();
    if settings.node.pods.is_none() {
        all.extend(of_table::<Kind>(settings).chain(of_table::<DnsKind>(settings)));
    }
    all
}

fn of_table<K: ListenerKind>(settings: &Settings) -> impl Iterator<Item = ListenAddress> {
    K::TABLE.iter().filter_map(|&ListenerSpec { setting, transport, address, .. }| {
        Some(ListenAddress { setting, transport, address: address(settings)? })
    })
}

/// All bound listeners of a table.
#[derive(Debug)]
pub(crate) struct Listeners<K: 'static>(Vec<(&'static ListenerSpec<K>, BoundListener)>);

/// The endpoints before they are served.
#[derive(Debug)]
pub(crate) struct BoundEndpoints {
    pub(crate) listeners: Listeners<EndpointKind>,
    /// The Unix socket of administration.
    pub(crate) admin_socket: Option<OwnedFd>,
    /// Another process accepts on them until this one has taken over.
    pub(crate) paused: bool,
}

/// The inodes of the listeners of a pod, with which the kernel lists them.
#[derive(Debug, Clone)]
pub(crate) struct ListenerInodes(Vec<(&'static ListenerSpec<Kind>, u64)>);

impl ListenerInodes {
    /// The purpose and the setting of a listener that is missing in the `open` sockets.
    pub(crate) fn closed(&self, open: &BTreeSet<u64>) -> Option<(&'static str, &'static str)> {
        let (closed, _) = self.0.iter().find(|(_, inode)| !open.contains(inode))?;
        Some((closed.purpose, closed.setting))
    }
}

impl Listeners<Kind> {
    pub(crate) fn inodes(&self) -> io::Result<ListenerInodes> {
        let inode = |(spec, listener): &(&'static ListenerSpec<Kind>, BoundListener)| {
            Ok((*spec, listener.inode()?))
        };
        self.0.iter().map(inode).collect::<io::Result<_>>().map(ListenerInodes)
    }
}

/// Listeners with their names for a take-over.
pub(crate) type NamedListeners = Vec<(&'static str, BoundListener)>;

impl<K: ListenerKind> Listeners<K> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Uses the `handed` over listeners whose addresses still apply, and binds the others.
    pub(crate) async fn bind(
        access: &NamespaceAccess,
        sockets: &Sockets,
        settings: &Settings,
        handed: &mut Vec<(String, BoundListener)>,
    ) -> Result<Self, InterceptionError> {
        let mut bound = Vec::with_capacity(K::TABLE.len());
        for spec in K::TABLE {
            let Some(address) = (spec.address)(settings) else { continue };
            let listener = match take_handed_over(handed, spec.name, address) {
                Some(listener) => listener,
                None => {
                    let &ListenerSpec { kind, purpose, setting, transport, .. } = spec;
                    let (accepted, may_be_absent) = (kind.accepted(), K::IS_OPTIONAL);
                    let request = ListenerRequest {
                        address,
                        transport,
                        may_be_absent,
                        accepted,
                        purpose,
                        setting,
                    };
                    access.listen(sockets, request).await?
                }
            };
            bound.push((spec, listener));
        }
        Ok(Self(bound))
    }

    /// Takes the listeners of these settings that another process has bound; `None` if one is
    /// missing.
    pub(crate) fn adopt(
        settings: &Settings,
        named: &mut Vec<(String, BoundListener)>,
    ) -> Option<Self> {
        let mut adopted = Vec::with_capacity(K::TABLE.len());
        for spec in K::TABLE {
            match named.iter().position(|(name, _)| name == spec.name) {
                Some(index) => adopted.push((spec, named.swap_remove(index).1)),
                None if K::IS_OPTIONAL || (spec.address)(settings).is_none() => {}
                None => return None,
            }
        }
        Some(Self(adopted))
    }

    /// The names of the listeners and their descriptors, for another process.
    pub(crate) fn into_descriptors(self) -> io::Result<(Vec<String>, Vec<OwnedFd>)> {
        let named = |(spec, listener): (&ListenerSpec<K>, BoundListener)| {
            Ok((spec.name.to_owned(), listener.into_descriptor()?))
        };
        self.0.into_iter().map(named).collect()
    }

    /// Listeners on arbitrary ports of the loopback interface.
    #[cfg(test)]
    pub(crate) fn testing() -> Self {
        let listen = |transport| match transport {
            ListenerTransport::Stream => std::net::TcpListener::bind("127.0.0.1:0")
                .map(BoundListener::from)
                .expect("a listener"),
            ListenerTransport::Datagram => {
                std::net::UdpSocket::bind("127.0.0.1:0").map(BoundListener::from).expect("a socket")
            }
        };
        Self(K::TABLE.iter().map(|spec| (spec, listen(spec.transport))).collect())
    }

    /// The same listeners, to hand over.
    pub(crate) fn duplicate(&self) -> NamedListeners {
        self.0.iter().map(|(spec, listener)| (spec.name, listener.clone())).collect()
    }

    /// Each listener with its kind.
    pub(crate) fn into_kinds(self) -> impl Iterator<Item = (K, BoundListener)> {
        self.0.into_iter().map(|(spec, listener)| (spec.kind, listener))
    }
}

/// Removes and returns the handed-over listener with this name, if it has this address.
fn take_handed_over(
    handed: &mut Vec<(String, BoundListener)>,
    name: &str,
    address: SocketAddr,
) -> Option<BoundListener> {
    let index = handed.iter().position(|(handed_name, listener)| {
        handed_name == name && listener.local_addr().is_ok_and(|bound| listens_at(bound, address))
    })?;
    Some(handed.swap_remove(index).1)
}

/// Whether a listener that is bound to `bound` serves `address`. Without IPv6, the unspecified
/// address is 0.0.0.0.
fn listens_at(bound: SocketAddr, address: SocketAddr) -> bool {
    let both_any = bound.ip().is_unspecified() && address.ip().is_unspecified();
    bound == address || both_any && bound.port() == address.port() && address.is_ipv6()
}
