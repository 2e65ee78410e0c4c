//! Tests of valid and invalid settings of identity, trust and tunnels.

use super::*;
use crate::error::ConfigErrors;
use crate::settings::load::settings_of;
use crate::settings::{Settings, TunnelSettings};

fn read(text: &str) -> Result<Settings, ConfigErrors> {
    settings_of(text)
}

fn identity_of(section: &str) -> Result<IdentitySettings, ConfigErrors> {
    read(&format!("identity: {section}\n")).map(|settings| settings.identity.unwrap())
}

fn mistakes(text: &str) -> Vec<String> {
    let Err(errors) = read(text) else {
        return Vec::new();
    };
    errors.problems.into_iter().map(|p| format!("{}: {}", p.key, p.reason)).collect()
}

/// Asserts that `text` has exactly one mistake, at `key`.
fn assert_refused(text: &str, key: &str) {
    let found = mistakes(text);
    assert_eq!(found.len(), 1, "{text}: {found:?}");
    assert!(found[0].starts_with(&format!("{key}: ")), "{text}: {found:?}");
}

const ISTIO: &str = "address: 'https://istiod:15012', roots: r.pem, token: t";

#[test]
fn empty_document_gives_no_identity_and_no_extra_trust() {
    let settings = read("").unwrap();
    assert_eq!((settings.identity, settings.trust), (None, TrustSettings::default()));
    let TunnelSettings { max_age, streams, per_peer } = settings.tunnels;
    assert_eq!((max_age.as_secs(), streams, per_peer), (3600, 100, 4));
}

#[test]
fn parses_every_identity_source() {
    let files = identity_of("{certificate: c.pem, key: c.key, roots: r.pem}").unwrap();
    assert!(matches!(files, IdentitySettings::Files(_)), "{files:?}");

    let dir = PathBuf::from("ca");
    let local = IdentitySettings::LocalCa(LocalCaSettings { dir, ttl: Duration::from_secs(3600) });
    assert_eq!(identity_of("{local_ca: ca, ttl: 1h}").unwrap(), local);

    let istio = IstioCaSettings {
        address: "https://istiod:15012".to_owned(),
        server_name: None,
        roots: "r.pem".into(),
        token: "t".into(),
        cluster_id: "Kubernetes".to_owned(),
        impersonate: false,
        ttl: DEFAULT_TTL,
    };
    let read = identity_of(&format!("{{istio_ca: {{{ISTIO}}}}}")).unwrap();
    assert_eq!(read, IdentitySettings::IstioCa(istio.clone()));
    let more = "server_name: istiod.svc, cluster_id: east, impersonate: true";
    let read = identity_of(&format!("{{istio_ca: {{{ISTIO}, {more}}}, ttl: 90m}}")).unwrap();
    let expected = IstioCaSettings {
        server_name: Some("istiod.svc".to_owned()),
        cluster_id: "east".to_owned(),
        impersonate: true,
        ttl: Duration::from_secs(90 * 60),
        ..istio
    };
    assert_eq!(read, IdentitySettings::IstioCa(expected));
}

#[test]
fn rejects_several_identity_sources() {
    assert_eq!(
        mistakes("identity: {certificate: c.pem, local_ca: ca, ttl: 1h}\n"),
        ["identity: has more than one source (certificate, key and roots; local_ca)"]
    );
    assert_eq!(
        mistakes("identity: {istio_ca: {}, spire: {socket: s}, local_ca: ca}\n"),
        ["identity: has more than one source (local_ca; istio_ca; spire)"]
    );
    for none in ["{}", "{ttl: 1h}", "{certificate: ~, local_ca: ~}"] {
        let found = mistakes(&format!("identity: {none}\n"));
        assert_eq!(
            found,
            [
                "identity: needs a source: certificate, key and roots, or one of local_ca, istio_ca and spire"
            ]
        );
    }
}

