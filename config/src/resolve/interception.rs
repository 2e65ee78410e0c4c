//! From the `interception` section to [`InterceptionSettings`]: its types, its defaults, and what does not go together.
//!
//! Not here: which keys exist (`resolve.rs`).

use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

use crate::read::Cursor;
use crate::settings::{
    Backend, Dns, InboundCapture, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, OnExit,
    OutboundCapture, PortRange, PortRangeError, Profile,
};

/// The user and group that Istio's sidecar runs as.
const ISTIO_PROXY: u32 = 1337;
/// The user that OSM's sidecar runs as.
const OSM_PROXY: u32 = 1500;
/// IFNAMSIZ without its final NUL (`include/uapi/linux/if.h`).
const MAX_INTERFACE_BYTES: usize = 15;
/// (uid_t)-1 means "no user" to the kernel.
const NO_ID: u32 = u32::MAX;

const LOOPBACK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 32);

/// The keys whose values are lists: in a flag or a variable, brackets make these YAML (`load.rs`).
pub(super) const LISTS: &[&str] = &[
    "interception.outbound.exclude_cidrs",
    "interception.outbound.include_cidrs",
    "interception.outbound.exclude_ports",
    "interception.outbound.include_ports",
    "interception.outbound.exclude_interfaces",
    "interception.outbound.exclude_uids",
    "interception.outbound.exclude_gids",
    "interception.outbound.include_gids",
    "interception.inbound.include_ports",
    "interception.inbound.exclude_ports",
    "interception.inbound.exclude_interfaces",
    "interception.virtual_interfaces",
    "interception.proxy_uids",
    "interception.proxy_gids",
    "interception.dns_servers",
    "interception.kubelet_probes",
];

/// Reads the whole section. What is wrong is told at its key; the settings are then of no use.
pub(super) fn settings(section: Cursor<'_>) -> InterceptionSettings {
    let profile = profile(section.key("profile"));
    let switch = |key: &str, default: bool| section.key(key).flag().unwrap_or(default);
    let (uids, gids): (&[u32], &[u32]) = match profile {
        Profile::Sidecar => (&[ISTIO_PROXY], &[ISTIO_PROXY]),
        Profile::Osm => (&[OSM_PROXY], &[]),
        Profile::Ambient | Profile::None => (&[], &[]),
    };
    let exact = switch("exact", false);
    let settings = InterceptionSettings {
        profile,
        backend: section.key("backend").one_of(Backend::WORDS).unwrap_or(Backend::Auto),
        exact,
        install: switch("install", true),
        repair: switch("repair", true),
        ipv6: section.key("ipv6").one_of(Ipv6::WORDS).unwrap_or(Ipv6::Capture),
        on_exit: section.key("on_exit").one_of(OnExit::WORDS).unwrap_or(OnExit::Keep),
        allow_host: switch("allow_host", false),
        outbound: outbound(section.key("outbound")),
        inbound: inbound(section.key("inbound")),
        virtual_interfaces: section.key("virtual_interfaces").list(interface),
        proxy_uids: list_or(section.key("proxy_uids"), uid, uids),
        proxy_gids: list_or(section.key("proxy_gids"), gid, gids),
        dns: section.key("dns").one_of(Dns::WORDS).unwrap_or(Dns::Off),
        dns_servers: section.key("dns_servers").list(server),
        drop_invalid: switch("drop_invalid", false),
        ingress: switch("ingress", false),
        kubelet_probes: kubelet_probes(section.key("kubelet_probes"), profile, exact),
        loopback_cidr: loopback(section.key("loopback_cidr")),
    };
    // Without rules of ours, nothing that is said of them can be wrong together.
    if profile != Profile::None {
        refuse_contradictions(section, &settings);
    }
    settings
}

fn profile(cursor: Cursor<'_>) -> Profile {
    if !cursor.is_given() {
        return Profile::Ambient;
    }
    // Of a profile that does not exist, nothing more can be said.
    cursor.one_of(Profile::WORDS).unwrap_or(Profile::None)
}

