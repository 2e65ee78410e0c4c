//! The settings `identity` and `trust`. The hbone crate checks the files.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Reason;
use crate::identity::spiffe::TrustDomain;
use crate::settings::declare::{
    DURATION, Declared, Document, FLAG, Fallback, Files, Kind, PATH, Setting, TEXT, Written,
    given_list, list, parsed, settings,
};
use crate::settings::{
    BundleFile, Cipher, IdentityFiles, IdentitySettings, IstioCaSettings, LocalCaSettings,
    Settings, SpireApi, SpireSettings, TrustSettings,
};
use crate::yaml::read::Cursor;

/// As in Istio. Certificates are renewed after half of this time, so that an outage of the CA
/// overnight is harmless.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// X.509 and Istio's CA protocol express validity in whole seconds (RFC 5280 section 4.1.2.5).
const MIN_TTL: Duration = Duration::from_secs(1);

settings! {
    /// PEM: the leaf certificate, then the chain below the root
    CERTIFICATE: PathBuf = "identity.certificate", PATH,
        Fallback::Varies("none: HBONE is off"),
        |s| files_of(s).map(|files| files.certificate.clone());
    /// PEM: the private key of the leaf certificate
    KEY: PathBuf = "identity.key", PATH,
        Fallback::Varies("with `certificate`"), |s| files_of(s).map(|files| files.key.clone());
    /// PEM: the roots that verify peers
    ROOTS: PathBuf = "identity.roots", PATH,
        Fallback::Varies("with `certificate`"), |s| files_of(s).map(|files| files.roots.clone());
    /// a folder created by `underpass ca init`: the proxy issues its own certificates
    LOCAL_CA: PathBuf = "identity.local_ca", PATH,
        Fallback::Varies("none"), |s| local_ca_of(s).map(|ca| ca.dir.clone());
    /// `https://HOST:PORT` of istiod or `underpass ca serve`, which issues the certificates
    CA_ADDRESS: String = "identity.istio_ca.address", HTTPS,
        Fallback::Varies("none"), |s| istio_ca_of(s).map(|ca| ca.address.clone());
    /// the name in the CA server's certificate
    CA_SERVER_NAME: String = "identity.istio_ca.server_name", HOST,
        Fallback::Varies("the host of `address`"),
        |s| istio_ca_of(s).and_then(|ca| ca.server_name.clone());
    /// PEM: the roots that verify the CA server's certificate
    CA_ROOTS: PathBuf = "identity.istio_ca.roots", PATH,
        Fallback::Varies("with `address`"), |s| istio_ca_of(s).map(|ca| ca.roots.clone());
    /// the file with the token that authenticates requests to the CA; read for every request
    CA_TOKEN: PathBuf = "identity.istio_ca.token", PATH,
        Fallback::Varies("with `address`"), |s| istio_ca_of(s).map(|ca| ca.token.clone());
    /// the name of this cluster at the CA
    CLUSTER_ID: String = "identity.istio_ca.cluster_id", CLUSTER,
        Fallback::Is(|| "Kubernetes".to_owned()),
        |s| istio_ca_of(s).map(|ca| ca.cluster_id.clone());
    /// `true`: the token belongs to a node, and the proxy requests certificates for its pods
    IMPERSONATE: bool = "identity.istio_ca.impersonate", FLAG,
        Fallback::Is(|| false), |s| istio_ca_of(s).map(|ca| ca.impersonate);
    /// the Unix socket of a SPIRE agent, which issues the certificates: a path, or `unix:///PATH`
    SPIRE_SOCKET: PathBuf = "identity.spire.socket", SOCKET,
        Fallback::Varies("none"), |s| spire_socket_of(s, SpireApi::Workload);
    /// for `underpass node`: the admin socket of a SPIRE agent, whose Delegated Identity API issues
    /// the pods' certificates
    SPIRE_ADMIN_SOCKET: PathBuf = "identity.spire.admin_socket", SOCKET,
        Fallback::Varies("none"), |s| spire_socket_of(s, SpireApi::DelegatedIdentity);
    /// with `local_ca` and `istio_ca`: the lifetime of a certificate (a CA may choose another); it
    /// is renewed after half of it
    TTL: Duration = "identity.ttl", LIFETIME, Fallback::Is(|| DEFAULT_TTL), ttl_of;
    /// aliases of the own trust domain: its roots verify these too
    ALIASES: Vec<TrustDomain> = "trust.aliases",
        list("list of trust domains", |cursor, _| given_list(cursor, parsed)),
        Fallback::Is(Vec::new), |s| Some(s.trust.aliases.clone());
    /// federation: the roots of other trust domains, each as `TRUSTDOMAIN=FILE` (PEM)
    BUNDLES: Vec<BundleFile> = "trust.bundles", list("list of `TRUSTDOMAIN=FILE`", bundles),
        Fallback::Is(Vec::new), |s| Some(s.trust.bundles.clone());
    /// files of certificate revocation lists (PEM); with any, a certificate whose issuer has no
    /// list is refused
    CRLS: Vec<PathBuf> = "trust.crls", PATHS,
        Fallback::Is(Vec::new), |s| Some(s.trust.crls.clone());
    /// the ciphers of tunnels, the preferred one first; `aes-256-gcm` alone for regulations that
    /// require 256 bits: peers without it are refused
    CIPHERS: Vec<Cipher> = "trust.ciphers", list("list of ciphers", ciphers),
        Fallback::Is(|| Cipher::ALL.to_vec()), |s| Some(s.trust.ciphers.clone());
}