#[test]
fn missing_key_of_identity_source_is_named() {
    assert_eq!(
        mistakes("identity: {istio_ca: {impersonate: perhaps}}\n"),
        [
            "identity.istio_ca.address: is needed to ask Istio's CA",
            "identity.istio_ca.roots: is needed to ask Istio's CA",
            "identity.istio_ca.token: is needed to ask Istio's CA",
            "identity.istio_ca.impersonate: must be true or false",
        ]
    );
    assert_refused("identity: {spire: {}}\n", "identity.spire.socket");
    assert_refused("identity: {local_ca: ''}\n", "identity.local_ca");
    assert_eq!(
        mistakes("identity: {istio_ca: istiod}\n").first().unwrap(),
        "identity.istio_ca: must be a mapping (key: value)"
    );
}

#[test]
fn rejects_ttl_for_sources_that_do_not_issue() {
    assert_refused("identity: {certificate: c, key: k, roots: r, ttl: 1h}\n", "identity.ttl");
    assert_refused("identity: {spire: {socket: s}, ttl: 1h}\n", "identity.ttl");
    assert_refused("identity: {local_ca: ca, ttl: 999ms}\n", "identity.ttl");
    assert_refused("identity: {local_ca: ca, ttl: 24}\n", "identity.ttl");
}

#[test]
fn ca_address_requires_scheme_host_and_port() {
    let with = |address: &str| {
        format!("identity: {{istio_ca: {{address: '{address}', roots: r, token: t}}}}\n")
    };
    for right in ["https://istiod.istio-system.svc:15012", "https://[::1]:1", "https://10.0.0.1:2"]
    {
        assert_eq!(mistakes(&with(right)), [""; 0], "{right}");
    }
    for wrong in [
        "",
        "istiod:15012",
        "http://istiod:15012",
        "https://istiod",
        "https://istiod:0",
        "https://istiod:+1",
        "https://istiod:65536",
        "https://istiod:15012/",
        "https://:15012",
        "https://a:b:1",
        "https://::1:15012",
        "https://user@istiod:15012",
    ] {
        assert_refused(&with(wrong), "identity.istio_ca.address");
    }
    for (key, wrong) in [("server_name", "a b"), ("server_name", ""), ("cluster_id", "a b")] {
        let text = format!("identity: {{istio_ca: {{{ISTIO}, {key}: '{wrong}'}}}}\n");
        assert_refused(&text, &format!("identity.istio_ca.{key}"));
    }
}

#[test]
fn spire_socket_is_path_or_unix_uri() {
    let socket = |text: &str| match identity_of(&format!("{{spire: {{socket: '{text}'}}}}")) {
        Ok(IdentitySettings::Spire(spire)) => Some(spire.socket),
        Ok(other) => panic!("{other:?}"),
        Err(_) => None,
    };
    for same in ["/run/agent.sock", "unix:///run/agent.sock", "unix:/run/agent.sock"] {
        assert_eq!(socket(same).as_deref(), Some(Path::new("/run/agent.sock")), "{same}");
    }
    assert_eq!(socket("agent.sock").as_deref(), Some(Path::new("agent.sock")));
    for wrong in ["", "unix:", "unix:agent.sock", "unix://host/agent.sock", "tcp://1.2.3.4:5"] {
        assert_eq!(socket(wrong), None, "{wrong}");
    }
}

#[test]
fn admin_socket_of_spire_is_for_node_daemon_only() {
    let text = "identity: {spire: {admin_socket: /run/admin.sock}}\n";
    assert_refused(text, "identity.spire.admin_socket");
    assert_refused(
        "identity: {spire: {socket: s, admin_socket: a}}\n",
        "identity.spire.admin_socket",
    );
    let node = format!("node: {{pods: {{directory: /pods}}}}\n{text}");
    let identity = read(&node).unwrap().identity;
    let expected =
        SpireSettings { api: SpireApi::DelegatedIdentity, socket: "/run/admin.sock".into() };
    assert_eq!(identity, Some(IdentitySettings::Spire(expected)));
}

