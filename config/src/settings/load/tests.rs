//! Tests of valid and invalid settings from files, variables and flags.

use std::collections::BTreeSet;
use std::io::Write;

use super::*;
use crate::settings::resolve::keys;
use crate::settings::{IdentitySettings, OnExit, Profile, ProxySettings};

struct Given {
    folder: PathBuf,
}

impl Given {
    /// Writes a settings file in a new folder.
    fn file(name: &str, text: &str) -> (Self, PathBuf) {
        let folder =
            std::env::temp_dir().join(format!("underpass-config-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("underpass.yaml");
        std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        (Self { folder }, path)
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).unwrap();
    }
}

fn load(
    text: &str,
    environment: &[(&str, &str)],
    flags: &[&str],
) -> Result<Settings, ConfigErrors> {
    let name: String = std::thread::current().name().unwrap().replace("::", "-");
    let (_given, path) = Given::file(&name, text);
    Sources {
        file: Some(path),
        environment: environment.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        flags: flags.iter().map(|flag| (*flag).into()).collect(),
    }
    .load()
}

fn mistakes(result: Result<Settings, ConfigErrors>) -> Vec<String> {
    result.unwrap_err().problems.into_iter().map(|p| format!("{}: {}", p.key, p.reason)).collect()
}

#[test]
fn empty_document_gives_defaults() {
    let settings = load("", &[], &[]).unwrap();
    assert_eq!(settings.proxy.outbound_port, 15001);
    assert_eq!(settings.proxy.inbound_port, 15006);
    assert_eq!(settings.proxy.hbone_port, 15008);
    assert_eq!(settings.interception.profile, Profile::Ambient);
    assert_eq!(settings.interception.on_exit, OnExit::Keep);
    assert!(!settings.interception.allow_host);
    assert_eq!(
        settings.workload.spiffe_id.to_string(),
        "spiffe://cluster.local/ns/default/sa/default"
    );
    assert_eq!(settings.readiness.to_string(), "[::]:15021");
    assert_eq!(settings.identity, None);
}

#[test]
fn flags_override_environment_which_overrides_file() {
    let file = "proxy: {outbound_port: 1, inbound_port: 2, hbone_port: 3}\n";
    let environment =
        [("UNDERPASS_PROXY_INBOUND_PORT", "20"), ("UNDERPASS_PROXY_HBONE_PORT", "30")];
    let settings = load(file, &environment, &["proxy.hbone_port=300"]).unwrap();
    let ProxySettings { outbound_port, inbound_port, hbone_port, .. } = settings.proxy;
    assert_eq!((outbound_port, inbound_port, hbone_port), (1, 20, 300));
}

#[test]
fn every_key_has_its_environment_variable() {
    assert_eq!(
        environment::variable("workload.serviceAccount"),
        "UNDERPASS_WORKLOAD_SERVICE_ACCOUNT"
    );
    let settings = load("", &[("UNDERPASS_WORKLOAD_SERVICE_ACCOUNT", "web")], &[]).unwrap();
    assert_eq!(settings.workload.service_account, "web");
    assert_eq!(settings.workload.name, "web");
}

#[test]
fn environment_variables_of_keys_are_unique() {
    let names: BTreeSet<String> = keys().map(environment::variable).collect();
    assert_eq!(names.len(), keys().count());
}

#[test]
fn flags_and_variables_take_comma_separated_lists() {
    let exclude = |value: &str| {
        let flag = format!("interception.outbound.exclude_cidrs={value}");
        let variable = ("UNDERPASS_INTERCEPTION_OUTBOUND_EXCLUDE_CIDRS", value);
        let by_flag = load("", &[], &[&flag]).unwrap().interception.outbound.exclude_cidrs;
        let by_variable = load("", &[variable], &[]).unwrap().interception.outbound.exclude_cidrs;
        assert_eq!(by_flag, by_variable);
        by_flag.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(exclude("10.0.0.0/8,fd00::/8"), ["10.0.0.0/8", "fd00::/8"]);
    assert_eq!(exclude("::1/128"), ["::1/128"]);
    assert_eq!(exclude("fd00::/8, ::1"), ["fd00::/8", "::1/128"]);
    assert_eq!(exclude("[10.0.0.0/8, \"::1\"]"), ["10.0.0.0/8", "::1/128"]);
    assert_eq!(exclude("'::1'"), ["::1/128"]);
    assert_eq!(exclude(""), [""; 0]);
}

#[test]
fn flags_and_variables_take_plain_or_quoted_values() {
    for value in ["[::]:15020", "\"[::]:15020\"", " '[::]:15020' "] {
        let flag = format!("metrics.address={value}");
        let variable = ("UNDERPASS_METRICS_ADDRESS", value);
        for (environment, flags) in [(&[variable][..], &[][..]), (&[], &[flag.as_str()])] {
            let settings = load("", environment, flags).unwrap();
            assert_eq!(settings.metrics.to_string(), "[::]:15020");
        }
    }
}

#[test]
fn empty_flag_or_variable_gives_default() {
    for nothing in ["", "~", "null"] {
        let file = "mesh: {file: m.yaml}\nproxy: {workers: 3}\n";
        let flag = format!("mesh.file={nothing}");
        let settings = load(file, &[("UNDERPASS_PROXY_WORKERS", nothing)], &[&flag]).unwrap();
        assert_eq!((settings.mesh_file, settings.proxy.workers), (None, None));
    }
}

#[test]
fn star_in_flag_is_plain_text() {
    let file = "interception: {outbound: {include_cidrs: none}, inbound: {include_ports: [1]}}\n";
    for star in ["*", "\"*\"", "['*']"] {
        let outbound = format!("interception.outbound.include_cidrs={star}");
        let inbound = format!("interception.inbound.include_ports={star}");
        let settings = load(file, &[], &[&outbound, &inbound]).unwrap().interception;
        assert_eq!(settings.outbound.include_cidrs, None);
        assert_eq!(settings.inbound.include_ports, None);
    }
}

#[test]
fn only_paths_in_the_file_are_relative_to_its_folder() {
    let file =
        "identity: {certificate: c.pem, key: /abs/c.key, roots: r.pem}\nmesh: {file: m.yaml}\n";
    let settings = load(file, &[], &["mesh.file=here.yaml"]).unwrap();
    let Some(IdentitySettings::Files(identity)) = settings.identity else {
        panic!("{:?}", settings.identity);
    };
    assert!(identity.certificate.is_absolute() && identity.certificate.ends_with("c.pem"));
    assert_eq!(identity.key, Path::new("/abs/c.key"));
    assert_eq!(settings.mesh_file.unwrap(), Path::new("here.yaml"));

    let file = "trust: {bundles: [a.org=a.pem], crls: [x.crl, /abs/y.crl]}\n";
    let by_file = load(file, &[], &[]).unwrap().trust;
    assert!(by_file.bundles[0].file.is_absolute() && by_file.bundles[0].file.ends_with("a.pem"));
    assert!(by_file.crls[0].is_absolute() && by_file.crls[0].ends_with("x.crl"));
    assert_eq!(by_file.crls[1], Path::new("/abs/y.crl"));
    let variable = ("UNDERPASS_TRUST_CRLS", "x.crl");
    let flags = ["trust.bundles=[a.org=a.pem, b.org=b.pem]"];
    let trust = load(file, &[variable], &flags).unwrap().trust;
    assert_eq!(trust.crls, [Path::new("x.crl")]);
    assert_eq!(trust.bundles[1].file, Path::new("b.pem"));
}

#[test]
fn load_reports_all_mistakes_at_once() {
    let file = "proxy: {outbound_port: 0, workers: many}\nidentity: {certificate: c.pem}\n\
                interception: {profile: ambience, ipv6: maybe}\nworkload: {trustDomain: UPPER}\nmehs: {}\n";
    let environment = [("UNDERPASS_PROXY_HBONE_PORT", "hbone")];
    let found = mistakes(load(file, &environment, &["nonsense", "timeouts.connect=10"]));
    let expected = [
        ": must be KEY=VALUE, such as proxy.workers=2",
        "mehs: no such key",
        "workload.trustDomain: the trust domain must be 1 to 255 characters of a-z, 0-9, '.', '-' and '_'",
        "identity.key: is needed: certificate, key and roots go together",
        "identity.roots: is needed: certificate, key and roots go together",
        "interception.profile: must be one of ambient, sidecar, osm, none",
        "interception.ipv6: must be one of capture, reject, bypass",
        "proxy.outbound_port: must be a port, 1 to 65535",
        "proxy.hbone_port: must be a port, 1 to 65535",
        "proxy.workers: must be auto or a number of threads, 1 to 1024",
        "timeouts.connect: must be a duration above zero with its unit, such as 250ms, 10s, 5m or 24h",
    ];
    assert_eq!(found, expected);
}

#[test]
fn rejects_equal_proxy_ports() {
    let found = mistakes(load("proxy: {inbound_port: 15008}\n", &[], &[]));
    assert_eq!(found, ["proxy: outbound_port, inbound_port, hbone_port and dns_port must differ"]);
}

#[test]
fn refuses_a_port_that_two_listeners_share() {
    let found = |flags: &[&str]| mistakes(load("", &[], flags));
    assert_eq!(
        found(&["metrics.address=127.0.0.1:15008"]),
        ["metrics.address: port 15008 is that of proxy.hbone_port"]
    );
    let same = ["metrics.address=127.0.0.1:9000", "readiness.address=[::]:9000"];
    assert_eq!(found(&same), ["readiness.address: port 9000 is that of metrics.address"]);
    let apart = ["metrics.address=127.0.0.1:9000", "readiness.address=127.0.0.2:9000"];
    load("", &[], &apart).unwrap();
    load("", &[], &["metrics.address=[::]:0", "readiness.address=[::]:0"]).unwrap();
    let of_admin = ["metrics.address=[::]:9000", "admin.address=127.0.0.1:9000"];
    assert_eq!(found(&of_admin), ["admin.address: port 9000 is that of metrics.address"]);
}

#[test]
fn admin_address_is_off_by_default_without_pods_and_always_on_loopback() {
    let address = |text: &str, flags: &[&str]| load(text, &[], flags).unwrap().admin.address;
    assert_eq!(address("", &[]), None);
    assert_eq!(address("", &["admin.address=[::1]:1"]), Some(([0, 0, 0, 0, 0, 0, 0, 1], 1).into()));
    let node = "node: {pods: {directory: /pods}}\n";
    assert_eq!(address(node, &[]), Some(([127, 0, 0, 1], 15000).into()));
    assert_eq!(address(node, &["admin.address=off"]), None);
    for other in ["0.0.0.0:15000", "[::]:15000", "10.0.0.1:15000"] {
        let found = mistakes(load("", &[], &[&format!("admin.address={other}")]));
        assert!(
            found[0].starts_with("admin.address: must be an address of the loopback"),
            "{found:?}"
        );
    }
}

#[test]
fn missing_file_error_names_the_file() {
    let sources = Sources { file: Some("/does/not/exist.yaml".into()), ..Sources::default() };
    let error = sources.load().unwrap_err().to_string();
    assert!(error.starts_with("/does/not/exist.yaml: cannot be read: No such file"), "{error}");
}

fn warnings(environment: &[(&str, &str)]) -> Vec<String> {
    let environment = environment.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    let sources = Sources { environment, ..Sources::default() };
    sources.load().unwrap();
    sources.warnings().iter().map(ToString::to_string).collect()
}

#[test]
fn ignores_service_links_of_kubernetes() {
    // The kubelet's variables for the Services underpass, underpass-ca and
    // underpass-proxy-outbound.
    let links = [
        ("UNDERPASS_SERVICE_HOST", "10.0.0.1"),
        ("UNDERPASS_SERVICE_PORT", "80"),
        ("UNDERPASS_SERVICE_PORT_HTTP", "80"),
        ("UNDERPASS_PORT", "tcp://10.0.0.1:80"),
        ("UNDERPASS_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("UNDERPASS_PORT_80_TCP_PROTO", "tcp"),
        ("UNDERPASS_PORT_80_TCP_PORT", "80"),
        ("UNDERPASS_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("UNDERPASS_CA_SERVICE_HOST", "10.96.0.9"),
        ("UNDERPASS_CA_SERVICE_PORT_GRPC", "15012"),
        ("UNDERPASS_CA_PORT", "tcp://10.96.0.9:15012"),
        ("UNDERPASS_CA_PORT_15012_TCP", "tcp://10.96.0.9:15012"),
        ("UNDERPASS_CA_PORT_15012_TCP_PORT", "15012"),
        ("UNDERPASS_DNS_PORT", "udp://10.96.0.9:53"),
        ("UNDERPASS_DNS_PORT_53_UDP_ADDR", "10.96.0.9"),
        ("UNDERPASS_PROXY_OUTBOUND_PORT", "tcp://10.96.0.8:1"),
    ];
    assert_eq!(warnings(&links), [""; 0]);
}

#[test]
fn reads_settings_whose_variables_look_like_service_links() {
    let environment =
        [("UNDERPASS_PROXY_OUTBOUND_PORT", "16001"), ("UNDERPASS_PROXY_DNS_PORT", "16053")];
    let proxy = load("", &environment, &[]).unwrap().proxy;
    assert_eq!((proxy.outbound_port, proxy.dns_port), (16001, 16053));
    let found = mistakes(load("", &[("UNDERPASS_PROXY_OUTBOUND_PORT", "http://x:1")], &[]));
    assert_eq!(found, ["proxy.outbound_port: must be a port, 1 to 65535"]);
}

#[test]
fn warns_of_unknown_variables() {
    let environment = [
        ("UNDERPASS_PROXY_OUTBUND_PORT", "1"),
        ("UNDERPASS_SPARK", "x"),
        ("UNDERPASS_CONFIG", "/etc/underpass.yaml"),
        ("SOMETHING_ELSE", "x"),
    ];
    let expected = [
        "environment UNDERPASS_PROXY_OUTBUND_PORT: \"1\": no such setting, ignored",
        "environment UNDERPASS_SPARK: \"x\": no such setting, ignored",
    ];
    assert_eq!(warnings(&environment), expected);
}

#[test]
fn files_are_known_whatever_other_settings_are() {
    let flags = ["proxy.workers=none", "mesh.file=/m.yaml", "identity.certificate=/a.pem"];
    let flags = flags.into_iter().chain(["identity.key=/a.key", "identity.roots=/r.pem"]);
    let flags = flags.map(str::to_owned).collect();
    let sources = Sources { flags, ..Sources::default() };
    sources.load().unwrap_err();
    let inputs = sources.inputs();
    assert_eq!(inputs.mesh_file.as_deref(), Some(Path::new("/m.yaml")));
    assert!(inputs.identity.is_some() && inputs.workload.is_some() && !inputs.serves_pods);
    let missing = Sources { file: Some("/does/not/exist.yaml".into()), ..Sources::default() };
    assert_eq!(missing.inputs(), InputSettings::default());
}
