//! The settings `interception`, and the contradictions between them.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

use crate::settings::declare::{
    CIDRS, Declared, Document, FLAG, Fallback, Files, Kind, NAME_SERVERS, PORTS, Written, cidr,
    given_included, given_list, included, list, port_range, settings, word,
};
use crate::settings::{
    Backend, Dns, InboundCapture, InboundMode, InterceptionSettings, Ipv6, KubeletProbes, OnExit,
    OutboundCapture, PortRange, PortRangeError, Profile,
};
use crate::yaml::read::Cursor;

/// The user and group of Istio's sidecar.
const ISTIO_PROXY: u32 = 1337;
/// The user of OSM's sidecar.
const OSM_PROXY: u32 = 1500;
/// IFNAMSIZ without its final NUL (`include/uapi/linux/if.h`).
const MAX_INTERFACE_BYTES: usize = 15;
/// (uid_t)-1 means "no user" to the kernel.
const NO_ID: u32 = u32::MAX;

const LOOPBACK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 32);

settings! {
    /// the mesh whose rules are imitated: `ambient` and `sidecar`: Istio's; `osm`: Open Service
    /// Mesh's; `none`: another program installs the rules, and client addresses are not kept
    PROFILE: Profile = "interception.profile", word("`ambient`, `sidecar`, `osm`, `none`"),
        Fallback::Is(|| Profile::Ambient), |s| Some(s.interception.profile);
    /// the tool that installs the rules: `nftables` (over netlink), `iptables` (its nft variant),
    /// `iptables-legacy`; `auto`: nftables, or iptables (preferably legacy) if the kernel lacks it
    BACKEND: Backend = "interception.backend",
        word("`auto`, `nftables`, `iptables`, `iptables-legacy`"),
        Fallback::Is(|| Backend::Auto), |s| Some(s.interception.backend);
    /// `true`: only the rules of Istio or OSM, without the additional safety rules of underpass
    EXACT: bool = "interception.exact", FLAG,
        Fallback::Is(|| false), |s| Some(s.interception.exact);
    /// `false`: `underpass rules install` installs the rules before (in an init container); `run`
    /// then neither installs, repairs nor removes rules, and needs no privilege for them
    INSTALL: bool = "interception.install", FLAG,
        Fallback::Is(|| true), |s| Some(s.interception.install);
    /// whether the proxy restores rules that another program changed, and applies changed settings;
    /// with `false` and `on_exit: keep`, the proxy keeps no capability in `sidecar` and `osm`
    REPAIR: bool = "interception.repair", FLAG,
        Fallback::Is(|| true), |s| Some(s.interception.repair);
    /// `capture`: like IPv4, even if IPv6 is enabled later; `reject`: refused, so that clients use
    /// IPv4; `bypass`: neither captured nor encrypted
    IPV6: Ipv6 = "interception.ipv6", word("`capture`, `reject`, `bypass`"),
        Fallback::Is(|| Ipv6::Capture), |s| Some(s.interception.ipv6);
    /// `keep`: the rules stay, so without a proxy connections are refused (fail closed); `remove`:
    /// traffic is then direct and in plaintext (fail open)
    ON_EXIT: OnExit = "interception.on_exit", word("`keep`, `remove`"),
        Fallback::Is(|| OnExit::Keep), |s| Some(s.interception.on_exit);
    /// whether rules may be installed in the host's own network namespace
    ALLOW_HOST: bool = "interception.allow_host", FLAG,
        Fallback::Is(|| false), |s| Some(s.interception.allow_host);
    /// connections to these addresses are not captured
    EXCLUDE_CIDRS: Vec<IpNet> = "interception.outbound.exclude_cidrs", CIDRS,
        Fallback::Is(Vec::new), |s| Some(s.interception.outbound.exclude_cidrs.clone());
    /// only connections to these addresses, and those to `include_ports`, are captured
    INCLUDE_CIDRS: Option<Vec<IpNet>> = "interception.outbound.include_cidrs",
        included("list of CIDRs, `*`, `none`", |cursor, _| given_included(cursor, cidr)),
        Fallback::Varies("`\"*\"`: all; `none` if `include_ports` is given"),
        |s| Some(s.interception.outbound.include_cidrs.clone());
    /// connections to these ports are not captured
    EXCLUDE_PORTS: Vec<PortRange> = "interception.outbound.exclude_ports", PORTS,
        Fallback::Is(Vec::new), |s| Some(s.interception.outbound.exclude_ports.clone());
    /// connections to these ports are captured, to any address; without `include_cidrs`: only these
    INCLUDE_PORTS: Vec<PortRange> = "interception.outbound.include_ports", PORTS,
        Fallback::Is(Vec::new), |s| Some(s.interception.outbound.include_ports.clone());
    /// connections that leave through these interfaces are not captured
    EXCLUDE_INTERFACES: Vec<String> = "interception.outbound.exclude_interfaces", INTERFACES,
        Fallback::Is(Vec::new), |s| Some(s.interception.outbound.exclude_interfaces.clone());
    /// connections of these users are not captured
    EXCLUDE_UIDS: Vec<u32> = "interception.outbound.exclude_uids", UIDS,
        Fallback::Is(Vec::new), |s| Some(s.interception.outbound.exclude_uids.clone());
    /// connections of these groups are not captured
    EXCLUDE_GIDS: Vec<u32> = "interception.outbound.exclude_gids", GIDS,
        Fallback::Is(Vec::new), |s| Some(s.interception.outbound.exclude_gids.clone());
    /// only connections of these groups are captured (`sidecar`; not with `exclude_gids`)
    INCLUDE_GIDS: Vec<u32> = "interception.outbound.include_gids", GIDS,
        Fallback::Called(Vec::new, "all"), |s| Some(s.interception.outbound.include_gids.clone());
    /// `redirect`: the destination is rewritten; `tproxy`: the destination is kept, and the
    /// application can see the client's address (`sidecar`)
    INBOUND_MODE: InboundMode = "interception.inbound.mode", word("`redirect`, `tproxy`"),
        Fallback::Is(InboundMode::default), |s| Some(s.interception.inbound.mode);
    /// only plaintext connections to these ports are captured; `none`: to no port
    INBOUND_PORTS: Option<Vec<PortRange>> = "interception.inbound.include_ports",
        included("list of ports, `*`, `none`", |cursor, _| given_included(cursor, port_range)),
        Fallback::Called(|| None, "`\"*\"`: all"),
        |s| Some(s.interception.inbound.include_ports.clone());
    /// connections to these ports are not captured (only if all ports are included)
    INBOUND_EXCLUDE_PORTS: Vec<PortRange> = "interception.inbound.exclude_ports", PORTS,
        Fallback::Is(Vec::new), |s| Some(s.interception.inbound.exclude_ports.clone());
    /// connections that arrive through these interfaces are not captured
    INBOUND_EXCLUDE_INTERFACES: Vec<String> = "interception.inbound.exclude_interfaces", INTERFACES,
        Fallback::Is(Vec::new), |s| Some(s.interception.inbound.exclude_interfaces.clone());
    /// interfaces of VMs and nested containers: connections that arrive there are treated as
    /// outbound (not `osm`)
    VIRTUAL_INTERFACES: Vec<String> = "interception.virtual_interfaces", INTERFACES,
        Fallback::Is(Vec::new), |s| Some(s.interception.virtual_interfaces.clone());
    /// the users of the proxy, whose connections are never captured
    PROXY_UIDS: Vec<u32> = "interception.proxy_uids", UIDS,
        Fallback::Varies("`sidecar` 1337, `osm` 1500"), |s| Some(s.interception.proxy_uids.clone());
    /// the groups of the proxy, whose connections are never captured (`sidecar`); not empty if
    /// `proxy_uids` is empty
    PROXY_GIDS: Vec<u32> = "interception.proxy_gids", GIDS,
        Fallback::Varies("`sidecar` 1337"), |s| Some(s.interception.proxy_gids.clone());
    /// `capture`: DNS queries are redirected to `proxy.dns_port` (not `osm`)
    DNS: Dns = "interception.dns", word("`off`, `capture`"),
        Fallback::Is(|| Dns::Off), |s| Some(s.interception.dns);
    /// with `dns: capture`: only queries to these servers are captured
    DNS_SERVERS: Vec<IpAddr> = "interception.dns_servers",
        NAME_SERVERS,
        Fallback::Called(Vec::new, "all"), |s| Some(s.interception.dns_servers.clone());
    /// drop packets that belong to no connection (conntrack's `INVALID`), which could otherwise
    /// reset one
    DROP_INVALID: bool = "interception.drop_invalid", FLAG,
        Fallback::Is(|| false), |s| Some(s.interception.drop_invalid);
    /// the workload is an ingress gateway: inbound plaintext connections are not captured
    /// (`ambient`)
    INGRESS: bool = "interception.ingress", FLAG,
        Fallback::Is(|| false), |s| Some(s.interception.ingress);
    /// connections from 169.254.7.127 and fd16:9254:7127:1337:ffff:ffff:ffff:ffff that bypass the
    /// proxy, and so mTLS and policies: `off`: none; `on`: to every port; ports and ranges: to
    /// these (`ambient`). Only for a node whose agent rewrites the source of the kubelet's probes
    /// to these addresses: see [interception.md](interception.md#kubelet-probes)
    KUBELET_PROBES: KubeletProbes = "interception.kubelet_probes", PROBES,
        Fallback::Varies("`off`; with `exact` or `node.probes: translate`: `on`"),
        |s| Some(s.interception.kubelet_probes.clone());
    /// the application's connections to these loopback addresses are not captured; inside
    /// 127.0.0.0/8 (`sidecar`)
    LOOPBACK_CIDR: Ipv4Net = "interception.loopback_cidr", LOOPBACK_NET,
        Fallback::Is(|| LOOPBACK), |s| Some(s.interception.loopback_cidr);
}

