//! From the sections `identity`, `trust` and `tunnels` to the settings of HBONE: their types, their defaults,
//! and what does not go together.
//!
//! Not here: which keys exist (`resolve.rs`), and whether a file is there and any good (the hbone crate).

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Files;
use crate::read::Cursor;
use crate::settings::{
    BundleFile, Cipher, IdentityFiles, IdentitySettings, IstioCaSettings, LocalCaSettings,
    SpireSettings, TrustSettings, TunnelSettings,
};
use crate::{SpiffeError, TrustDomain};

/// The keys whose values are lists, as in `interception.rs`.
pub(super) const LISTS: &[&str] =
    &["trust.aliases", "trust.bundles", "trust.crls", "trust.ciphers"];

/// As Istio's. It is renewed at half of it, so that a CA may be down overnight.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// Certificates know no fractions of a second (RFC 5280 section 4.1.2.5), nor does Istio's CA protocol.
const SHORTEST_TTL: Duration = Duration::from_secs(1);

type Read = fn(Cursor<'_>, Files<'_>) -> Option<IdentitySettings>;

/// Every source of a certificate: what to call it, the keys that choose it, and how it is read.
const SOURCES: &[(&str, &[&str], Read)] = &[
    ("certificate, key and roots", &["certificate", "key", "roots"], identity_files),
    ("local_ca", &["local_ca"], local_ca),
    ("istio_ca", &["istio_ca"], istio_ca),
    ("spire", &["spire"], spire),
];

/// Reads the section `identity`; `None` if there is none, or a mistake in it.
pub(super) fn identity(section: Cursor<'_>, files: Files<'_>) -> Option<IdentitySettings> {
    if !section.is_given() {
        return None;
    }
    let is_chosen = |keys: &[&str]| keys.iter().any(|key| section.key(key).is_given());
    let chosen: Vec<_> = SOURCES.iter().filter(|(_, keys, _)| is_chosen(keys)).collect();
    match chosen.as_slice() {
        [(_, _, read)] => read(section, files),
        [] => {
            section.problem(
                "needs a source: certificate, key and roots, or one of local_ca, istio_ca and spire",
            );
            None
        }
        several => {
            let names: Vec<_> = several.iter().map(|(name, ..)| *name).collect();
            section.problem(format!("has more than one source ({}): keep one", names.join("; ")));
            None
        }
    }
}

fn identity_files(section: Cursor<'_>, files: Files<'_>) -> Option<IdentitySettings> {
    refuse_ttl(section, "the certificate is issued by someone else");
    let path = |key: &str| {
        let reason = "is needed: certificate, key and roots go together";
        needed(section.key(key), reason).and_then(|cursor| files.path(cursor))
    };
    let (certificate, key, roots) = (path("certificate"), path("key"), path("roots"));
    let files = IdentityFiles { certificate: certificate?, key: key?, roots: roots? };
    Some(IdentitySettings::Files(files))
}

fn local_ca(section: Cursor<'_>, files: Files<'_>) -> Option<IdentitySettings> {
    let dir = files.path(section.key("local_ca"));
    let settings = LocalCaSettings { ttl: ttl(section), dir: dir? };
    Some(IdentitySettings::LocalCa(settings))
}

fn istio_ca(section: Cursor<'_>, files: Files<'_>) -> Option<IdentitySettings> {
    let ca = section.key("istio_ca");
    let path = |key: &str| {
        needed(ca.key(key), "is needed to ask Istio's CA").and_then(|cursor| files.path(cursor))
    };
    let address = needed(ca.key("address"), "is needed to ask Istio's CA").and_then(https_address);
    let (roots, token) = (path("roots"), path("token"));
    let settings = IstioCaSettings {
        server_name: server_name(ca.key("server_name")),
        cluster_id: cluster_id(ca.key("cluster_id")),
        impersonate: ca.key("impersonate").flag().unwrap_or(false),
        ttl: ttl(section),
        address: address?,
        roots: roots?,
        token: token?,
    };
    Some(IdentitySettings::IstioCa(settings))
}

fn spire(section: Cursor<'_>, files: Files<'_>) -> Option<IdentitySettings> {
    refuse_ttl(section, "SPIRE decides it");
    let spire = section.key("spire");
    let cursor = needed(spire.key("socket"), "is needed to ask the SPIRE agent")?;
    let text = cursor.text()?;
    // A URI, as SPIFFE_ENDPOINT_SOCKET has it (SPIFFE Workload Endpoint section 4), has an absolute path and no host.
    let socket = match text.strip_prefix("unix:") {
        Some(uri) => absolute(uri.strip_prefix("//").unwrap_or(uri)),
        None if text.is_empty() || text.contains("://") => None,
        None => Some(files.resolve(cursor, text)),
    };
    if socket.is_none() {
        cursor.problem("must be the path of a Unix socket, such as /run/spire/agent.sock");
    }
    Some(IdentitySettings::Spire(SpireSettings { socket: socket? }))
}

