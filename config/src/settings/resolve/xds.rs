//! The settings `mesh.xds`: the control plane that serves the mesh.

use std::path::PathBuf;
use std::time::Duration;

use super::identity::{CLUSTER, HOST, HTTPS};
use crate::settings::declare::{
    DURATION_OR_OFF, Declared as _, Document, FLAG, Fallback, PATH, TEXT, given_list, list,
    settings,
};
use crate::settings::{NodeSettings, Settings, WorkloadSettings, XdsHeader, XdsSettings};

settings! {
    /// `https://HOST:PORT` of a control plane that serves the mesh (istiod): [mesh.md](mesh.md),
    /// "A control plane"
    ADDRESS: String = "mesh.xds.address", HTTPS,
        Fallback::Varies("none"), |s| s.xds.as_ref().map(|xds| xds.address.clone());
    /// the name in the control plane's certificate
    SERVER_NAME: String = "mesh.xds.server_name", HOST,
        Fallback::Varies("the host of `address`"),
        |s| s.xds.as_ref().and_then(|xds| xds.server_name.clone());
    /// PEM: the roots that verify the control plane's certificate; read for every connection
    ROOTS: PathBuf = "mesh.xds.roots", PATH,
        Fallback::Varies("with `address`"), |s| s.xds.as_ref().map(|xds| xds.roots.clone());
    /// the file with the token that authenticates this client; read for every connection
    TOKEN: PathBuf = "mesh.xds.token", PATH,
        Fallback::Varies("none"), |s| s.xds.as_ref().and_then(|xds| xds.token.clone());
    /// PEM: a client certificate and its chain; read for every connection
    CERTIFICATE: PathBuf = "mesh.xds.certificate", PATH,
        Fallback::Varies("none"), |s| client_of(s).map(|(certificate, _)| certificate.clone());
    /// PEM: the private key of `certificate`
    KEY: PathBuf = "mesh.xds.key", PATH,
        Fallback::Varies("with `certificate`"), |s| client_of(s).map(|(_, key)| key.clone());
    /// the name of this cluster at the control plane
    CLUSTER_ID: String = "mesh.xds.cluster_id", CLUSTER,
        Fallback::Is(|| "Kubernetes".to_owned()),
        |s| s.xds.as_ref().map(|xds| xds.cluster_id.clone());
    /// further headers of the request, each as `NAME=VALUE`
    HEADERS: Vec<XdsHeader> = "mesh.xds.headers",
        list("list of `NAME=VALUE`", |cursor, _| given_list(cursor, header)),
        Fallback::Is(Vec::new), |s| s.xds.as_ref().map(|xds| xds.headers.clone());
    /// ask only for the addresses that connections need, when they need them: [mesh.md](mesh.md),
    /// "A control plane"
    ON_DEMAND: bool = "mesh.xds.on_demand", FLAG,
        Fallback::Is(|| false), |s| s.xds.as_ref().map(|xds| xds.on_demand);
    /// the time without a stream to the control plane after which the proxy is not ready, although
    /// the last mesh stays in effect
    UNREADY_AFTER: Option<Duration> = "mesh.xds.unready_after", DURATION_OR_OFF,
        Fallback::Is(|| None), |s| s.xds.as_ref().map(|xds| xds.unready_after);
    /// the name of this client, such as that of its pod
    NAME: String = "mesh.xds.name", TEXT,
        Fallback::Varies("`workload.name`"), |s| s.xds.as_ref().map(|xds| xds.name.clone());
    /// the namespace of this client: istiod requires that of the token's service account
    NAMESPACE: String = "mesh.xds.namespace", TEXT,
        Fallback::Varies("`workload.namespace`"),
        |s| s.xds.as_ref().map(|xds| xds.namespace.clone());
}

/// Parses `mesh.xds`. Returns `None` if it is absent, or after a mistake in it.
pub(super) fn xds(document: Document<'_>, own: &WorkloadSettings) -> Option<XdsSettings> {
    const NEEDED: &str = "is needed to ask a control plane";
    if !document.root.key("mesh").key("xds").is_given() {
        return None;
    }
    let address = ADDRESS.needed(document, NEEDED);
    let roots = ROOTS.needed(document, NEEDED);
    let client = match (CERTIFICATE.given(document), KEY.given(document)) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        (Some(_), None) => {
            KEY.problem(document, "is needed with `certificate`");
            None
        }
        (None, Some(_)) => {
            CERTIFICATE.problem(document, "is needed with `key`");
            None
        }
    };
    Some(XdsSettings {
        server_name: SERVER_NAME.given(document),
        token: TOKEN.given(document),
        client,
        cluster_id: CLUSTER_ID.read(document)?,
        headers: HEADERS.read(document)?,
        on_demand: ON_DEMAND.read(document)?,
        unready_after: UNREADY_AFTER.read(document)?,
        name: NAME.given(document).unwrap_or_else(|| own.name.clone()),
        namespace: NAMESPACE.given(document).unwrap_or_else(|| own.namespace.clone()),
        address: address?,
        roots: roots?,
    })
}

