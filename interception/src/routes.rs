//! What the rules rely on beside netfilter: ip rules and routes that deliver marked packets to this
//! namespace, and addresses of the loopback interface.
//!
//! ```text
//! ip rule  add fwmark 0x111/0xfff pref 32764 lookup 100
//! ip route add local default dev lo table 100
//! ip addr  add ::6/128 dev lo
//! ```
//!
//! Not here: what sets the marks (`plan.rs`).

use std::net::Ipv6Addr;

use nlink::netlink::addr::Ipv6Address;
use nlink::netlink::messages::{AddressMessage, RouteMessage, RuleMessage};
use nlink::netlink::route::{Ipv4Route, Ipv6Route};
use nlink::netlink::rule::RuleBuilder;
use nlink::netlink::types::route::{RouteProtocol, RouteType};
use nlink::netlink::{Connection, Route as Rtnetlink};

use crate::netlink::failed;
use crate::plan::{LoopbackAddress, PolicyRoute, RulePlan};
use crate::verify::Section;
use crate::{Entered, InterceptionError, ipv6, ipv6_available};

/// Says in the kernel who made our rules and routes (`ip rule` shows `proto 117`), so that removal
/// cannot take another program's. The number is free in /etc/iproute2/rt_protos.
pub(crate) const PROTOCOL: u8 = 117;
/// The interface that all of it is about.
const LOOPBACK: &str = "lo";

/// One thing that we add.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// An ip rule, of IPv6 or IPv4.
    Rule(PolicyRoute, Version),
    /// The route that it leads to.
    Route(PolicyRoute, Version),
    /// An address.
    Address(Ipv6Addr),
}

/// Of which IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V4,
    V6,
}

/// What the plan needs here, in the order of its installation.
///
/// IPv6 follows the kernel rather than the capture setting: also a pod whose own IPv6 traffic is
/// not caught gets HBONE from IPv6 clients, whose addresses the proxy imitates. While IPv6 is
/// disabled on the loopback interface, that takes no IPv6 route or address.
fn needed(entered: &Entered, plan: &RulePlan) -> Vec<Entry> {
    let (known, v6) = (ipv6_available(), ipv6::on_loopback(entered));
    let versions = if known { &[Version::V4, Version::V6][..] } else { &[Version::V4] };
    let routes = plan.routes().iter().flat_map(|route| {
        versions
            .iter()
            .flat_map(|version| [Entry::Rule(*route, *version), Entry::Route(*route, *version)])
    });
    let addresses = plan.addresses().iter();
    let mut entries: Vec<_> =
        routes.chain(addresses.map(|LoopbackAddress(address)| Entry::Address(*address))).collect();
    entries.retain(|entry| v6 || !entry.needs_ipv6_on_loopback());
    entries
}

impl Entry {
    fn needs_ipv6_on_loopback(&self) -> bool {
        matches!(self, Self::Route(_, Version::V6) | Self::Address(_))
    }
}

/// What the rules of other settings rely on, and these do not: with them, a mark that these rules set would lead astray.
fn foreign(entered: &Entered, plan: &RulePlan) -> Vec<Entry> {
    let needed = needed(entered, plan);
    let is_needed = |entry: &Entry| match entry {
        // A route is its table's, whatever the rule that leads to it.
        Entry::Route(PolicyRoute { table, .. }, _) => {
            plan.routes().iter().any(|route| route.table == *table)
        }
        entry => needed.contains(entry),
    };
    let mut entries = removable(&RulePlan::beside_rules());
    entries.retain(|entry| !is_needed(entry));
    entries
}