pub(super) const HTTPS: Kind<String> =
    Kind { name: "`https://HOST:PORT`", read: https_address, ..TEXT };
pub(super) const HOST: Kind<String> = Kind { name: "host name", read: server_name, ..TEXT };
/// A header carries the value: only visible ASCII is portable (RFC 9110 section 5.5).
pub(super) const CLUSTER: Kind<String> = Kind { read: cluster_id, ..TEXT };
const SOCKET: Kind<PathBuf> = Kind { read: socket, ..PATH };
const LIFETIME: Kind<Duration> = Kind { read: ttl, ..DURATION };
const PATHS: Kind<Vec<PathBuf>> = Kind {
    name: "list of paths",
    is_list: true,
    read: |cursor, files| {
        given_list(cursor, |text| match text {
            "" => Err("must be the path of a file".to_owned()),
            text => Ok(files.resolve(cursor, text)),
        })
    },
    write: |paths| Written::List(paths.iter().map(|path| path.display().to_string()).collect()),
};

type Read = fn(Document<'_>) -> Option<IdentitySettings>;

/// Every source of a certificate: its name for messages, the keys that select it, and its parser.
const SOURCES: &[(&str, &[&str], Read)] = &[
    ("certificate, key and roots", &["certificate", "key", "roots"], identity_files),
    ("local_ca", &["local_ca"], local_ca),
    ("istio_ca", &["istio_ca"], istio_ca),
    ("spire", &["spire"], spire),
];

/// Parses `identity`. Returns `None` if it is absent, or after a mistake in it.
pub(super) fn identity(document: Document<'_>) -> Option<IdentitySettings> {
    let section = document.root.key("identity");
    if !section.is_given() {
        return None;
    }
    let is_chosen = |keys: &[&str]| keys.iter().any(|key| section.key(key).is_given());
    let chosen: Vec<_> = SOURCES.iter().filter(|(_, keys, _)| is_chosen(keys)).collect();
    match chosen.as_slice() {
        [(_, _, read)] => read(document),
        [] => {
            section.problem(
                "needs a source: certificate, key and roots, or one of local_ca, istio_ca and spire",
            );
            None
        }
        several => {
            let names: Vec<_> = several.iter().map(|(name, ..)| *name).collect();
            let reason = format!("has more than one source ({})", names.join("; "));
            section.problem(Reason::with_hint(reason, "keep one"));
            None
        }
    }
}

fn identity_files(document: Document<'_>) -> Option<IdentitySettings> {
    reject_ttl(document, "the certificate is issued elsewhere");
    let needed = |setting: &Setting<PathBuf>| {
        setting.needed(document, "is needed: certificate, key and roots go together")
    };
    let (certificate, key, roots) = (needed(&CERTIFICATE), needed(&KEY), needed(&ROOTS));
    let files = IdentityFiles { certificate: certificate?, key: key?, roots: roots? };
    Some(IdentitySettings::Files(files))
}

fn local_ca(document: Document<'_>) -> Option<IdentitySettings> {
    let dir = LOCAL_CA.given(document);
    let settings = LocalCaSettings { ttl: TTL.read(document)?, dir: dir? };
    Some(IdentitySettings::LocalCa(settings))
}

fn istio_ca(document: Document<'_>) -> Option<IdentitySettings> {
    const NEEDED: &str = "is needed to ask Istio's CA";
    let address = CA_ADDRESS.needed(document, NEEDED);
    let (roots, token) = (CA_ROOTS.needed(document, NEEDED), CA_TOKEN.needed(document, NEEDED));
    let settings = IstioCaSettings {
        server_name: CA_SERVER_NAME.given(document),
        cluster_id: CLUSTER_ID.read(document)?,
        impersonate: IMPERSONATE.read(document)?,
        ttl: TTL.read(document)?,
        address: address?,
        roots: roots?,
        token: token?,
    };
    Some(IdentitySettings::IstioCa(settings))
}

fn spire(document: Document<'_>) -> Option<IdentitySettings> {
    reject_ttl(document, "SPIRE decides it");
    let is_delegate = SPIRE_ADMIN_SOCKET.is_given(document);
    if is_delegate && SPIRE_SOCKET.is_given(document) {
        let reason = "cannot be used with socket: admin_socket is for `underpass node`, socket for `underpass run`";
        SPIRE_ADMIN_SOCKET.problem(document, reason);
        return None;
    }
    let (api, setting) = match is_delegate {
        true => (SpireApi::DelegatedIdentity, &SPIRE_ADMIN_SOCKET),
        false => (SpireApi::Workload, &SPIRE_SOCKET),
    };
    let socket = setting.needed(document, "is needed to ask the SPIRE agent")?;
    Some(IdentitySettings::Spire(SpireSettings { api, socket }))
}

fn reject_ttl(document: Document<'_>, why: &str) {
    if TTL.is_given(document) {
        let reason = format!("has an effect only with local_ca and istio_ca: here {why}");
        TTL.problem(document, &reason);
    }
}

fn files_of(settings: &Settings) -> Option<&IdentityFiles> {
    match &settings.identity {
        Some(IdentitySettings::Files(files)) => Some(files),
        _ => None,
    }
}

fn local_ca_of(settings: &Settings) -> Option<&LocalCaSettings> {
    match &settings.identity {
        Some(IdentitySettings::LocalCa(ca)) => Some(ca),
        _ => None,
    }
}

fn istio_ca_of(settings: &Settings) -> Option<&IstioCaSettings> {
    match &settings.identity {
        Some(IdentitySettings::IstioCa(ca)) => Some(ca),
        _ => None,
    }
}

fn spire_socket_of(settings: &Settings, api: SpireApi) -> Option<PathBuf> {
    match &settings.identity {
        Some(IdentitySettings::Spire(spire)) if spire.api == api => Some(spire.socket.clone()),
        _ => None,
    }
}

fn ttl_of(settings: &Settings) -> Option<Duration> {
    local_ca_of(settings).map(|ca| ca.ttl).or_else(|| istio_ca_of(settings).map(|ca| ca.ttl))
}

/// Parses `trust`; `own` is our own trust domain, if it is known.
pub(super) fn trust(document: Document<'_>, own: Option<&TrustDomain>) -> Option<TrustSettings> {
    let settings = TrustSettings {
        aliases: ALIASES.read(document)?,
        bundles: BUNDLES.read(document)?,
        crls: CRLS.read(document)?,
        ciphers: CIPHERS.read(document)?,
    };
    let refuse = |reason: String| BUNDLES.problem(document, &reason);
    let mut known = BTreeSet::new();
    for BundleFile { trust_domain, .. } in &settings.bundles {
        if own == Some(trust_domain) {
            refuse(format!(
                "{trust_domain} is our own trust domain: its roots come with the certificate"
            ));
        } else if settings.aliases.contains(trust_domain) {
            refuse(format!(
                "{trust_domain} is in trust.aliases too: either it has our roots, or its own"
            ));
        } else if !known.insert(trust_domain) {
            refuse(format!("{trust_domain} occurs twice: one file can contain several roots"));
        }
    }
    Some(settings)
}

fn ciphers(cursor: Cursor<'_>, _: Files<'_>) -> Option<Vec<Cipher>> {
    if cursor.is_empty_list() {
        cursor.problem("must have at least one cipher: aes-128-gcm, aes-256-gcm");
    }
    given_list(cursor, |text| {
        let named = Cipher::ALL.into_iter().find(|cipher| cipher.to_string() == text);
        named.ok_or_else(|| "must be aes-128-gcm or aes-256-gcm".to_owned())
    })
}

fn ttl(cursor: Cursor<'_>, _: Files<'_>) -> Option<Duration> {
    let ttl = cursor.duration()?;
    if ttl < MIN_TTL {
        cursor.problem("must be 1s or longer");
    }
    Some(ttl)
}

/// Parses the path of a Unix socket, or a URI as in SPIFFE_ENDPOINT_SOCKET, with an absolute path
/// and no host (SPIFFE Workload Endpoint section 4).
fn socket(cursor: Cursor<'_>, files: Files<'_>) -> Option<PathBuf> {
    let text = cursor.text()?;
    let socket = match text.strip_prefix("unix:") {
        Some(uri) => absolute(uri.strip_prefix("//").unwrap_or(uri)),
        None if text.is_empty() || text.contains("://") => None,
        None => Some(files.resolve(cursor, text)),
    };
    if socket.is_none() {
        cursor.problem("must be the path of a Unix socket, such as /run/spire/agent.sock");
    }
    socket
}

fn https_address(cursor: Cursor<'_>, _: Files<'_>) -> Option<String> {
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

fn server_name(cursor: Cursor<'_>, _: Files<'_>) -> Option<String> {
    let name = cursor.text()?;
    if !is_host(name) {
        cursor.problem(
            "must be the name in the server's certificate, such as istiod.istio-system.svc",
        );
    }
    Some(name.to_owned())
}

fn cluster_id(cursor: Cursor<'_>, _: Files<'_>) -> Option<String> {
    let id = cursor.text()?;
    if id.is_empty() || !id.bytes().all(|c| c.is_ascii_graphic()) {
        cursor.problem("must be the name of a cluster, without spaces, such as Kubernetes");
    }
    Some(id.to_owned())
}

/// Whether the text is a name, an IPv4 address, or an IPv6 address in brackets.
pub(super) fn is_host(text: &str) -> bool {
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

fn bundles(cursor: Cursor<'_>, files: Files<'_>) -> Option<Vec<BundleFile>> {
    given_list(cursor, |text| bundle(text, |file| files.resolve(cursor, file)))
}

/// Parses `TRUSTDOMAIN=FILE`.
fn bundle(text: &str, resolve: impl Fn(&str) -> PathBuf) -> Result<BundleFile, String> {
    match text.split_once('=') {
        Some((domain, file)) if !file.is_empty() => {
            Ok(BundleFile { trust_domain: parsed(domain)?, file: resolve(file) })
        }
        _ => Err("must be TRUSTDOMAIN=FILE, such as example.org=example-roots.pem".to_owned()),
    }
}

#[cfg(test)]
mod tests;
