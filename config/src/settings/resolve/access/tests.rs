//! Tests of valid and invalid settings of egress and mTLS.

use crate::settings::load::settings_of;
use crate::settings::{EgressSettings, Mtls, MtlsOverride, MtlsSettings};

const IDENTITY: &str = "identity: {local_ca: /ca}\n";

fn egress(text: &str) -> EgressSettings {
    settings_of(text).unwrap().egress
}

fn mtls(text: &str) -> MtlsSettings {
    settings_of(&format!("{IDENTITY}proxy: {{{text}}}")).unwrap().proxy.mtls
}

fn mistakes(text: &str) -> Vec<String> {
    let problems = settings_of(text).unwrap_err().problems;
    problems.into_iter().map(|problem| format!("{}: {}", problem.key, problem.reason)).collect()
}

#[test]
fn defaults_allow_all_egress_and_plaintext_inbound() {
    let settings = settings_of("").unwrap();
    assert!(settings.egress.permits("192.0.2.1:443".parse().unwrap()));
    assert_eq!(settings.proxy.mtls.mode("shop", "web", 80), Mtls::Permissive);
    assert_eq!(settings.workload.network, "");
    assert_eq!(settings.timeouts.ejection.as_secs(), 10);
    assert_eq!((settings.series.limit, settings.series.idle.as_secs()), (1000, 3600));
}

#[test]
fn mesh_only_egress_permits_only_exceptions() {
    let text = "egress: mesh-only\negress_exceptions: {cidrs: [10.0.0.0/8, '2001:db8::/32'], ports: [53, 8000-8100]}";
    let permitted = |destination: &str| egress(text).permits(destination.parse().unwrap());
    for destination in
        ["10.1.2.3:1", "[::ffff:10.1.2.3]:1", "[2001:db8::9]:1", "192.0.2.1:53", "[::1]:8100"]
    {
        assert!(permitted(destination), "{destination}");
    }
    for destination in ["11.1.2.3:1", "[2001:db9::9]:1", "192.0.2.1:54", "[::1]:8101"] {
        assert!(!permitted(destination), "{destination}");
    }
    assert!(!egress("egress: mesh-only").permits("10.0.0.1:80".parse().unwrap()));
}

#[test]
fn rejects_egress_exceptions_in_allow_mode() {
    let meaningless = "egress_exceptions: has an effect only with egress: mesh-only";
    assert_eq!(mistakes("egress_exceptions: {ports: [53]}"), [meaningless]);
    assert_eq!(mistakes("egress: allow\negress_exceptions: {cidrs: [10.0.0.0/8]}"), [meaningless]);
    assert_eq!(
        mistakes("egress: mesh\negress_exceptions: {cidr: [10.0.0.0/8], ports: [0]}"),
        [
            "egress_exceptions.cidr: no such key",
            "egress: must be one of allow, mesh-only",
            "egress_exceptions.ports[0]: must be a port, 1 to 65535, or a range of them, such as 8000-8100",
        ]
    );
}

#[test]
fn most_specific_mtls_override_applies_in_any_order() {
    let rising = "mtls: strict, mtls_overrides: [':80=permissive', shop/web=strict, 'shop/web:80=permissive', shop/db=permissive]";
    let falling = "mtls: strict, mtls_overrides: [shop/db=permissive, 'shop/web:80=permissive', shop/web=strict, ':80=permissive']";
    for text in [rising, falling] {
        let mtls = mtls(text);
        for (namespace, name, port, mode) in [
            ("shop", "web", 80, Mtls::Permissive),
            ("shop", "web", 81, Mtls::Strict),
            ("shop", "db", 81, Mtls::Permissive),
            ("shop", "other", 80, Mtls::Permissive),
            ("shop", "other", 81, Mtls::Strict),
            ("bank", "web", 81, Mtls::Strict),
            ("bank", "db", 81, Mtls::Strict),
        ] {
            assert_eq!(mtls.mode(namespace, name, port), mode, "{namespace}/{name}:{port}");
        }
    }
    let of_workload = mtls("mtls_overrides: [':80=permissive', shop/web=strict]");
    assert_eq!(
        of_workload.mode("shop", "web", 80),
        Mtls::Strict,
        "an override of a workload precedes one of a port"
    );
}

#[test]
fn mtls_override_prints_as_parsed() {
    for text in ["shop/web=strict", "shop/web:80=permissive", ":9000=strict"] {
        assert_eq!(text.parse::<MtlsOverride>().unwrap().to_string(), text);
    }
    for text in [
        "",
        "=strict",
        "strict",
        "web=strict",
        "shop/=strict",
        "/web=strict",
        "shop/web",
        "shop/web=Strict",
        "shop/web:=strict",
        "shop/web:0=strict",
        "shop/web:+80=strict",
        ":70000=strict",
        "a/b/c=strict",
        "a/b=c=strict",
        "a b/c=strict",
        ":80:81=strict",
        "a\"/b=strict",
    ] {
        assert!(text.parse::<MtlsOverride>().is_err(), "{text}");
    }
}

#[test]
fn rejects_contradicting_overrides_and_accepts_repeated_ones() {
    let overrides = |list: &str| format!("{IDENTITY}proxy: {{mtls_overrides: [{list}]}}");
    assert_eq!(
        mistakes(&overrides("shop/web=strict, ':1=strict', shop/web=permissive")),
        ["proxy.mtls_overrides: shop/web=strict and shop/web=permissive contradict each other"]
    );
    let repeated = settings_of(&overrides("shop/web=strict, shop/web=strict")).unwrap();
    assert_eq!(repeated.proxy.mtls.overrides.len(), 1);
}

#[test]
fn rejects_strict_mtls_without_identity() {
    let reason = "strict needs an identity: without HBONE no connection is possible";
    assert_eq!(mistakes("proxy: {mtls: strict}"), [format!("proxy.mtls: {reason}")]);
    assert_eq!(
        mistakes("proxy: {mtls_overrides: ':80=strict'}"),
        [format!("proxy.mtls_overrides: {reason}")]
    );
    settings_of("proxy: {mtls_overrides: ':80=permissive'}").unwrap();
}

#[test]
fn network_name_rejects_slash() {
    assert_eq!(settings_of("workload: {network: east}").unwrap().workload.network, "east");
    assert_eq!(
        mistakes("workload: {network: a/b}"),
        ["workload.network: must be the name of a network, without '/'"]
    );
}