const INTERFACES: Kind<Vec<String>> =
    list("list of interfaces", |cursor, _| given_list(cursor, interface));
const UIDS: Kind<Vec<u32>> = list("list of user ids", |cursor, _| given_list(cursor, uid));
const GIDS: Kind<Vec<u32>> = list("list of group ids", |cursor, _| given_list(cursor, gid));
const LOOPBACK_NET: Kind<Ipv4Net> =
    Kind { name: "CIDR", is_list: false, read: loopback, write: |net| Written::scalar(net) };
const PROBES: Kind<KubeletProbes> = Kind {
    name: "`off`, `on`, list of ports",
    is_list: true,
    read: probes,
    write: |probes| match probes {
        KubeletProbes::Ports(ports) => Written::list(ports),
        word => Written::scalar(word),
    },
};

/// Parses the whole section. Reports each mistake at its key; the result is then unusable.
pub(super) fn settings(document: Document<'_>) -> Option<InterceptionSettings> {
    // After a mistake in the profile, contradictions cannot be determined.
    let profile = PROFILE.read_sound(document).unwrap_or(Profile::None);
    let (uids, gids): (&[u32], &[u32]) = match profile {
        Profile::Sidecar => (&[ISTIO_PROXY], &[ISTIO_PROXY]),
        Profile::Osm => (&[OSM_PROXY], &[]),
        Profile::Ambient | Profile::None => (&[], &[]),
    };
    let exact = EXACT.read(document)?;
    let settings = InterceptionSettings {
        profile,
        backend: BACKEND.read(document)?,
        exact,
        install: INSTALL.read(document)?,
        repair: REPAIR.read(document)?,
        ipv6: IPV6.read(document)?,
        on_exit: ON_EXIT.read(document)?,
        allow_host: ALLOW_HOST.read(document)?,
        outbound: outbound(document)?,
        inbound: inbound(document)?,
        virtual_interfaces: VIRTUAL_INTERFACES.read(document)?,
        proxy_uids: PROXY_UIDS.read(document).unwrap_or_else(|| uids.to_vec()),
        proxy_gids: PROXY_GIDS.read(document).unwrap_or_else(|| gids.to_vec()),
        dns: DNS.read(document)?,
        dns_servers: DNS_SERVERS.read(document)?,
        drop_invalid: DROP_INVALID.read(document)?,
        ingress: INGRESS.read(document)?,
        kubelet_probes: kubelet_probes(document, profile, exact),
        loopback_cidr: LOOPBACK_CIDR.read(document)?,
    };
    // Without rules, these settings have no effect and cannot contradict each other.
    if profile != Profile::None {
        refuse_contradictions(document, &settings);
    }
    Some(settings)
}