/// Rejects lookups on demand on a node without a name: the control plane would not send the
/// workloads of its pods.
pub(super) fn check_node(document: Document<'_>, xds: &XdsSettings, node: &NodeSettings) {
    if xds.on_demand && node.pods.is_some() && node.name.is_none() {
        ON_DEMAND.problem(document, "needs node.name with node.pods");
    }
}

fn client_of(settings: &Settings) -> Option<&(PathBuf, PathBuf)> {
    settings.xds.as_ref()?.client.as_ref()
}

/// Parses `NAME=VALUE`, where the name is valid in HTTP/2 (RFC 9113 section 8.2) and the value is
/// visible ASCII.
fn header(text: &str) -> Result<XdsHeader, String> {
    let (name, value) = text.split_once('=').unwrap_or_default();
    let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let reserved = ["authorization", "clusterid", "te", "content-type"];
    if name.is_empty() || !name.bytes().all(allowed) || reserved.contains(&name) {
        return Err("must be NAME=VALUE, such as x-revision=canary".to_owned());
    }
    if !value.bytes().all(|c| c == b' ' || c.is_ascii_graphic()) {
        return Err("must have a value of visible ASCII".to_owned());
    }
    Ok(XdsHeader { name: name.to_owned(), value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::settings::load::Sources;
    use crate::settings::{Settings, XdsHeader};

    fn load(flags: &[&str]) -> Result<Settings, String> {
        load_with(flags, &[])
    }

    /// The settings of a node without a name.
    fn load_node(flags: &[&str]) -> Result<Settings, String> {
        load_with(flags, &["node.pods.directory=/run/pods", "identity.local_ca=/ca"])
    }

    fn load_with(flags: &[&str], more: &[&str]) -> Result<Settings, String> {
        let flags = flags.iter().map(|flag| format!("mesh.xds.{flag}"));
        let flags = flags.chain(more.iter().map(|&flag| flag.to_owned())).collect();
        let sources = Sources { file: None, environment: Vec::new(), flags };
        sources.load().map_err(|errors| errors.to_string())
    }

    const NEEDED: [&str; 2] = ["address=https://istiod:15012", "roots=roots.pem"];

    #[test]
    fn reads_every_setting_with_defaults() {
        let xds = load(&NEEDED).unwrap().xds.unwrap();
        assert_eq!(
            (&*xds.cluster_id, &*xds.name, &*xds.namespace),
            ("Kubernetes", "default", "default")
        );
        assert_eq!((xds.token, xds.client, xds.server_name), (None, None, None));
        assert!(!xds.on_demand && xds.unready_after.is_none());
        let more = [
            "headers=a=b,c-d=e f",
            "certificate=c",
            "key=k",
            "token=t",
            "name=z",
            "namespace=n",
            "on_demand=true",
            "unready_after=5m",
        ];
        let xds = load(&[&NEEDED[..], &more].concat()).unwrap().xds.unwrap();
        let header = |name: &str, value: &str| XdsHeader { name: name.into(), value: value.into() };
        assert_eq!(xds.headers, [header("a", "b"), header("c-d", "e f")]);
        assert_eq!(xds.client, Some(("c".into(), "k".into())));
        assert!(xds.on_demand);
        assert_eq!(xds.unready_after, Some(Duration::from_secs(300)));
        assert_eq!((xds.token, &*xds.name, &*xds.namespace), (Some("t".into()), "z", "n"));
        assert_eq!(load(&[]).unwrap().xds, None);
    }

    #[test]
    fn rejects_incomplete_section_and_reserved_headers() {
        for (flags, reason) in [
            (&["token=t"][..], "mesh.xds.address: is needed"),
            (
                &["address=http://a:1", "roots=r"],
                "mesh.xds.address: \"http://a:1\": must be https://HOST:PORT",
            ),
            (&[NEEDED[0], NEEDED[1], "key=k"], "mesh.xds.certificate: is needed with `key`"),
            (&[NEEDED[0], NEEDED[1], "on_demand=true"], "needs node.name with node.pods"),
            (&[NEEDED[0], NEEDED[1], "certificate=c"], "mesh.xds.key: is needed"),
            (&[NEEDED[0], NEEDED[1], "headers=authorization=x"], "must be NAME=VALUE"),
            (&[NEEDED[0], NEEDED[1], "headers=A=x"], "must be NAME=VALUE"),
        ] {
            let errors = load_node(flags).unwrap_err();
            assert!(errors.contains(reason), "{errors}");
        }
    }
}