/// Takes out what an installation of other settings left.
pub(crate) async fn remove_foreign(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<(), InterceptionError> {
    delete(entered, &foreign(entered, plan)).await.map(drop)
}

/// Adds what is missing, and says what that was. On failure nothing stays that this call added.
pub(crate) async fn install(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<Vec<Entry>, InterceptionError> {
    const OPERATION: &str = "install the ip rules and routes";
    let needed = needed(entered, plan);
    if needed.is_empty() {
        return Ok(Vec::new());
    }
    let connection = connect(entered, OPERATION)?;
    let mut added = Vec::new();
    for entry in needed {
        match add(&connection, entry).await {
            Ok(()) => added.push(entry),
            Err(error) if error.is_already_exists() => {}
            // Disabled since the list was made.
            Err(_) if entry.needs_ipv6_on_loopback() && !ipv6::on_loopback(entered) => {}
            Err(error) => {
                undo(entered, &added).await;
                return Err(failed(OPERATION)(error));
            }
        }
    }
    Ok(added)
}

/// Removes what a failed installation added. A failure here is logged: the caller has a better one
/// to return.
pub(crate) async fn undo(entered: &Entered, added: &[Entry]) {
    if let Err(error) = delete(entered, added).await {
        tracing::warn!(%error, ?added, "what a failed installation had added could not be removed");
    }
}

/// Removes whatever the plan needs, in both families; `false` if there was nothing.
pub(crate) async fn remove(entered: &Entered, plan: &RulePlan) -> Result<bool, InterceptionError> {
    delete(entered, &removable(plan)).await
}

/// All that the plan may have needed here, in both families.
fn removable(plan: &RulePlan) -> Vec<Entry> {
    // Without IPv6 the kernel answers questions about it with errors, and has nothing of ours.
    let v6 = if ipv6_available() { &[Version::V4, Version::V6][..] } else { &[Version::V4] };
    let mut entries = Vec::new();
    for route in plan.routes() {
        entries.extend(v6.iter().map(|version| Entry::Rule(*route, *version)));
        entries.extend(v6.iter().map(|version| Entry::Route(*route, *version)));
    }
    let addresses = plan.addresses().iter().filter(|_| ipv6_available());
    entries.extend(addresses.map(|LoopbackAddress(address)| Entry::Address(*address)));
    entries
}

/// What the plan needs here, for a comparison.
pub(crate) fn expected(entered: &Entered, plan: &RulePlan) -> Section {
    Section { head: HEAD.to_owned(), lines: needed(entered, plan).into_iter().map(text).collect() }
}

/// What of it there is, and what an installation of other settings left.
pub(crate) async fn installed(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<Section, InterceptionError> {
    const OPERATION: &str = "read the ip rules and routes";
    let connection = connect(entered, OPERATION)?;
    let rules = connection.get_rules().await.map_err(failed(OPERATION))?;
    let routes = connection.get_routes().await.map_err(failed(OPERATION))?;
    let addresses = connection.get_addresses().await.map_err(failed(OPERATION))?;
    let there = |entry: &Entry| match entry {
        Entry::Rule(route, version) => rules.iter().any(|rule| is_rule(rule, route, *version)),
        Entry::Route(route, version) => routes.iter().any(|found| is_route(found, route, *version)),
        Entry::Address(address) => addresses.iter().any(|found| is_address(found, *address)),
    };
    // Only what has our number can be what another installation of ours left.
    let ours = |entry: &Entry| match entry {
        Entry::Rule(route, version) => rules
            .iter()
            .any(|rule| rule.protocol() == Some(PROTOCOL) && is_rule(rule, route, *version)),
        Entry::Route(route, version) => routes.iter().any(|found| {
            found.protocol() == RouteProtocol::Other(PROTOCOL) && is_route(found, route, *version)
        }),
        Entry::Address(_) => false,
    };
    let needed = needed(entered, plan).into_iter().filter(there);
    let left = foreign(entered, plan).into_iter().filter(ours);
    let lines = needed.chain(left).map(text).collect();
    Ok(Section { head: HEAD.to_owned(), lines })
}

/// The ip rules of others that choose a route before those of the plan do, as iproute2 would be
/// given them.
pub(crate) async fn foreign_rules(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<Vec<String>, InterceptionError> {
    const OPERATION: &str = "read the ip rules";
    let Some(last) = plan.routes().iter().map(|route| route.priority).max() else {
        return Ok(Vec::new());
    };
    let rules = connect(entered, OPERATION)?.get_rules().await.map_err(failed(OPERATION))?;
    let foreign = rules.iter().filter(|rule| {
        // The local table has priority 0.
        (1..=last).contains(&rule.priority()) && rule.protocol() != Some(PROTOCOL)
    });
    Ok(foreign.map(foreign_text).collect())
}

/// The ip rules of others that equal those of the plan in all but who made them.
pub(crate) async fn rules_of_others(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<Vec<String>, InterceptionError> {
    const OPERATION: &str = "read the ip rules";
    let rules = connect(entered, OPERATION)?.get_rules().await.map_err(failed(OPERATION))?;
    let of_others = rules.iter().filter(|rule| rule.protocol() != Some(PROTOCOL));
    let equal = of_others.filter(|rule| {
        let version = if rule.is_ipv4() { Version::V4 } else { Version::V6 };
        plan.routes().iter().any(|route| is_like(rule, route, version))
    });
    Ok(equal.map(foreign_text).collect())
}

/// Removes them, and the routes that they lead to; `false` if there was nothing.
pub(crate) async fn remove_of_others(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the ip rules and routes of other meshes";
    let connection = connect(entered, OPERATION)?;
    let mut any = false;
    for entry in removable(plan) {
        let removed = match entry {
            // Istio gives its TPROXY rule no priority, and may have added it several times.
            Entry::Rule(PolicyRoute { mark, table, .. }, version) => {
                let family = family(version);
                let rule = RuleBuilder::new(family).fwmark_mask(mark.value, mark.mask).table(table);
                let mut removed = false;
                while connection
                    .del_rule_if_exists(rule.clone())
                    .await
                    .map_err(failed(OPERATION))?
                {
                    removed = true;
                }
                Ok(removed)
            }
            Entry::Route(PolicyRoute { table, .. }, Version::V4) => {
                let route = Ipv4Route::default_route().route_type(RouteType::Local).dev(LOOPBACK);
                connection.del_route_if_exists(route.table(table)).await
            }
            Entry::Route(PolicyRoute { table, .. }, Version::V6) => {
                let route = Ipv6Route::default_route().route_type(RouteType::Local).dev(LOOPBACK);
                connection.del_route_if_exists(route.table(table)).await
            }
            Entry::Address(_) => Ok(false),
        };
        any |= removed.map_err(failed(OPERATION))?;
    }
    Ok(any)
}

fn foreign_text(rule: &RuleMessage) -> String {
    let mut words = vec![if rule.is_ipv4() { "ip -4 rule" } else { "ip -6 rule" }.to_owned()];
    if rule.is_invert() {
        words.push("not".to_owned());
    }
    let address = |word, address: Option<std::net::IpAddr>, length| {
        address.map(|address| format!("{word} {address}/{length}"))
    };
    words.extend(address("from", rule.source(), rule.src_len()));
    words.extend(address("to", rule.destination(), rule.dst_len()));
    words.extend(rule.iifname().map(|name| format!("iif {name}")));
    words.extend(rule.oifname().map(|name| format!("oif {name}")));
    words.extend(rule.fwmark().map(|mark| {
        let mask = rule.fwmask().unwrap_or(u32::MAX);
        format!("fwmark {mark:#x}/{mask:#x}")
    }));
    words.push(format!("pref {}", rule.priority()));
    if rule.is_lookup() {
        words.push(format!("lookup {}", rule.table()));
    } else {
        words.push(rule.action().name().to_owned());
    }
    words.join(" ")
}

const HEAD: &str = "ip rules, routes and addresses";

/// As iproute2 would be told.
fn text(entry: Entry) -> String {
    let ip = |version| if version == Version::V4 { "ip -4" } else { "ip -6" };
    match entry {
        Entry::Rule(PolicyRoute { mark, priority, table }, version) => {
            let (ip, value, mask) = (ip(version), mark.value, mark.mask);
            format!("{ip} rule add fwmark {value:#x}/{mask:#x} pref {priority} lookup {table}")
        }
        Entry::Route(PolicyRoute { table, .. }, version) => {
            format!("{} route add local default dev {LOOPBACK} table {table}", ip(version))
        }
        Entry::Address(address) => format!("ip -6 addr add {address}/128 dev {LOOPBACK}"),
    }
}

fn is_rule(rule: &RuleMessage, route: &PolicyRoute, version: Version) -> bool {
    is_like(rule, route, version) && rule.priority() == route.priority
}

/// The same at any priority.
fn is_like(rule: &RuleMessage, route: &PolicyRoute, version: Version) -> bool {
    rule.is_ipv4() == (version == Version::V4)
        && rule.is_lookup()
        && rule.table() == route.table
        && rule.fwmark() == Some(route.mark.value)
        && rule.fwmask().unwrap_or(u32::MAX) == route.mark.mask
        && rule.source().is_none()
        && rule.destination().is_none()
        && rule.iifname().is_none()
        && !rule.is_invert()
}

fn is_route(found: &RouteMessage, route: &PolicyRoute, version: Version) -> bool {
    /// The loopback interface is number 1 in every namespace (LOOPBACK_IFINDEX,
    /// include/net/flow.h).
    const LOOPBACK_INDEX: u32 = 1;
    found.family() == family(version)
        && found.table_id() == route.table
        && found.route_type() == RouteType::Local
        && found.dst_len() == 0
        && found.oif() == Some(LOOPBACK_INDEX)
}

fn is_address(found: &AddressMessage, address: Ipv6Addr) -> bool {
    found.address().copied() == Some(address.into())
}

pub(crate) fn family(version: Version) -> u8 {
    // AF_INET and AF_INET6 (include/linux/socket.h).
    if version == Version::V4 { 2 } else { 10 }
}

async fn delete(entered: &Entered, entries: &[Entry]) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the ip rules and routes";
    let connection = connect(entered, OPERATION)?;
    let mut any = false;
    for entry in entries {
        any |= delete_one(&connection, *entry).await.map_err(failed(OPERATION))?;
    }
    Ok(any)
}

async fn add(connection: &Connection<Rtnetlink>, entry: Entry) -> nlink::Result<()> {
    match entry {
        Entry::Rule(route, version) => connection.add_rule(rule(route, version)).await,
        Entry::Route(route, Version::V4) => connection.add_route(route_v4(route)).await,
        Entry::Route(route, Version::V6) => connection.add_route(route_v6(route)).await,
        // Nobody else is on the loopback interface: without the wait for an objection it is usable
        // at once.
        Entry::Address(address) => {
            connection.add_address(Ipv6Address::new(LOOPBACK, address, 128).nodad()).await
        }
    }
}

async fn delete_one(connection: &Connection<Rtnetlink>, entry: Entry) -> nlink::Result<bool> {
    match entry {
        Entry::Rule(route, version) => connection.del_rule_if_exists(rule(route, version)).await,
        Entry::Route(route, Version::V4) => connection.del_route_if_exists(route_v4(route)).await,
        Entry::Route(route, Version::V6) => connection.del_route_if_exists(route_v6(route)).await,
        Entry::Address(address) => {
            connection.del_address_if_exists(LOOPBACK, address.into(), 128).await
        }
    }
}

fn rule(route: PolicyRoute, version: Version) -> RuleBuilder {
    let family = if version == Version::V4 { RuleBuilder::v4() } else { RuleBuilder::v6() };
    family
        .fwmark_mask(route.mark.value, route.mark.mask)
        .priority(route.priority)
        .table(route.table)
        .protocol(PROTOCOL)
}

fn route_v4(route: PolicyRoute) -> Ipv4Route {
    Ipv4Route::default_route()
        .route_type(RouteType::Local)
        .dev(LOOPBACK)
        .table(route.table)
        .protocol(RouteProtocol::Other(PROTOCOL))
}

fn route_v6(route: PolicyRoute) -> Ipv6Route {
    Ipv6Route::default_route()
        .route_type(RouteType::Local)
        .dev(LOOPBACK)
        .table(route.table)
        .protocol(RouteProtocol::Other(PROTOCOL))
}

pub(crate) fn connect(
    _: &Entered,
    operation: &'static str,
) -> Result<Connection<Rtnetlink>, InterceptionError> {
    Connection::<Rtnetlink>::new().map_err(failed(operation))
}