fn kubelet_probes(document: Document<'_>, profile: Profile, exact: bool) -> KubeletProbes {
    // Istio's rules always exempt probes, and `exact` installs no others.
    let is_always_on = exact && profile == Profile::Ambient;
    let default = if is_always_on { KubeletProbes::On } else { KubeletProbes::Off };
    let probes = KUBELET_PROBES.read(document).unwrap_or(default);
    let problem = |reason| KUBELET_PROBES.problem(document, reason);
    if KUBELET_PROBES.is_empty_list(document) {
        problem("must be off, on, or a list of ports");
    } else if probes != KubeletProbes::On && is_always_on {
        problem("is always on with exact: Istio's rules exempt probes to every port");
    } else if probes != KubeletProbes::Off && matches!(profile, Profile::Sidecar | Profile::Osm) {
        problem("is possible in the ambient profile only");
    }
    probes
}

fn probes(cursor: Cursor<'_>, _: Files<'_>) -> Option<KubeletProbes> {
    match () {
        () if cursor.is_word("off") => Some(KubeletProbes::Off),
        () if cursor.is_word("on") => Some(KubeletProbes::On),
        () => given_list(cursor, probe_port).map(KubeletProbes::Ports),
    }
}

fn probe_port(text: &str) -> Result<PortRange, String> {
    text.parse().map_err(|error: PortRangeError| format!("must be off, on, or ports: {error}"))
}

