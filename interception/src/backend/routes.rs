//! The ip rules, routes and loopback addresses that a plan depends on.
//!
//! They deliver marked packets to this namespace. The plan's rules set the marks.
//!
//! ```text
//! ip rule  add fwmark 0x111/0xfff pref 32764 lookup 100
//! ip route add local default dev lo table 100
//! ip addr  add ::6/128 dev lo
//! ```

use std::net::Ipv6Addr;

use nlink::netlink::addr::Ipv6Address;
use nlink::netlink::messages::{AddressMessage, RouteMessage, RuleMessage};
use nlink::netlink::route::{Ipv4Route, Ipv6Route};
use nlink::netlink::rule::RuleBuilder;
use nlink::netlink::types::route::{RouteProtocol, RouteType};
use nlink::netlink::{Connection, Route as Rtnetlink};

use crate::backend::netlink::failed;
use crate::backend::verify::Section;
use crate::error::InterceptionError;
use crate::namespace::ipv6::ipv6_available;
use crate::namespace::{Entered, ipv6};
use crate::plan::{LoopbackAddress, PolicyRoute, RulePlan};

/// The routing protocol number of underpass's ip rules and routes (`ip rule` shows `proto 117`).
/// Only objects with this number are removed. /etc/iproute2/rt_protos does not use it.
pub(crate) const PROTOCOL: u8 = 117;
/// The interface of all routes and addresses.
const LOOPBACK: &str = "lo";
/// Its index in every namespace (LOOPBACK_IFINDEX, include/net/flow.h).
const LOOPBACK_INDEX: u32 = 1;

/// An object that an installation adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// An ip rule for one IP version.
    Rule(PolicyRoute, Version),
    /// The route that the ip rule selects.
    Route(PolicyRoute, Version),
    /// A loopback address.
    Address(Ipv6Addr),
}

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V4,
    V6,
}