#[test]
fn parses_trust_settings() {
    let text = "trust: {aliases: 'a.org,b.org', bundles: ['c.org=c.pem', 'd.org=/d=.pem', 'c.org=c.pem'], \
                crls: [x.crl, y.crl]}\n";
    let domain = |text: &str| -> TrustDomain { text.parse().unwrap() };
    let bundle =
        |name: &str, file: &str| BundleFile { trust_domain: domain(name), file: file.into() };
    let expected = TrustSettings {
        ciphers: Cipher::ALL.to_vec(),
        aliases: vec![domain("a.org"), domain("b.org")],
        bundles: vec![bundle("c.org", "c.pem"), bundle("d.org", "/d=.pem")],
        crls: vec!["x.crl".into(), "y.crl".into()],
    };
    assert_eq!(read(text).unwrap().trust, expected);
}

#[test]
fn ciphers_keep_their_order_and_are_never_empty() {
    let ciphers = |text: &str| read(text).unwrap().trust.ciphers;
    assert_eq!(ciphers(""), [Cipher::Aes128Gcm, Cipher::Aes256Gcm]);
    let both = ciphers("trust: {ciphers: [aes-256-gcm, aes-128-gcm]}\n");
    assert_eq!(both, [Cipher::Aes256Gcm, Cipher::Aes128Gcm]);
    assert_eq!(ciphers("trust: {ciphers: aes-256-gcm}\n"), [Cipher::Aes256Gcm]);
    for (wrong, reason) in
        [("[]", "must have at least one cipher"), ("[rc4]", "must be aes-128-gcm")]
    {
        let found = mistakes(&format!("trust: {{ciphers: {wrong}}}\n"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(reason), "{found:?}");
    }
}

#[test]
fn rejects_several_bundles_of_one_trust_domain() {
    let own = "workload: {trustDomain: own.org}\n";
    for (trust, reason) in [
        ("{bundles: ['own.org=o.pem']}", "own.org is our own trust domain"),
        ("{bundles: ['a.org=a.pem'], aliases: [a.org]}", "a.org is in trust.aliases too"),
        ("{bundles: ['a.org=a.pem', 'a.org=b.pem']}", "a.org occurs twice"),
    ] {
        let found = mistakes(&format!("{own}trust: {trust}\n"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with(&format!("trust.bundles: {reason}")), "{found:?}");
    }
}

#[test]
fn rejects_malformed_trust_settings() {
    for (trust, key) in [
        ("{aliases: [UPPER]}", "trust.aliases[0]"),
        ("{bundles: [a.org]}", "trust.bundles[0]"),
        ("{bundles: ['a.org=']}", "trust.bundles[0]"),
        ("{bundles: ['=a.pem']}", "trust.bundles[0]"),
        ("{bundles: ['a.org=a.pem', 'B=b.pem']}", "trust.bundles[1]"),
        ("{crls: [a.crl, '']}", "trust.crls[1]"),
        ("{crls: {a: b}}", "trust.crls"),
    ] {
        assert_refused(&format!("trust: {trust}\n"), key);
    }
}

#[test]
fn counts_out_of_bounds_are_rejected() {
    for right in ["{streams: 1}", "{streams: 10000}", "{per_peer: 64}", "{max_age: 250ms}"] {
        assert_eq!(mistakes(&format!("tunnels: {right}\n")), [""; 0], "{right}");
    }
    for (key, wrong) in [
        ("streams", "0"),
        ("streams", "10001"),
        ("streams", "many"),
        ("per_peer", "0"),
        ("per_peer", "65"),
        ("max_age", "0s"),
    ] {
        assert_refused(&format!("tunnels: {{{key}: {wrong}}}\n"), &format!("tunnels.{key}"));
    }
}
