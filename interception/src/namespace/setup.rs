//! Creates, names and connects namespaces, for the demonstration, tests and benches.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::Path;

use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};
use nlink::netlink::addr::{Ipv4Address, Ipv6Address};
use nlink::netlink::link::{BridgeLink, VethLink};
use nlink::netlink::namespace;
use nlink::netlink::route::{Ipv4Route, Ipv6Route};
use nlink::netlink::{Connection, Route};

use super::thread::enter;
use super::{Namespace, failed};
use crate::backend::netlink::into_io;
use crate::error::InterceptionError;
use crate::namespace::sandbox::sandbox_folder;

/// The folder of named namespaces, in `/run` or in the sandbox's folder. `ip netns` uses
/// `/run/netns`.
const NAMED_FOLDER: &str = "netns";

impl Namespace {
    /// Creates a namespace that `ip netns` and `nsenter --net=/run/netns/NAME` find.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`], also if the name exists.
    pub fn create_named(name: &str) -> Result<Self, InterceptionError> {
        let path = sandbox_folder().join(NAMED_FOLDER).join(name);
        namespace::create_path(&path).map_err(|error| failed("create", &path)(into_io(error)))?;
        Self::open(path)
    }

    /// Creates a namespace without a name, which ends with its last handle.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`], for example without SYS_ADMIN.
    pub(crate) fn create_temporary() -> Result<Self, InterceptionError> {
        let name = Path::new("(temporary)");
        let create = || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(failed("create", name))?;
            Self::current()
        };
        let panicked = |_| Err(failed("create", name)(io::Error::other("it panicked")));
        // The thread ends in the new namespace; the caller's thread stays in its own.
        let thread = std::thread::Builder::new().name("new namespace".to_owned()).spawn(create);
        thread.map_err(failed("create", name))?.join().unwrap_or_else(panicked)
    }

    /// Removes the namespace's name. The namespace ends when no process is in it and no handle is
    /// open.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`], also if it has no name.
    pub fn delete(self) -> Result<(), InterceptionError> {
        let deleted = namespace::delete_path(self.path());
        deleted.map_err(|error| failed("delete", self.path())(into_io(error)))
    }

    /// Runs `f` in the namespace, on a new thread. Sockets, threads and child processes that `f`
    /// creates stay in the namespace. For programs that set up namespaces; the proxy uses
    /// [`NamespaceThread`](super::NamespaceThread).
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`] if the namespace cannot be entered, or `f` panicked.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, InterceptionError> {
        let inside = || enter(self).map(|()| f());
        let panicked = |_| Err(failed("run code in", self.path())(io::Error::other("it panicked")));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("inside".to_owned());
            let thread = thread.spawn_scoped(scope, inside);
            let thread = thread.map_err(failed("start a thread in", self.path()))?;
            thread.join().unwrap_or_else(panicked)
        })
    }

    /// Sets the loopback interface up, which is down in a new namespace.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn set_loopback_up(&self) -> Result<(), InterceptionError> {
        self.with_netlink(async |rtnetlink| rtnetlink.set_link_up("lo").await).await
    }

    /// Adds a route to `destination` through `gateway`, which must have the same family and be
    /// directly reachable.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn add_route(
        &self,
        destination: IpNet,
        gateway: IpAddr,
    ) -> Result<(), InterceptionError> {
        self.with_netlink(async |rtnetlink| add_route(rtnetlink, destination, gateway).await).await
    }

    /// Creates a bridge that is up. It forwards between its ports at once, without a delay for
    /// learning the topology.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`], also if the kernel has no bridges.
    pub async fn add_bridge(&self, name: &str) -> Result<(), InterceptionError> {
        let bridge = BridgeLink::new(name).stp(false).forward_delay_ms(0);
        self.with_netlink(async |rtnetlink| {
            rtnetlink.add_link(bridge).await?;
            rtnetlink.set_link_up(name).await
        })
        .await
    }

    /// Makes an interface a port of a bridge in the same namespace.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn add_bridge_port(
        &self,
        bridge: &str,
        interface: &str,
    ) -> Result<(), InterceptionError> {
        self.with_netlink(async |rtnetlink| rtnetlink.set_link_master(interface, bridge).await)
            .await
    }

    /// Runs netlink requests in the namespace.
    async fn with_netlink(
        &self,
        requests: impl AsyncFnOnce(&Connection<Route>) -> nlink::Result<()>,
    ) -> Result<(), InterceptionError> {
        let failed = |error| failed("change the interfaces of", self.path())(into_io(error));
        match Connection::<Route>::new_in(self.as_fd()) {
            Ok(rtnetlink) => requests(&rtnetlink).await.map_err(failed),
            Err(error) => Err(failed(error)),
        }
    }
}

