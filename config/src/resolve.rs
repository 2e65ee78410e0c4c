//! From a document to [`Settings`]: every key, its type and its default stand here and nowhere else.
//!
//! `docs/settings.md` explains them to operators, and a test keeps the two the same.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::document::Origin;
use crate::read::Cursor;
use crate::settings::{
    IdentityFiles, InterceptionSettings, Ipv6, LogFormat, Logging, OnExit, Profile, ProxySettings,
    Settings, Timeouts, WorkloadSettings,
};
use crate::{SpiffeId, TrustDomain};

/// Every key that a setting can have, and so every environment variable and `--set` path.
pub const KEYS: &[&str] = &[
    "workload.name",
    "workload.namespace",
    "workload.serviceAccount",
    "workload.trustDomain",
    "mesh.file",
    "identity.certificate",
    "identity.key",
    "identity.roots",
    "interception.profile",
    "interception.ipv6",
    "interception.on_exit",
    "interception.allow_host",
    "proxy.outbound_port",
    "proxy.inbound_port",
    "proxy.hbone_port",
    "proxy.workers",
    "timeouts.connect",
    "timeouts.handshake",
    "timeouts.reply",
    "timeouts.drain",
    "timeouts.pool_idle",
    "metrics.address",
    "readiness.address",
    "logging.filter",
    "logging.format",
];

/// Keys of the published contract whose feature does not exist yet: refused by name instead of called unknown.
const NOT_YET: &[&str] = &[
    "mesh.xds",
    "identity.local_ca",
    "interception.backend",
    "interception.outbound",
    "interception.inbound",
    "interception.virtual_interfaces",
    "interception.dns",
    "proxy.mtls",
    "egress",
    "admin",
];

/// Reads every setting; `folder` is where relative paths of the file begin.
pub(crate) fn settings(root: Cursor<'_>, folder: &Path) -> Option<Settings> {
    refuse_unknown_keys(root);
    let files = Files { folder };
    let workload = workload(root.key("workload"));
    let mesh = root.key("mesh");
    let mesh_file = files.path(mesh.key("file"));
    let proxy = proxy(root.key("proxy"));
    Some(Settings {
        mesh_file,
        identity: identity(root.key("identity"), files),
        interception: interception(root.key("interception")),
        timeouts: timeouts(root.key("timeouts")),
        metrics: address(root.key("metrics"), 15020),
        readiness: address(root.key("readiness"), 15021),
        logging: logging(root.key("logging")),
        workload: workload?,
        proxy: proxy?,
    })
}

