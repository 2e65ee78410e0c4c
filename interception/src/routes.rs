//! The way back: an ip rule and a route that deliver the workload's replies to imitated clients to
//! the proxy.
//!
//! ```text
//! ip rule  add fwmark 0x111/0xfff pref 32764 lookup 100
//! ip route add local default dev lo table 100
//! ```
//!
//! Not here: what sets the mark (`plan.rs`). Everything acts on the calling thread's network
//! namespace.

use nlink::netlink::Connection;
use nlink::netlink::Route as Rtnetlink;
use nlink::netlink::route::{Ipv4Route, Ipv6Route};
use nlink::netlink::rule::RuleBuilder;
use nlink::netlink::types::route::{RouteProtocol, RouteType};

use crate::netlink::failed;
use crate::plan::{CONNECTION_MARK, MARK_MASK, ROUTE_TABLE, RULE_PRIORITY};
use crate::{InterceptionError, ipv6};

/// Says in the kernel who made our rules and routes (`ip rule` shows `proto 117`), so that removal
/// cannot take another program's. The number is free in /etc/iproute2/rt_protos.
const PROTOCOL: u8 = 117;

/// One thing that we add.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The ip rule of IPv4.
    RuleV4,
    /// The route of IPv4.
    RouteV4,
    /// The ip rule of IPv6.
    RuleV6,
    /// The route of IPv6.
    RouteV6,
}

const V4: [Entry; 2] = [Entry::RuleV4, Entry::RouteV4];
const V6: [Entry; 2] = [Entry::RuleV6, Entry::RouteV6];

/// Adds what is missing, and says what that was. On failure nothing stays that this call added.
///
/// IPv6 follows the kernel rather than the capture setting: also a pod whose own IPv6 traffic is
/// not caught gets HBONE from IPv6 clients, whose addresses the proxy imitates. A loopback
/// interface without IPv6 takes no IPv6 route, and has no IPv6 connection to return.
pub(crate) async fn install() -> Result<Vec<Entry>, InterceptionError> {
    const OPERATION: &str = "install the ip rule and route";
    let connection = connect(OPERATION)?;
    let v6 = if ipv6::on_loopback() { &V6[..] } else { &[] };
    let mut added = Vec::new();
    for entry in V4.iter().chain(v6) {
        match add(&connection, *entry).await {
            Ok(()) => added.push(*entry),
            Err(error) if error.is_already_exists() => {}
            Err(error) => {
                undo(&added).await;
                return Err(failed(OPERATION)(error));
            }
        }
    }
    Ok(added)
}

/// Removes what a failed installation added. A failure here is logged: the caller has a better one
/// to return.
pub(crate) async fn undo(added: &[Entry]) {
    if let Err(error) = delete(added).await {
        tracing::warn!(%error, ?added, "what a failed installation had added could not be removed");
    }
}

/// Removes ours in both families; `false` if there was nothing.
pub(crate) async fn remove() -> Result<bool, InterceptionError> {
    // Without IPv6 the kernel answers questions about it with errors, and has nothing of ours.
    let v6 = if ipv6::known() { &V6[..] } else { &[] };
    let entries: Vec<_> = V4.iter().chain(v6).rev().copied().collect();
    delete(&entries).await
}

async fn delete(entries: &[Entry]) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the ip rule and route";
    let connection = connect(OPERATION)?;
    let mut any = false;
    for entry in entries {
        any |= delete_one(&connection, *entry).await.map_err(failed(OPERATION))?;
    }
    Ok(any)
}

async fn add(connection: &Connection<Rtnetlink>, entry: Entry) -> nlink::Result<()> {
    match entry {
        Entry::RuleV4 => connection.add_rule(rule(RuleBuilder::v4())).await,
        Entry::RuleV6 => connection.add_rule(rule(RuleBuilder::v6())).await,
        Entry::RouteV4 => connection.add_route(route_v4()).await,
        Entry::RouteV6 => connection.add_route(route_v6()).await,
    }
}

async fn delete_one(connection: &Connection<Rtnetlink>, entry: Entry) -> nlink::Result<bool> {
    match entry {
        Entry::RuleV4 => connection.del_rule_if_exists(rule(RuleBuilder::v4())).await,
        Entry::RuleV6 => connection.del_rule_if_exists(rule(RuleBuilder::v6())).await,
        Entry::RouteV4 => connection.del_route_if_exists(route_v4()).await,
        Entry::RouteV6 => connection.del_route_if_exists(route_v6()).await,
    }
}

fn rule(family: RuleBuilder) -> RuleBuilder {
    family
        .fwmark_mask(CONNECTION_MARK, MARK_MASK)
        .priority(RULE_PRIORITY)
        .table(ROUTE_TABLE)
        .protocol(PROTOCOL)
}

fn route_v4() -> Ipv4Route {
    Ipv4Route::default_route()
        .route_type(RouteType::Local)
        .dev("lo")
        .table(ROUTE_TABLE)
        .protocol(RouteProtocol::Other(PROTOCOL))
}

fn route_v6() -> Ipv6Route {
    Ipv6Route::default_route()
        .route_type(RouteType::Local)
        .dev("lo")
        .table(ROUTE_TABLE)
        .protocol(RouteProtocol::Other(PROTOCOL))
}

fn connect(operation: &'static str) -> Result<Connection<Rtnetlink>, InterceptionError> {
    Connection::<Rtnetlink>::new().map_err(failed(operation))
}
