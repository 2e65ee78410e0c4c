//! The table of the proxy's listeners, and the listeners once bound.
//!
//! Listeners are bound at the start, or taken over from the running process. A new listener is one
//! row of [`LISTENERS`].

use std::io;
use std::net::{Ipv6Addr, SocketAddr};

use underpass_config::Settings;
use underpass_interception::{
    BoundListener, Closing, InterceptionError, ListenerRequest, NamespaceAccess, Sockets,
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Traffic(Kind),
    Endpoint(EndpointKind),
}

/// One row of the table.
#[derive(Debug)]
struct ListenerSpec {
    role: Role,
    /// The listener's name in logs, metrics and a hand-over.
    name: &'static str,
    purpose: &'static str,
    /// The setting that determines its address.
    setting: &'static str,
    address: fn(&Settings) -> SocketAddr,
}

static LISTENERS: [ListenerSpec; 5] = [
    ListenerSpec {
        role: Role::Traffic(Kind::Outbound),
        name: Kind::Outbound.name(),
        purpose: "caught outbound connections",
        setting: "proxy.outbound_port",
        address: |settings| any(settings.proxy.outbound_port),
    },
    ListenerSpec {
        role: Role::Traffic(Kind::Hbone),
        name: Kind::Hbone.name(),
        purpose: "tunnels",
        setting: "proxy.hbone_port",
        address: |settings| any(settings.proxy.hbone_port),
    },
    ListenerSpec {
        role: Role::Traffic(Kind::Plaintext),
        name: Kind::Plaintext.name(),
        purpose: "caught inbound connections",
        setting: "proxy.inbound_port",
        address: |settings| any(settings.proxy.inbound_port),
    },
    ListenerSpec {
        role: Role::Endpoint(EndpointKind::Readiness),
        name: "readiness",
        purpose: "readiness",
        setting: "readiness.address",
        address: |settings| settings.readiness,
    },
    ListenerSpec {
        role: Role::Endpoint(EndpointKind::Metrics),
        name: "metrics",
        purpose: "metrics",
        setting: "metrics.address",
        address: |settings| settings.metrics,
    },
];

const fn any(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Plaintext => "inbound",
            Self::Hbone => "hbone",
        }
    }

    /// How its connections are closed. Clients of caught connections saw them open, so only a reset
    /// reports that the upstream failed.
    pub(crate) const fn closing(self) -> Closing {
        match self {
            Self::Outbound | Self::Plaintext => Closing::Reset,
            Self::Hbone => Closing::End,
        }
    }
}

impl Role {
    const fn closing(self) -> Closing {
        match self {
            Self::Traffic(kind) => kind.closing(),
            Self::Endpoint(_) => Closing::End,
        }
    }
}

/// All listeners of the table, bound.
#[derive(Debug)]
pub(crate) struct Listeners(Vec<(&'static ListenerSpec, BoundListener)>);

/// The listeners, split by the thread that serves them.
#[derive(Debug)]
pub(crate) struct SplitListeners {
    /// Distributed among the workers.
    pub(crate) traffic: Vec<(Kind, BoundListener)>,
    /// Served by the control thread.
    pub(crate) endpoints: Vec<(EndpointKind, BoundListener)>,
}

impl Listeners {
    /// Takes the `handed` over listeners whose addresses still apply, and binds the others.
    pub(crate) async fn bind(
        access: &NamespaceAccess,
        sockets: &Sockets,
        settings: &Settings,
        mut handed: Vec<(String, BoundListener)>,
    ) -> Result<Self, InterceptionError> {
        let mut bound = Vec::with_capacity(LISTENERS.len());
        for spec in &LISTENERS {
            let address = (spec.address)(settings);
            let listener = match take_handed_over(&mut handed, spec.name, address) {
                Some(listener) => listener,
                None => {
                    let &ListenerSpec { role, purpose, setting, .. } = spec;
                    let closing = role.closing();
                    let request = ListenerRequest { address, closing, purpose, setting };
                    access.listen(sockets, request).await?
                }
            };
            bound.push((spec, listener));
        }
        Ok(Self(bound))
    }

    /// Listeners on any ports of the loopback interface.
    #[cfg(test)]
    pub(crate) fn testing() -> Self {
        let listen = || std::net::TcpListener::bind("127.0.0.1:0").expect("a listener").into();
        Self(LISTENERS.iter().map(|spec| (spec, listen())).collect())
    }

    /// The same listeners with descriptors of their own.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let clone = |(spec, listener): &(_, BoundListener)| Ok((*spec, listener.try_clone()?));
        self.0.iter().map(clone).collect::<io::Result<_>>().map(Self)
    }

    /// Each listener with its name in a hand-over.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &BoundListener)> {
        self.0.iter().map(|(spec, listener)| (spec.name, listener))
    }

    pub(crate) fn split(self) -> SplitListeners {
        let mut split = SplitListeners { traffic: Vec::new(), endpoints: Vec::new() };
        for (spec, listener) in self.0 {
            match spec.role {
                Role::Traffic(kind) => split.traffic.push((kind, listener)),
                Role::Endpoint(kind) => split.endpoints.push((kind, listener)),
            }
        }
        split
    }
}

/// Removes the listener that was handed over with this name, if it has this address.
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