/// One end of a [`veth`] pair.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint<'a> {
    /// The namespace at this end.
    pub namespace: &'a Namespace,
    /// The name of the interface.
    pub interface: &'a str,
    /// The addresses of the interface, with prefix lengths.
    pub addresses: &'a [IpNet],
    /// Adds default routes through the first address of each family at the other end.
    pub default_route: bool,
}

/// Connects two namespaces by a veth pair. Both interfaces are up and have their addresses when it
/// returns.
///
/// # Errors
///
/// [`InterceptionError::Namespace`].
pub async fn veth(a: &Endpoint<'_>, b: &Endpoint<'_>) -> Result<(), InterceptionError> {
    let pair = VethLink::new(a.interface, b.interface).peer_netns_fd(b.namespace);
    a.namespace.with_netlink(async |rtnetlink| rtnetlink.add_link(pair).await).await?;
    for end in [a, b] {
        end.namespace.with_netlink(async |rtnetlink| set_up(rtnetlink, end).await).await?;
    }
    for (end, other) in [(a, b), (b, a)] {
        if end.default_route {
            end.namespace.with_netlink(async |rtnetlink| route_all(rtnetlink, other).await).await?;
        }
    }
    Ok(())
}

async fn set_up(rtnetlink: &Connection<Route>, end: &Endpoint<'_>) -> nlink::Result<()> {
    rtnetlink.set_link_up("lo").await?;
    for address in end.addresses {
        match address {
            IpNet::V4(v4) => {
                let address = Ipv4Address::new(end.interface, v4.addr(), v4.prefix_len());
                rtnetlink.add_address(address).await?;
            }
            IpNet::V6(v6) => {
                // Without duplicate address detection, the address is usable at once. No other host
                // is on this link.
                let address = Ipv6Address::new(end.interface, v6.addr(), v6.prefix_len()).nodad();
                rtnetlink.add_address(address).await?;
            }
        }
    }
    rtnetlink.set_link_up(end.interface).await
}

async fn route_all(rtnetlink: &Connection<Route>, other: &Endpoint<'_>) -> nlink::Result<()> {
    let first = |v4: bool| other.addresses.iter().find(|address| address.addr().is_ipv4() == v4);
    for gateway in [first(true), first(false)].into_iter().flatten() {
        let everything = match gateway {
            IpNet::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
            IpNet::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
        };
        add_route(rtnetlink, everything, gateway.addr()).await?;
    }
    Ok(())
}

async fn add_route(
    rtnetlink: &Connection<Route>,
    destination: IpNet,
    gateway: IpAddr,
) -> nlink::Result<()> {
    match (destination, gateway) {
        (IpNet::V4(v4), IpAddr::V4(gateway)) => {
            let route = Ipv4Route::from_addr(v4.network(), v4.prefix_len()).gateway(gateway);
            rtnetlink.add_route(route).await
        }
        (IpNet::V6(v6), IpAddr::V6(gateway)) => {
            let route = Ipv6Route::from_addr(v6.network(), v6.prefix_len()).gateway(gateway);
            rtnetlink.add_route(route).await
        }
        _ => Err(nlink::Error::invalid_message("the gateway is of the other address family")),
    }
}