/// The objects that the plan needs, in the order of installation.
///
/// IPv6 objects depend on the kernel, not on the capture setting: a pod whose IPv6 is not captured
/// still receives HBONE from IPv6 clients, and the proxy connects from their addresses. While IPv6
/// is disabled on the loopback interface, the kernel rejects IPv6 routes and addresses there.
fn needed_entries(entered: &Entered, plan: &RulePlan) -> Vec<Entry> {
    let v6 = ipv6::on_loopback(entered);
    let versions = if ipv6_available() { &[Version::V4, Version::V6][..] } else { &[Version::V4] };
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

/// The objects of other settings that this plan does not need. Their ip rules could match a mark of
/// this plan.
fn unneeded_entries(plan: &RulePlan, needed: &[Entry]) -> Vec<Entry> {
    let is_needed = |entry: &Entry| match entry {
        // Compare only the table: several ip rules may select the same route.
        Entry::Route(PolicyRoute { table, .. }, _) => {
            plan.routes().iter().any(|route| route.table == *table)
        }
        entry => needed.contains(entry),
    };
    let mut entries = removable_entries(&RulePlan::routes_and_addresses());
    entries.retain(|entry| !is_needed(entry));
    entries
}

/// Removes objects of an installation with other settings.
pub(crate) async fn remove_foreign(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<(), InterceptionError> {
    let needed = needed_entries(entered, plan);
    delete(entered, &unneeded_entries(plan, &needed)).await.map(drop)
}

/// Adds missing objects and returns them. On failure, removes all objects that it added.
pub(crate) async fn install(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<Vec<Entry>, InterceptionError> {
    const OPERATION: &str = "install the ip rules and routes";
    let needed = needed_entries(entered, plan);
    if needed.is_empty() {
        return Ok(Vec::new());
    }
    let connection = connect(entered, OPERATION)?;
    let mut added = Vec::new();
    for entry in needed {
        match add(&connection, entry).await {
            Ok(()) => added.push(entry),
            Err(error) if error.is_already_exists() => {}
            // IPv6 was disabled after the list was built.
            Err(_) if entry.needs_ipv6_on_loopback() && !ipv6::on_loopback(entered) => {}
            Err(error) => {
                undo(entered, &added).await;
                return Err(failed(OPERATION)(error));
            }
        }
    }
    Ok(added)
}

/// Removes objects after a failed installation. Only logs a failure, because the caller returns the
/// original error.
pub(crate) async fn undo(entered: &Entered, added: &[Entry]) {
    if let Err(error) = delete(entered, added).await {
        tracing::warn!(%error, ?added, "cannot remove the ip rules and routes of a failed installation");
    }
}

/// Removes all objects of the plan in both families. Returns `false` if there were none.
pub(crate) async fn remove(entered: &Entered, plan: &RulePlan) -> Result<bool, InterceptionError> {
    delete(entered, &removable_entries(plan)).await
}

/// All objects that the plan may have added, in both families.
fn removable_entries(plan: &RulePlan) -> Vec<Entry> {
    // If the kernel lacks IPv6, requests about IPv6 fail, and there are no IPv6 objects.
    let versions = if ipv6_available() { &[Version::V4, Version::V6][..] } else { &[Version::V4] };
    let mut entries = Vec::new();
    for route in plan.routes() {
        entries.extend(versions.iter().map(|version| Entry::Rule(*route, *version)));
        entries.extend(versions.iter().map(|version| Entry::Route(*route, *version)));
    }
    let addresses = plan.addresses().iter().filter(|_| ipv6_available());
    entries.extend(addresses.map(|LoopbackAddress(address)| Entry::Address(*address)));
    entries
}

/// The objects of a plan, as sections of a listing.
pub(crate) struct Listings {
    /// The planned objects.
    pub(crate) expected: Section,
    /// The installed objects, including those of an installation with other settings.
    pub(crate) installed: Section,
}

/// Lists the planned and the installed objects.
pub(crate) async fn listings(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<Listings, InterceptionError> {
    const OPERATION: &str = "read the ip rules and routes";
    let connection = connect(entered, OPERATION)?;
    let rules = connection.get_rules().await.map_err(failed(OPERATION))?;
    let routes = connection.get_routes().await.map_err(failed(OPERATION))?;
    let addresses = if plan.addresses().is_empty() {
        Vec::new()
    } else {
        connection.get_addresses().await.map_err(failed(OPERATION))?
    };
    let exists = |entry: &Entry| match entry {
        Entry::Rule(route, version) => rules.iter().any(|rule| is_rule(rule, route, *version)),
        Entry::Route(route, version) => routes.iter().any(|found| is_route(found, route, *version)),
        Entry::Address(address) => addresses.iter().any(|found| is_address(found, *address)),
    };
    // Only objects with underpass's protocol number can come from another installation of
    // underpass.
    let ours = |entry: &Entry| match entry {
        Entry::Rule(route, version) => rules
            .iter()
            .any(|rule| rule.protocol() == Some(PROTOCOL) && is_rule(rule, route, *version)),
        Entry::Route(route, version) => routes.iter().any(|found| {
            found.protocol() == RouteProtocol::Other(PROTOCOL) && is_route(found, route, *version)
        }),
        Entry::Address(_) => false,
    };
    let needed = needed_entries(entered, plan);
    let left = unneeded_entries(plan, &needed).into_iter().filter(ours);
    let found = needed.iter().copied().filter(exists);
    let section = |lines| Section { head: HEAD.to_owned(), lines };
    let installed = section(found.chain(left).map(text).collect());
    Ok(Listings { expected: section(needed.into_iter().map(text).collect()), installed })
}

/// Lists foreign ip rules that precede those of the plan, in iproute2 syntax.
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
        // Priority 0 is the local table.
        (1..=last).contains(&rule.priority()) && rule.protocol() != Some(PROTOCOL)
    });
    Ok(foreign.map(foreign_text).collect())
}

/// Lists foreign ip rules that equal those of the plan, except for the protocol number.
pub(crate) async fn duplicate_foreign_rules(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<Vec<String>, InterceptionError> {
    const OPERATION: &str = "read the ip rules";
    let rules = connect(entered, OPERATION)?.get_rules().await.map_err(failed(OPERATION))?;
    let of_others = rules.iter().filter(|rule| rule.protocol() != Some(PROTOCOL));
    let equal = of_others.filter(|rule| {
        let version = if rule.is_ipv4() { Version::V4 } else { Version::V6 };
        plan.routes().iter().any(|route| is_rule_with_any_priority(rule, route, version))
    });
    Ok(equal.map(foreign_text).collect())
}

/// Removes foreign ip rules that equal those of the plan, and the routes that they select. Returns
/// `false` if there were none.
pub(crate) async fn remove_foreign_rules(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the ip rules and routes of other meshes";
    let connection = connect(entered, OPERATION)?;
    let mut any = false;
    for entry in removable_entries(plan) {
        let removed = match entry {
            // Istio's TPROXY rule has no fixed priority, and may exist several times.
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
                let route = Ipv4Route::default_route()
                    .route_type(RouteType::Local)
                    .dev_index(LOOPBACK_INDEX);
                connection.del_route_if_exists(route.table(table)).await
            }
            Entry::Route(PolicyRoute { table, .. }, Version::V6) => {
                let route = Ipv6Route::default_route()
                    .route_type(RouteType::Local)
                    .dev_index(LOOPBACK_INDEX);
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

/// Prints an object in iproute2 syntax.
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
    is_rule_with_any_priority(rule, route, version) && rule.priority() == route.priority
}

/// Like [`is_rule`], for any priority.
fn is_rule_with_any_priority(rule: &RuleMessage, route: &PolicyRoute, version: Version) -> bool {
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
        // Without duplicate address detection, the address is usable at once. No other host can
        // have an address of the loopback interface.
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
        .dev_index(LOOPBACK_INDEX)
        .table(route.table)
        .protocol(RouteProtocol::Other(PROTOCOL))
}

fn route_v6(route: PolicyRoute) -> Ipv6Route {
    Ipv6Route::default_route()
        .route_type(RouteType::Local)
        .dev_index(LOOPBACK_INDEX)
        .table(route.table)
        .protocol(RouteProtocol::Other(PROTOCOL))
}

pub(crate) fn connect(
    _: &Entered,
    operation: &'static str,
) -> Result<Connection<Rtnetlink>, InterceptionError> {
    Connection::<Rtnetlink>::new().map_err(failed(operation))
}