fn kubelet_probes(cursor: Cursor<'_>, profile: Profile, exact: bool) -> KubeletProbes {
    // Istio's rules, which are all that `exact` installs, always exempt probes.
    let always = exact && profile == Profile::Ambient;
    let probes = match () {
        () if cursor.is_word("off") => KubeletProbes::Off,
        () if cursor.is_word("on") => KubeletProbes::On,
        () if cursor.is_given() => KubeletProbes::Ports(cursor.list(probe_port)),
        () if always => KubeletProbes::On,
        () => KubeletProbes::Off,
    };
    if cursor.is_empty_list() {
        cursor.problem("must be off, on, or a list of ports");
    } else if probes != KubeletProbes::On && always {
        cursor.problem("is always on with exact: Istio's rules exempt probes to every port");
    } else if probes != KubeletProbes::Off && matches!(profile, Profile::Sidecar | Profile::Osm) {
        cursor.problem("is possible in the ambient profile only");
    }
    probes
}

fn probe_port(text: &str) -> Result<PortRange, String> {
    text.parse().map_err(|error: PortRangeError| format!("must be off, on, or ports: {error}"))
}

fn outbound(section: Cursor<'_>) -> OutboundCapture {
    let include_ports = section.key("include_ports").list(port_range);
    let cidrs = section.key("include_cidrs");
    let include_cidrs = match included(cidrs, cidr) {
        // Whoever names ports only wants these only.
        None if !include_ports.is_empty() && !cidrs.is_word("*") => Some(Vec::new()),
        cidrs => cidrs,
    };
    OutboundCapture {
        exclude_cidrs: section.key("exclude_cidrs").list(cidr),
        include_cidrs,
        exclude_ports: section.key("exclude_ports").list(port_range),
        include_ports,
        exclude_interfaces: section.key("exclude_interfaces").list(interface),
        exclude_uids: section.key("exclude_uids").list(uid),
        exclude_gids: section.key("exclude_gids").list(gid),
        include_gids: section.key("include_gids").list(gid),
    }
}

fn inbound(section: Cursor<'_>) -> InboundCapture {
    InboundCapture {
        mode: section.key("mode").one_of(InboundMode::WORDS).unwrap_or_default(),
        include_ports: included(section.key("include_ports"), port_range),
        exclude_ports: section.key("exclude_ports").list(port_range),
        exclude_interfaces: section.key("exclude_interfaces").list(interface),
    }
}

/// A list of what is caught; `None`: everything. An empty list says nothing, as a key that is absent does: to catch
/// nothing must be asked for with the word.
fn included<T: Clone + Eq + Hash>(
    cursor: Cursor<'_>,
    read: impl Fn(&str) -> Result<T, String>,
) -> Option<Vec<T>> {
    if cursor.is_word("none") {
        return Some(Vec::new());
    }
    let everything = !cursor.is_given() || cursor.is_word("*") || cursor.is_empty_list();
    (!everything).then(|| cursor.list(read))
}

fn list_or<T: Clone + Eq + Hash>(
    cursor: Cursor<'_>,
    read: impl Fn(&str) -> Result<T, String>,
    default: &[T],
) -> Vec<T> {
    if cursor.is_given() { cursor.list(read) } else { default.to_vec() }
}

