//! From a document to [`Settings`]: every key, its type and its default stand here and nowhere else.
//!
//! `docs/settings.md` explains them to operators, and a test keeps the two the same.

mod access;
mod identity;
mod interception;
mod limits;

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::document::Origin;
use crate::read::Cursor;
use crate::settings::{
    LogFilter, LogFormat, Logging, MtlsSettings, Profile, ProxySettings, Settings, WorkloadSettings,
};
use crate::{SpiffeId, TrustDomain};

/// Every key that a setting can have, and so every environment variable and `--set` path.
pub const KEYS: &[&str] = &[
    "workload.name",
    "workload.namespace",
    "workload.serviceAccount",
    "workload.trustDomain",
    "workload.network",
    "mesh.file",
    "identity.certificate",
    "identity.key",
    "identity.roots",
    "identity.local_ca",
    "identity.istio_ca.address",
    "identity.istio_ca.server_name",
    "identity.istio_ca.roots",
    "identity.istio_ca.token",
    "identity.istio_ca.cluster_id",
    "identity.istio_ca.impersonate",
    "identity.spire.socket",
    "identity.ttl",
    "trust.aliases",
    "trust.bundles",
    "trust.crls",
    "trust.ciphers",
    "interception.profile",
    "interception.backend",
    "interception.exact",
    "interception.install",
    "interception.repair",
    "interception.ipv6",
    "interception.on_exit",
    "interception.allow_host",
    "interception.outbound.exclude_cidrs",
    "interception.outbound.include_cidrs",
    "interception.outbound.exclude_ports",
    "interception.outbound.include_ports",
    "interception.outbound.exclude_interfaces",
    "interception.outbound.exclude_uids",
    "interception.outbound.exclude_gids",
    "interception.outbound.include_gids",
    "interception.inbound.mode",
    "interception.inbound.include_ports",
    "interception.inbound.exclude_ports",
    "interception.inbound.exclude_interfaces",
    "interception.virtual_interfaces",
    "interception.proxy_uids",
    "interception.proxy_gids",
    "interception.dns",
    "interception.dns_servers",
    "interception.drop_invalid",
    "interception.ingress",
    "interception.kubelet_probes",
    "interception.loopback_cidr",
    "proxy.outbound_port",
    "proxy.inbound_port",
    "proxy.hbone_port",
    "proxy.dns_port",
    "proxy.workers",
    "proxy.mtls",
    "proxy.mtls_overrides",
    "egress",
    "egress_exceptions.cidrs",
    "egress_exceptions.ports",
    "tunnels.max_age",
    "tunnels.streams",
    "tunnels.per_peer",
    "limits.connections_per_worker",
    "limits.connections_per_source",
    "limits.accepts_per_second",
    "limits.handshakes",
    "limits.handshakes_per_source",
    "limits.tunnels_per_source",
    "limits.tunnels_per_identity",
    "limits.buffers",
    "timeouts.connect",
    "timeouts.handshake",
    "timeouts.frame",
    "timeouts.reply",
    "timeouts.idle",
    "timeouts.half_close",
    "timeouts.keepalive",
    "timeouts.drain",
    "timeouts.handover_drain",
    "timeouts.pool_idle",
    "timeouts.tunnel_idle",
    "timeouts.ejection",
    "take_over.socket",
    "metrics.address",
    "metrics.label_sets",
    "metrics.idle",
    "readiness.address",
    "logging.filter",
    "logging.format",
];

/// Keys of the published contract whose feature does not exist yet: refused by name instead of called unknown.
const NOT_YET: &[&str] = &["mesh.xds", "admin"];

/// Whether the value of `key` is a list: in a flag or a variable, brackets make it YAML.
pub(crate) fn is_list(key: &str) -> bool {
    [access::LISTS, identity::LISTS, interception::LISTS].iter().any(|lists| lists.contains(&key))
}

/// Reads every setting; `folder` is where relative paths of the file begin.
pub(crate) fn settings(root: Cursor<'_>, folder: &Path) -> Option<Settings> {
    refuse_unknown_keys(root, "");
    let files = Files { folder };
    let workload = workload(root.key("workload"));
    let mesh = root.key("mesh");
    let mesh_file = files.path(mesh.key("file"));
    let identity_section = root.key("identity");
    let identity = identity::identity(identity_section, files);
    let own = workload.as_ref().map(|workload| &workload.trust_domain);
    let trust = identity::trust(root.key("trust"), files, own);
    let interception = interception::settings(root.key("interception"));
    let section = root.key("proxy");
    let mtls = access::mtls(section, identity_section.is_given());
    let proxy = proxy(section, interception.profile, mtls);
    let egress = access::egress(root);
    let metrics = address(root.key("metrics"), 15020);
    let readiness = address(root.key("readiness"), 15021);
    if let Some(proxy) = &proxy {
        refuse_shared_ports(root, proxy, metrics, readiness);
    }
    Some(Settings {
        mesh_file,
        identity,
        trust,
        interception,
        egress,
        tunnels: identity::tunnels(root.key("tunnels")),
        limits: limits::limits(root.key("limits")),
        timeouts: limits::timeouts(root.key("timeouts")),
        take_over: limits::take_over(root.key("take_over"), files),
        metrics,
        series: limits::series(root.key("metrics")),
        readiness,
        logging: logging(root.key("logging")),
        workload: workload?,
        proxy: proxy?,
    })
}

