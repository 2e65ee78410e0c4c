//! Subscribes to changes of netfilter rules, ip rules, routes and addresses in a namespace. The
//! descriptors become readable after a change.
//!
//! `backend::changes` reads them.

use std::os::fd::{AsFd as _, OwnedFd};

use nlink::netlink::{Connection, Nftables, Route, RtnetlinkGroup};

use crate::backend::leftovers::LegacyTables;
use crate::backend::netlink::failed;
use crate::error::InterceptionError;
use crate::namespace::Entered;

pub(crate) const OPERATION: &str = "watch the rules";
/// The multicast groups of everything that underpass's rules depend on besides nftables.
const DEPENDENCY_GROUPS: [RtnetlinkGroup; 5] = [
    RtnetlinkGroup::Ipv4Rule,
    RtnetlinkGroup::Ipv6Rule,
    RtnetlinkGroup::Ipv4Route,
    RtnetlinkGroup::Ipv6Route,
    RtnetlinkGroup::Ipv6Addr,
];
/// The multicast groups of ip rules. A change of routes or addresses cannot let traffic bypass the
/// rules.
const RULE_GROUPS: [RtnetlinkGroup; 2] = [RtnetlinkGroup::Ipv4Rule, RtnetlinkGroup::Ipv6Rule];

/// The changes to subscribe to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchScope {
    /// Changes of underpass's rules and their dependencies.
    OwnRules,
    /// Changes of any program's rules and ip rules.
    AllRules,
}

/// The sockets of a subscription, opened within its namespace.
#[derive(Debug)]
pub struct RuleSubscription {
    /// The descriptor for nftables. An error if the kernel rejects that subscription.
    pub(crate) nftables: Result<OwnedFd, InterceptionError>,
    pub(crate) routes: OwnedFd,
    pub(crate) legacy: LegacyTables,
}

impl RuleSubscription {
    /// Subscribes. No later change is missed.
    pub(crate) fn start(entered: &Entered, watched: WatchScope) -> Result<Self, InterceptionError> {
        let groups: &[RtnetlinkGroup] = match watched {
            WatchScope::OwnRules => &DEPENDENCY_GROUPS,
            WatchScope::AllRules => &RULE_GROUPS,
        };
        Ok(Self {
            nftables: watch_nftables(entered),
            routes: watch_routes(entered, groups)?,
            legacy: LegacyTables::open(entered),
        })
    }
}

fn watch_routes(_: &Entered, groups: &[RtnetlinkGroup]) -> Result<OwnedFd, InterceptionError> {
    let routes = Connection::<Route>::new().map_err(failed(OPERATION))?;
    routes.subscribe(groups).map_err(failed(OPERATION))?;
    descriptor(routes.socket().as_fd().try_clone_to_owned())
}

fn watch_nftables(_: &Entered) -> Result<OwnedFd, InterceptionError> {
    let connection = Connection::<Nftables>::new().map_err(failed(OPERATION))?;
    connection.subscribe_all().map_err(failed(OPERATION))?;
    descriptor(connection.socket().as_fd().try_clone_to_owned())
}

/// Takes the socket's descriptor. The subscription lives as long as any descriptor of the socket.
fn descriptor(cloned: std::io::Result<OwnedFd>) -> Result<OwnedFd, InterceptionError> {
    cloned.map_err(|source| InterceptionError::Netlink { operation: OPERATION, source })
}