/// Reads the section `trust`; `own` is our own trust domain, if it is known.
pub(super) fn trust(
    section: Cursor<'_>,
    files: Files<'_>,
    own: Option<&TrustDomain>,
) -> TrustSettings {
    let (bundles, crls) = (section.key("bundles"), section.key("crls"));
    let settings = TrustSettings {
        aliases: section.key("aliases").list(trust_domain),
        bundles: bundles.list(|text| bundle(text, |file| files.resolve(bundles, file))),
        crls: crls.list(|text| match text {
            "" => Err("must be the path of a file".to_owned()),
            text => Ok(files.resolve(crls, text)),
        }),
        ciphers: ciphers(section.key("ciphers")),
    };
    let mut known = BTreeSet::new();
    for BundleFile { trust_domain, .. } in &settings.bundles {
        if own == Some(trust_domain) {
            bundles.problem(format!(
                "{trust_domain} is our own trust domain: its roots come with the certificate"
            ));
        } else if settings.aliases.contains(trust_domain) {
            bundles.problem(format!(
                "{trust_domain} is in trust.aliases too: either it has our roots, or its own"
            ));
        } else if !known.insert(trust_domain) {
            bundles
                .problem(format!("{trust_domain} is there twice: one file can hold several roots"));
        }
    }
    settings
}

fn ciphers(cursor: Cursor<'_>) -> Vec<Cipher> {
    if !cursor.is_given() {
        return Cipher::ALL.to_vec();
    }
    if cursor.is_empty_list() {
        cursor.problem("must have at least one cipher: aes-128-gcm, aes-256-gcm");
    }
    cursor.list(|text| {
        let named = Cipher::ALL.into_iter().find(|cipher| cipher.to_string() == text);
        named.ok_or_else(|| "must be aes-128-gcm or aes-256-gcm".to_owned())
    })
}

pub(super) fn tunnels(section: Cursor<'_>) -> TunnelSettings {
    let count = |key: &str, most: usize| {
        section.key(key).number(1..=most, &format!("a number, 1 to {most}"))
    };
    TunnelSettings {
        // Only a handshake shows what has changed: a peer that was renamed or moved to other roots is noticed within the
        // hour, and a handshake an hour costs nothing.
        max_age: section.key("max_age").duration().unwrap_or(Duration::from_secs(3600)),
        // As many as ztunnel opens at once in a tunnel, and it takes no more than 200.
        streams: count("streams", 10_000).unwrap_or(100),
        // One tunnel is served by one thread of the peer: four of them make use of four.
        per_peer: count("per_peer", 64).unwrap_or(4),
    }
}

/// `cursor`, if something is given there.
fn needed<'a>(cursor: Cursor<'a>, reason: &str) -> Option<Cursor<'a>> {
    if !cursor.is_given() {
        cursor.problem(reason);
    }
    cursor.is_given().then_some(cursor)
}

fn ttl(section: Cursor<'_>) -> Duration {
    let cursor = section.key("ttl");
    let ttl = cursor.duration().unwrap_or(DEFAULT_TTL);
    if ttl < SHORTEST_TTL {
        cursor.problem("must be 1s or longer");
    }
    ttl
}

fn refuse_ttl(section: Cursor<'_>, why: &str) {
    let cursor = section.key("ttl");
    if cursor.is_given() {
        cursor.problem(format!("has a meaning with local_ca and istio_ca only: here {why}"));
    }
}

fn https_address(cursor: Cursor<'_>) -> Option<String> {
    let text = cursor.text()?;
    let host_and_port = text.strip_prefix("https://").and_then(|rest| rest.rsplit_once(':'));
    let is_right = host_and_port.is_some_and(|(host, port)| {
        let digits = port.bytes().all(|c| c.is_ascii_digit());
        is_host(host) && digits && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if !is_right {
        cursor.problem("must be https://HOST:PORT, such as https://istiod.istio-system.svc:15012");
    }
    is_right.then(|| text.to_owned())
}

fn server_name(cursor: Cursor<'_>) -> Option<String> {
    let name = cursor.text()?;
    if !is_host(name) {
        cursor.problem(
            "must be the name in the server's certificate, such as istiod.istio-system.svc",
        );
    }
    Some(name.to_owned())
}

/// It is sent as a header, which carries visible ASCII without doubt (RFC 9110 section 5.5).
fn cluster_id(cursor: Cursor<'_>) -> String {
    let id = cursor.text().unwrap_or("Kubernetes");
    if id.is_empty() || !id.bytes().all(|c| c.is_ascii_graphic()) {
        cursor.problem("must be the name of a cluster, without spaces, such as Kubernetes");
    }
    id.to_owned()
}

/// A name, an IPv4 address, or an IPv6 address in brackets.
fn is_host(text: &str) -> bool {
    match text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => {
            let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_');
            !text.is_empty() && text.bytes().all(allowed)
        }
    }
}

fn absolute(path: &str) -> Option<PathBuf> {
    Path::new(path).has_root().then(|| PathBuf::from(path))
}

fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    text.parse().map_err(|error: SpiffeError| error.to_string())
}

/// Reads `TRUSTDOMAIN=FILE`.
fn bundle(text: &str, resolve: impl Fn(&str) -> PathBuf) -> Result<BundleFile, String> {
    match text.split_once('=') {
        Some((domain, file)) if !file.is_empty() => {
            Ok(BundleFile { trust_domain: trust_domain(domain)?, file: resolve(file) })
        }
        _ => Err("must be TRUSTDOMAIN=FILE, such as example.org=example-roots.pem".to_owned()),
    }
}

#[cfg(test)]
mod tests;