/// Checks the keys of every section against [`KEYS`] and [`NOT_YET`].
fn refuse_unknown_keys(root: Cursor<'_>) {
    let mut sections: Vec<&str> = Vec::new();
    for key in KEYS.iter().chain(NOT_YET) {
        let section = key.split('.').next().unwrap_or(key);
        if !sections.contains(&section) {
            sections.push(section);
        }
    }
    root.only(&sections);
    for section in sections {
        let cursor = root.key(section);
        if NOT_YET.contains(&section) {
            cursor.not_yet();
            continue;
        }
        let in_section = |key: &&'static str| key.split_once('.').filter(|(s, _)| *s == section);
        let known: Vec<&str> =
            KEYS.iter().chain(NOT_YET).filter_map(&in_section).map(|(_, k)| k).collect();
        cursor.only(&known);
        NOT_YET.iter().filter_map(in_section).for_each(|(_, key)| cursor.key(key).not_yet());
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
    Some(WorkloadSettings { name, namespace, service_account, trust_domain, spiffe_id })
}

fn identity(section: Cursor<'_>, files: Files<'_>) -> Option<IdentityFiles> {
    if !section.is_given() {
        return None;
    }
    let path = |key: &str| {
        let cursor = section.key(key);
        let path = files.path(cursor);
        if path.is_none() {
            cursor.problem("is needed: certificate, key and roots go together");
        }
        path
    };
    let (certificate, key, roots) = (path("certificate"), path("key"), path("roots"));
    Some(IdentityFiles { certificate: certificate?, key: key?, roots: roots? })
}

fn interception(section: Cursor<'_>) -> InterceptionSettings {
    let profiles = [("ambient", Some(Profile::Ambient)), ("none", Some(Profile::None))];
    let later = [("sidecar", None), ("osm", None)];
    let profile = section.key("profile").one_of(&[profiles, later].concat());
    if profile == Some(None) {
        section.key("profile").problem("not supported yet; there are ambient and none");
    }
    let families =
        [("capture", Some(Ipv6::Capture)), ("bypass", Some(Ipv6::Bypass)), ("reject", None)];
    let ipv6 = section.key("ipv6").one_of(&families);
    if ipv6 == Some(None) {
        section.key("ipv6").problem("not supported yet; there are capture and bypass");
    }
    let on_exit =
        section.key("on_exit").one_of(&[("keep", OnExit::Keep), ("remove", OnExit::Remove)]);
    InterceptionSettings {
        profile: profile.flatten().unwrap_or(Profile::Ambient),
        ipv6: ipv6.flatten().unwrap_or(Ipv6::Capture),
        on_exit: on_exit.unwrap_or(OnExit::Keep),
        allow_host: section.key("allow_host").parse("true or false").unwrap_or(false),
    }
}

fn proxy(section: Cursor<'_>) -> Option<ProxySettings> {
    let port = |key: &str, default: u16| section.key(key).port().unwrap_or(default);
    let settings = ProxySettings {
        outbound_port: port("outbound_port", 15001),
        inbound_port: port("inbound_port", 15006),
        hbone_port: port("hbone_port", 15008),
        workers: workers(section.key("workers")),
    };
    let ProxySettings { outbound_port, inbound_port, hbone_port, .. } = settings;
    if outbound_port == inbound_port || inbound_port == hbone_port || outbound_port == hbone_port {
        section.problem("outbound_port, inbound_port and hbone_port must differ");
        return None;
    }
    Some(settings)
}

fn workers(cursor: Cursor<'_>) -> Option<usize> {
    if cursor.text()? == "auto" {
        return None;
    }
    let workers: usize = cursor.parse("auto or a number of threads, 1 to 1024")?;
    if !(1..=1024).contains(&workers) {
        cursor.problem("must be auto or a number of threads, 1 to 1024");
    }
    Some(workers)
}

fn timeouts(section: Cursor<'_>) -> Timeouts {
    let seconds = |key: &str, default| {
        section.key(key).duration().unwrap_or_else(|| Duration::from_secs(default))
    };
    Timeouts {
        // As long as ztunnel waits; a SYN is sent four times in it (after 1, 3 and 7 s).
        connect: seconds("connect", 10),
        handshake: seconds("handshake", 10),
        // The peer answers after it has connected to its application, so it must outlast the peer's own connect deadline.
        reply: seconds("reply", 15),
        // Kubernetes gives a pod 30 s by default; this leaves most of it to the application.
        drain: seconds("drain", 5),
        pool_idle: seconds("pool_idle", 300),
    }
}

fn address(section: Cursor<'_>, port: u16) -> SocketAddr {
    section
        .key("address")
        .parse("an address with its port, such as 127.0.0.1:15020 or \"[::]:15020\"")
        .unwrap_or_else(|| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
}

fn logging(section: Cursor<'_>) -> Logging {
    let formats = [("plain", LogFormat::Plain), ("json", LogFormat::Json)];
    Logging {
        filter: section.key("filter").text().unwrap_or("info").to_owned(),
        format: section.key("format").one_of(&formats).unwrap_or(LogFormat::Plain),
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
        let in_file = matches!(cursor.node()?.origin, Origin::Document { .. });
        Some(if in_file { self.folder.join(text) } else { PathBuf::from(text) })
    }
}