/// Tells what is right by itself and wrong together.
fn refuse_contradictions(section: Cursor<'_>, settings: &InterceptionSettings) {
    let InterceptionSettings { profile, outbound, inbound, .. } = settings;
    let ambient = *profile == Profile::Ambient;
    let sidecar = *profile == Profile::Sidecar;
    let osm = *profile == Profile::Osm;
    let no_uids = section.key("proxy_uids").is_empty_list();
    let no_gids = section.key("proxy_gids").is_empty_list();
    let wrong = [
        (
            inbound.mode == InboundMode::Tproxy && !sidecar,
            "inbound.mode",
            "tproxy is possible in the sidecar profile only",
        ),
        (settings.ingress && !ambient, "ingress", "is possible in the ambient profile only"),
        (
            !settings.proxy_uids.is_empty() && ambient,
            "proxy_uids",
            "is possible in the profiles sidecar and osm only: ambient tells the proxy by its mark",
        ),
        (osm && no_uids, "proxy_uids", "must not be empty: OSM tells the proxy by its user"),
        (
            sidecar && no_uids && no_gids,
            "proxy_uids",
            "must not be empty when proxy_gids is: nothing else tells the proxy from the workload",
        ),
        (
            !settings.proxy_gids.is_empty() && !sidecar,
            "proxy_gids",
            "is possible in the sidecar profile only: OSM tells the proxy by its user, ambient by its mark",
        ),
        (
            settings.loopback_cidr != LOOPBACK && !sidecar,
            "loopback_cidr",
            "is possible in the sidecar profile only",
        ),
        (
            !outbound.include_gids.is_empty() && !sidecar,
            "outbound.include_gids",
            "is possible in the sidecar profile only",
        ),
        (
            !outbound.include_gids.is_empty() && !outbound.exclude_gids.is_empty(),
            "outbound.exclude_gids",
            "cannot be given together with include_gids, which excludes every other group",
        ),
        (
            inbound.include_ports.is_some() && !inbound.exclude_ports.is_empty(),
            "inbound.exclude_ports",
            "only has a meaning when every port is included: drop it, or include_ports",
        ),
        (
            !settings.virtual_interfaces.is_empty() && osm,
            "virtual_interfaces",
            "is not possible in the osm profile",
        ),
        (settings.dns == Dns::Capture && osm, "dns", "OSM captures no DNS: must be off"),
        (
            !settings.dns_servers.is_empty() && settings.dns == Dns::Off,
            "dns_servers",
            "has a meaning with dns: capture only",
        ),
    ];
    for (_, path, reason) in wrong.into_iter().filter(|(is_wrong, ..)| *is_wrong) {
        match path.split_once('.') {
            Some((inner, key)) => section.key(inner).key(key).problem(reason),
            None => section.key(path).problem(reason),
        }
    }
}

pub(super) fn cidr(text: &str) -> Result<IpNet, String> {
    refuse_wildcards(text)?;
    crate::cidr::parse(text).ok_or_else(|| {
        "must be an address or a CIDR, such as 10.0.0.0/8, 10.1.2.3 or fd00::/8".to_owned()
    })
}

pub(super) fn port_range(text: &str) -> Result<PortRange, String> {
    refuse_wildcards(text)?;
    text.parse().map_err(|error: PortRangeError| error.to_string())
}

fn refuse_wildcards(text: &str) -> Result<(), String> {
    if matches!(text, "*" | "none") {
        return Err("is possible only in outbound.include_cidrs and inbound.include_ports, alone"
            .to_owned());
    }
    Ok(())
}

/// The name of an interface, by the rules of the kernel (`dev_valid_name` in `net/core/dev.c`), without what iptables and
/// nft would read as a pattern or as the end of the name.
fn interface(text: &str) -> Result<String, String> {
    let refused = |c: char| {
        c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '\'' | '"' | '`' | '\\')
    };
    if text == "lo" {
        return Err("must not be lo: the proxy's own connections go through it".to_owned());
    }
    if text.contains(['+', '*']) {
        return Err(
            "must be the whole name of an interface: wildcards are not supported".to_owned()
        );
    }
    let fits = (1..=MAX_INTERFACE_BYTES).contains(&text.len());
    if !fits || matches!(text, "." | "..") || text.contains(refused) {
        return Err(
            "must be the name of an interface: 1 to 15 characters, no '/', ':', quotes or spaces"
                .to_owned(),
        );
    }
    Ok(text.to_owned())
}

fn uid(text: &str) -> Result<u32, String> {
    id(text).ok_or_else(|| "must be a number; `id -u NAME` tells it".to_owned())
}

fn gid(text: &str) -> Result<u32, String> {
    id(text).ok_or_else(|| "must be a number; `getent group NAME` tells it".to_owned())
}

fn id(text: &str) -> Option<u32> {
    number(text).filter(|id| *id != NO_ID)
}

fn server(text: &str) -> Result<IpAddr, String> {
    let address = text.parse::<IpAddr>().map(|address| address.to_canonical());
    address.map_err(|_| "must be the address of a DNS server, such as 10.96.0.10".to_owned())
}

fn loopback(cursor: Cursor<'_>) -> Ipv4Net {
    let Some(text) = cursor.text() else {
        return LOOPBACK;
    };
    match crate::cidr::parse(text.trim()) {
        Some(IpNet::V4(net)) if net.addr().is_loopback() && net.prefix_len() >= 8 => net,
        _ => {
            cursor.problem("must be an IPv4 CIDR inside 127.0.0.0/8, such as 127.0.0.1/32");
            LOOPBACK
        }
    }
}

/// Digits alone: `parse` would take "+80".
fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok().filter(|_| text.bytes().all(|c| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests;