fn outbound(document: Document<'_>) -> Option<OutboundCapture> {
    let include_ports = INCLUDE_PORTS.read(document)?;
    // Included ports without CIDRs mean only these ports.
    let only_ports = (!include_ports.is_empty()).then(Vec::new);
    Some(OutboundCapture {
        include_cidrs: INCLUDE_CIDRS.read(document).unwrap_or(only_ports),
        exclude_cidrs: EXCLUDE_CIDRS.read(document)?,
        exclude_ports: EXCLUDE_PORTS.read(document)?,
        include_ports,
        exclude_interfaces: EXCLUDE_INTERFACES.read(document)?,
        exclude_uids: EXCLUDE_UIDS.read(document)?,
        exclude_gids: EXCLUDE_GIDS.read(document)?,
        include_gids: INCLUDE_GIDS.read(document)?,
    })
}

fn inbound(document: Document<'_>) -> Option<InboundCapture> {
    Some(InboundCapture {
        mode: INBOUND_MODE.read(document)?,
        include_ports: INBOUND_PORTS.read(document)?,
        exclude_ports: INBOUND_EXCLUDE_PORTS.read(document)?,
        exclude_interfaces: INBOUND_EXCLUDE_INTERFACES.read(document)?,
    })
}

/// Reports settings that are valid alone but contradict each other.
fn refuse_contradictions(document: Document<'_>, settings: &InterceptionSettings) {
    let InterceptionSettings { profile, outbound, inbound, .. } = settings;
    let is_ambient = *profile == Profile::Ambient;
    let is_sidecar = *profile == Profile::Sidecar;
    let is_osm = *profile == Profile::Osm;
    let has_no_uids = PROXY_UIDS.is_empty_list(document);
    let has_no_gids = PROXY_GIDS.is_empty_list(document);
    let wrong: [(bool, &dyn Declared, &str); 13] = [
        (
            inbound.mode == InboundMode::Tproxy && !is_sidecar,
            &INBOUND_MODE,
            "tproxy is possible in the sidecar profile only",
        ),
        (settings.ingress && !is_ambient, &INGRESS, "is possible in the ambient profile only"),
        (
            !settings.proxy_uids.is_empty() && is_ambient,
            &PROXY_UIDS,
            "is possible in the profiles sidecar and osm only: ambient identifies the proxy by its mark",
        ),
        (
            is_osm && has_no_uids,
            &PROXY_UIDS,
            "must not be empty: OSM identifies the proxy by its user",
        ),
        (
            is_sidecar && has_no_uids && has_no_gids,
            &PROXY_UIDS,
            "must not be empty if proxy_gids is empty: nothing else identifies the proxy",
        ),
        (
            !settings.proxy_gids.is_empty() && !is_sidecar,
            &PROXY_GIDS,
            "is possible in the sidecar profile only: OSM identifies the proxy by its user, ambient by its mark",
        ),
        (
            settings.loopback_cidr != LOOPBACK && !is_sidecar,
            &LOOPBACK_CIDR,
            "is possible in the sidecar profile only",
        ),
        (
            !outbound.include_gids.is_empty() && !is_sidecar,
            &INCLUDE_GIDS,
            "is possible in the sidecar profile only",
        ),
        (
            !outbound.include_gids.is_empty() && !outbound.exclude_gids.is_empty(),
            &EXCLUDE_GIDS,
            "cannot be given together with include_gids, which excludes every other group",
        ),
        (
            inbound.include_ports.is_some() && !inbound.exclude_ports.is_empty(),
            &INBOUND_EXCLUDE_PORTS,
            "has an effect only if every port is included: remove it, or include_ports",
        ),
        (
            !settings.virtual_interfaces.is_empty() && is_osm,
            &VIRTUAL_INTERFACES,
            "is not possible in the osm profile",
        ),
        (settings.dns == Dns::Capture && is_osm, &DNS, "must be off: OSM captures no DNS"),
        (
            !settings.dns_servers.is_empty() && settings.dns == Dns::Off,
            &DNS_SERVERS,
            "has an effect only with dns: capture",
        ),
    ];
    for (_, setting, reason) in wrong.into_iter().filter(|(is_wrong, ..)| *is_wrong) {
        setting.problem(document, reason);
    }
}

/// Parses the name of an interface according to the kernel (`dev_valid_name` in `net/core/dev.c`).
/// Rejects characters that iptables and nft read as a pattern or as the end of the name.
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
    id(text).ok_or_else(|| "must be a number, as `id -u NAME` prints it".to_owned())
}

fn gid(text: &str) -> Result<u32, String> {
    id(text).ok_or_else(|| "must be a number, as `getent group NAME` prints it".to_owned())
}

fn id(text: &str) -> Option<u32> {
    number(text).filter(|id| *id != NO_ID)
}

fn loopback(cursor: Cursor<'_>, _: Files<'_>) -> Option<Ipv4Net> {
    match crate::cidr::parse(cursor.text()?.trim()) {
        Some(IpNet::V4(net)) if net.addr().is_loopback() && net.prefix_len() >= 8 => Some(net),
        _ => {
            cursor.problem("must be an IPv4 CIDR inside 127.0.0.0/8, such as 127.0.0.1/32");
            None
        }
    }
}

/// Parses digits only. The standard parser would accept "+80".
fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok().filter(|_| text.bytes().all(|c| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests;
