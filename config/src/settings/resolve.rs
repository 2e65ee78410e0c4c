//! Parses a document into [`Settings`]. Each module declares the settings of its sections, and
//! rejects contradictions between them.

mod access;
mod dns;
mod identity;
mod interception;
mod limits;
mod node;
mod privileges;
mod proxy;
mod services;
mod telemetry;
mod timeouts;
mod tunnels;
mod workload;
mod xds;

use std::path::Path;

use crate::settings::declare::{Declared, Document, Files, Reference};
use crate::settings::{InputSettings, InterceptionSettings, NodeSettings, Settings};
use crate::yaml::read::Cursor;

/// Every setting, in the order of `config show` and of docs/settings.md.
const SETTINGS: &[&[&dyn Declared]] = &[
    workload::ALL,
    xds::ALL,
    node::ALL,
    privileges::ALL,
    identity::ALL,
    interception::ALL,
    proxy::ALL,
    access::ALL,
    dns::ALL,
    tunnels::ALL,
    limits::ALL,
    timeouts::ALL,
    services::ALL,
    telemetry::ALL,
];

/// Every setting.
pub(crate) fn declared() -> impl Iterator<Item = &'static dyn Declared> {
    SETTINGS.iter().copied().flatten().copied()
}

/// Every key of a setting. Environment variables and `--set` use the same keys.
pub fn keys() -> impl Iterator<Item = &'static str> {
    declared().map(Declared::key)
}

/// The documentation of every setting.
pub fn reference() -> impl Iterator<Item = Reference> {
    declared().map(Declared::reference)
}

/// Parses every setting. Relative paths in the file refer to `folder`.
pub(crate) fn settings(root: Cursor<'_>, folder: &Path) -> Option<Settings> {
    refuse_unknown_keys(root, "");
    let document = Document { root, files: Files { folder } };
    let workload = workload::workload(document);
    let mesh_file = workload::mesh_file(document);
    let xds = workload.as_ref().and_then(|workload| xds::xds(document, workload));
    let identity = identity::identity(document);
    let own = workload.as_ref().map(|workload| &workload.trust_domain);
    let trust = identity::trust(document, own)?;
    let interception = interception::settings(document)?;
    let node = node::node(document)?;
    xds.iter().for_each(|xds| xds::check_node(document, xds, &node));
    let interception = node::interception(document, interception, &node);
    let privileges = privileges::privileges(document, &node)?;
    if node.pods.is_some() {
        node::refuse_settings_of_one_pod(document);
        identity.iter().for_each(|identity| node::refuse_shared_identity(document, identity));
    } else {
        identity.iter().for_each(|identity| node::refuse_identities_of_pods(document, identity));
    }
    let mtls = access::mtls(document, root.key("identity").is_given())?;
    let proxy = proxy::proxy(document, interception.profile, mtls);
    let egress = access::egress(document)?;
    let addresses = services::addresses(document)?;
    let admin = services::admin(document, &node)?;
    if let Some(proxy) = &proxy {
        services::refuse_shared_ports(document, proxy, addresses, admin.address);
    }
    let [metrics, readiness] = addresses;
    let series = services::series(document)?;
    let (tunnels, limits) = (tunnels::tunnels(document)?, limits::limits(document)?);
    let (timeouts, take_over) = (timeouts::timeouts(document)?, timeouts::take_over(document)?);
    Some(Settings {
        node,
        privileges,
        mesh_file,
        xds,
        identity,
        trust,
        interception,
        egress,
        dns: dns::dns(document)?,
        tunnels,
        limits,
        timeouts,
        take_over,
        admin,
        metrics,
        series,
        readiness,
        logging: services::logging(document)?,
        otlp: telemetry::otlp(document),
        workload: workload?,
        proxy: proxy?,
    })
}

/// Parses the settings that name files, as far as they are valid.
pub(crate) fn inputs(root: Cursor<'_>, folder: &Path) -> InputSettings {
    let document = Document { root, files: Files { folder } };
    let workload = workload::workload(document);
    let own = workload.as_ref().map(|workload| &workload.trust_domain);
    InputSettings {
        mesh_file: workload::mesh_file(document),
        xds: workload.as_ref().and_then(|workload| xds::xds(document, workload)),
        identity: identity::identity(document),
        trust: identity::trust(document, own).unwrap_or_default(),
        serves_pods: node::node(document).is_some_and(|node| node.pods.is_some()),
        workload,
    }
}

/// Parses a document with only the section `interception`: that of a pod of `node`.
pub(crate) fn interception_settings(
    document: Document<'_>,
    node: &NodeSettings,
) -> Option<InterceptionSettings> {
    refuse_unknown_keys(document.root, "");
    let settings = interception::settings(document)?;
    Some(node::interception(document, settings, node))
}

/// Rejects every key below `at` that is not declared. `prefix` is the path of `at`: empty, or
/// ending with a dot.
fn refuse_unknown_keys(at: Cursor<'_>, prefix: &str) {
    let mut known: Vec<&str> = Vec::new();
    for path in keys().filter_map(|path| path.strip_prefix(prefix)) {
        let key = path.split('.').next().unwrap_or(path);
        if !known.contains(&key) {
            known.push(key);
        }
    }
    at.only(&known);
    for key in known {
        let path = format!("{prefix}{key}");
        if !keys().any(|known| known == path) {
            refuse_unknown_keys(at.key(key), &format!("{path}."));
        }
    }
}

#[cfg(test)]
mod tests;
