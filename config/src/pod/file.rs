//! Parses the file of one pod, in the folder `node.pods.directory`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::error::ConfigErrors;
use crate::pod::dns::{DnsPolicy, MAX_NAME_SERVERS, PodDns, is_local_server};
use crate::pod::overlay::InterceptionOverlay;
use crate::pod::uid::PodUid;
use crate::settings::declare::name_server;
use crate::settings::load::read_text;
use crate::yaml::read::{Cursor, Problems};

const KEYS: &[&str] =
    &["uid", "netns", "workload", "ips", "labels", "annotations", "interception", "dns"];
const WORKLOAD_KEYS: &[&str] = &["name", "namespace", "serviceAccount"];
const DNS_KEYS: &[&str] = &["nameservers", "search", "options"];

/// One pod, described by a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFile {
    /// The uid, unique in the folder.
    pub uid: PodUid,
    /// The absolute path of the file of the pod's network namespace.
    pub netns: PathBuf,
    /// The name of the pod's workload.
    pub name: String,
    /// The namespace of the pod's workload.
    pub namespace: String,
    /// The service account in the pod's identity.
    pub service_account: String,
    /// The pod's addresses, at least one.
    pub ips: Vec<IpAddr>,
    /// The pod's labels.
    pub labels: BTreeMap<String, String>,
    /// The pod's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The pod's own interception settings.
    pub interception: Option<InterceptionOverlay>,
    /// The pod's own resolver settings.
    pub dns: PodDns,
}

impl PodFile {
    /// Parses the text of a file. Errors contain `name`.
    ///
    /// [`Settings::with_interception`] checks the values of `interception` together with the
    /// node's.
    ///
    /// # Errors
    /// All mistakes in the text.
    ///
    /// [`Settings::with_interception`]: crate::Settings::with_interception
    pub fn parse(name: &str, text: &str) -> Result<Self, ConfigErrors> {
        let root = read_text(name, text)?;
        let problems = Problems::default();
        let file = read(Cursor::root(&root, &problems));
        problems.or_else(file)
    }
}

fn read(root: Cursor<'_>) -> Option<PodFile> {
    root.only(KEYS);
    let workload = root.key("workload");
    workload.only(WORKLOAD_KEYS);
    let uid = needed(root.key("uid")).and_then(|_| root.key("uid").parse_explained());
    let netns = netns(root.key("netns"));
    let [name, namespace, service_account] =
        ["name", "namespace", "serviceAccount"].map(|key| text(workload.key(key)));
    let ips = ips(root.key("ips"));
    let labels = texts(root.key("labels"));
    let annotations = texts(root.key("annotations"));
    let interception = root.key("interception").node().cloned().map(InterceptionOverlay::new);
    let dns = dns(root.key("dns"));
    Some(PodFile {
        uid: uid?,
        netns: netns?,
        name: name?,
        namespace: namespace?,
        service_account: service_account?,
        ips: ips?,
        labels,
        annotations,
        interception,
        dns,
    })
}

fn needed(cursor: Cursor<'_>) -> Option<Cursor<'_>> {
    cursor.given_or("is missing")
}

fn text(cursor: Cursor<'_>) -> Option<String> {
    let text = needed(cursor)?.text()?;
    if text.is_empty() {
        cursor.problem("must not be empty");
        return None;
    }
    Some(text.to_owned())
}

fn netns(cursor: Cursor<'_>) -> Option<PathBuf> {
    let path = PathBuf::from(text(cursor)?);
    if !path.is_absolute() {
        cursor.problem("must be the absolute path of a network namespace, such as /run/netns/a");
        return None;
    }
    Some(path)
}

/// Reads the addresses. Without one, the pod's namespace could not be distinguished from another
/// pod's.
fn ips(cursor: Cursor<'_>) -> Option<Vec<IpAddr>> {
    let address = |text: &str| {
        let address = text.parse::<IpAddr>();
        address.map_err(|_| "must be an address of the pod, such as 10.0.0.1 or fd00::1".to_owned())
    };
    let ips = needed(cursor)?.list(address);
    if cursor.is_empty_list() {
        cursor.problem("must not be empty: the pod's addresses identify its network namespace");
        return None;
    }
    Some(ips)
}

/// Reads the settings that the pod has instead of those of the node.
fn dns(cursor: Cursor<'_>) -> PodDns {
    if !cursor.is_given() {
        return PodDns::default();
    }
    cursor.only(DNS_KEYS);
    let servers = cursor.key("nameservers");
    let nameservers = needed(servers).map(|servers| servers.list(name_server)).unwrap_or_default();
    if servers.is_empty_list() || nameservers.len() > MAX_NAME_SERVERS {
        servers.problem("must be 1 to 3 servers");
    }
    if nameservers.iter().copied().any(is_local_server) {
        servers.problem(
            "must not be loopback addresses: the queries of a local resolver are captured",
        );
    }
    let words = |key: &str| cursor.key(key).list(word);
    let (search, options) = (words("search"), words("options"));
    PodDns { policy: DnsPolicy::None, nameservers, search, options }
}

fn word(text: &str) -> Result<String, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("must be a word of resolv.conf".to_owned());
    }
    Ok(text.to_owned())
}

fn texts(cursor: Cursor<'_>) -> BTreeMap<String, String> {
    // An empty value may be null or "".
    let value = |key: &str, cursor: Cursor<'_>| {
        let value = if cursor.is_given() { cursor.text()? } else { "" };
        Some((key.to_owned(), value.to_owned()))
    };
    cursor.each(value).into_iter().collect()
}

#[cfg(test)]
mod tests;