/// Checks every key below `at`, whose path is `prefix` (empty, or ending with a dot), against [`KEYS`] and [`NOT_YET`].
fn refuse_unknown_keys(at: Cursor<'_>, prefix: &str) {
    let mut known: Vec<&str> = Vec::new();
    for path in KEYS.iter().chain(NOT_YET).filter_map(|path| path.strip_prefix(prefix)) {
        let key = path.split('.').next().unwrap_or(path);
        if !known.contains(&key) {
            known.push(key);
        }
    }
    at.only(&known);
    for key in known {
        let path = format!("{prefix}{key}");
        if NOT_YET.contains(&path.as_str()) {
            at.key(key).not_yet();
        } else if !KEYS.contains(&path.as_str()) {
            refuse_unknown_keys(at.key(key), &format!("{path}."));
        }
    }
}

fn workload(section: Cursor<'_>) -> Option<WorkloadSettings> {
    let text = |key: &str, default: &str| section.key(key).text().unwrap_or(default).to_owned();
    let (namespace, service_account) =
        (text("namespace", "default"), text("serviceAccount", "default"));
    let trust_domain: TrustDomain = match section.key("trustDomain") {
        given if given.is_given() => given.parse_explained()?,
        _ => "cluster.local".parse().ok()?,
    };
    let spiffe_id = SpiffeId::istio(trust_domain.clone(), &namespace, &service_account)
        .map_err(|error| {
            section
                .problem(format!("namespace and serviceAccount make no SPIFFE identity: {error}"))
        })
        .ok()?;
    // A workload is called by its service account until it is told its name.
    let name = text("name", &service_account);
    let network = network(section.key("network"))?;
    Some(WorkloadSettings { name, namespace, service_account, trust_domain, network, spiffe_id })
}

/// The mesh file writes an address as `network/address`.
fn network(cursor: Cursor<'_>) -> Option<String> {
    let name = cursor.text().unwrap_or_default();
    if name.contains('/') {
        cursor.problem("must be the name of a network, without '/'");
        return None;
    }
    Some(name.to_owned())
}

fn proxy(section: Cursor<'_>, profile: Profile, mtls: MtlsSettings) -> Option<ProxySettings> {
    let port = |key: &str, default: u16| section.key(key).port().unwrap_or(default);
    // OSM's sidecar listens where Istio's does not.
    let inbound_port = if profile == Profile::Osm { 15003 } else { 15006 };
    let settings = ProxySettings {
        outbound_port: port("outbound_port", 15001),
        inbound_port: port("inbound_port", inbound_port),
        hbone_port: port("hbone_port", 15008),
        dns_port: port("dns_port", 15053),
        workers: workers(section.key("workers")),
        mtls,
    };
    let ProxySettings { outbound_port, inbound_port, hbone_port, dns_port, .. } = settings;
    if BTreeSet::from([outbound_port, inbound_port, hbone_port, dns_port]).len() < 4 {
        section.problem("outbound_port, inbound_port, hbone_port and dns_port must differ");
        return None;
    }
    Some(settings)
}

fn workers(cursor: Cursor<'_>) -> Option<usize> {
    if cursor.text()? == "auto" {
        return None;
    }
    cursor.number(1..=1024, "auto or a number of threads, 1 to 1024")
}

fn address(section: Cursor<'_>, port: u16) -> SocketAddr {
    section
        .key("address")
        .parse("an address with its port, such as 127.0.0.1:15020 or \"[::]:15020\"")
        .unwrap_or_else(|| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
}

/// Each of the two needs a port of its own, or an address on which nothing else has it.
fn refuse_shared_ports(
    root: Cursor<'_>,
    proxy: &ProxySettings,
    metrics: SocketAddr,
    readiness: SocketAddr,
) {
    let taken = [
        (proxy.outbound_port, "proxy.outbound_port"),
        (proxy.inbound_port, "proxy.inbound_port"),
        (proxy.hbone_port, "proxy.hbone_port"),
    ];
    for (section, address) in [("metrics", metrics), ("readiness", readiness)] {
        let other = taken.iter().find(|(port, _)| *port == address.port());
        if let Some((port, key)) = other {
            root.key(section).key("address").problem(format!("port {port} is that of {key}"));
        }
    }
    let any = metrics.ip().is_unspecified() || readiness.ip().is_unspecified();
    let same_place = any || metrics.ip() == readiness.ip();
    if metrics.port() != 0 && metrics.port() == readiness.port() && same_place {
        let reason = format!("port {} is that of metrics.address", metrics.port());
        root.key("readiness").key("address").problem(reason);
    }
}

fn logging(section: Cursor<'_>) -> Logging {
    let formats = [("plain", LogFormat::Plain), ("json", LogFormat::Json)];
    Logging {
        filter: log_filter(section.key("filter")),
        format: section.key("format").one_of(&formats).unwrap_or(LogFormat::Plain),
    }
}

fn log_filter(cursor: Cursor<'_>) -> LogFilter {
    match cursor.text().map(str::parse) {
        Some(Ok(filter)) => filter,
        Some(Err(error)) => {
            cursor.problem(format!("must be like info or info,access=off: {error}"));
            LogFilter::default()
        }
        None => LogFilter::default(),
    }
}

/// Resolves paths: those in the file are relative to its folder, those in the environment and flags to where we stand.
#[derive(Debug, Clone, Copy)]
struct Files<'a> {
    folder: &'a Path,
}

impl Files<'_> {
    fn path(self, cursor: Cursor<'_>) -> Option<PathBuf> {
        let text = cursor.text()?;
        if text.is_empty() {
            cursor.problem("must be the path of a file");
            return None;
        }
        Some(self.resolve(cursor, text))
    }

    /// A path that is part of what was written at `cursor`.
    fn resolve(self, cursor: Cursor<'_>, path: &str) -> PathBuf {
        let in_file =
            cursor.node().is_some_and(|node| matches!(node.origin, Origin::Document { .. }));
        if in_file { self.folder.join(path) } else { PathBuf::from(path) }
    }
}
