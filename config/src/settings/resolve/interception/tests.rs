//! Tests of lists, of defaults by profile, and of contradictions in the section `interception`.

use super::*;
use crate::error::ConfigErrors;
use crate::settings::load::settings_of;

fn read(section: &str) -> Result<InterceptionSettings, ConfigErrors> {
    settings_of(&format!("interception: {section}\n")).map(|settings| settings.interception)
}

fn mistakes(section: &str) -> Vec<String> {
    let Err(errors) = read(section) else {
        return Vec::new();
    };
    let problems = errors.problems.into_iter();
    problems.map(|p| format!("{}: {}", p.key.replace("interception.", ""), p.reason)).collect()
}

/// Asserts that `section` has exactly one mistake, at `key`.
fn assert_refused(section: &str, key: &str) {
    let found = mistakes(section);
    assert_eq!(found.len(), 1, "{section}: {found:?}");
    assert!(found[0].starts_with(&format!("{key}: ")), "{section}: {found:?}");
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

#[test]
fn empty_section_captures_everything() {
    let settings = read("{}").unwrap();
    assert_eq!(settings.outbound, OutboundCapture::default());
    assert_eq!(settings.inbound, InboundCapture::default());
    assert_eq!(settings.inbound.mode, InboundMode::Redirect);
    assert!(settings.install && settings.repair);
    assert!(!settings.exact && !settings.drop_invalid && !settings.ingress);
    assert_eq!((settings.backend, settings.dns), (Backend::Auto, Dns::Off));
    assert_eq!(settings.loopback_cidr.to_string(), "127.0.0.1/32");
}

#[test]
fn profile_sets_proxy_user_and_inbound_port() {
    for (profile, uids, gids, port) in [
        ("ambient", &[][..], &[][..], 15006),
        ("sidecar", &[1337], &[1337], 15006),
        ("osm", &[1500], &[], 15003),
        ("none", &[], &[], 15006),
    ] {
        let text = format!("interception: {{profile: {profile}}}\n");
        let settings = settings_of(&text).unwrap();
        assert_eq!(settings.interception.proxy_uids, uids, "{profile}");
        assert_eq!(settings.interception.proxy_gids, gids, "{profile}");
        assert_eq!(settings.proxy.inbound_port, port, "{profile}");
        assert_eq!(settings.proxy.dns_port, 15053);
    }
    let settings = read("{profile: sidecar, proxy_uids: [0], proxy_gids: []}").unwrap();
    assert_eq!((settings.proxy_uids, settings.proxy_gids), (vec![0], vec![]));
}

#[test]
fn lists_are_yaml_or_comma_separated_text() {
    for list in ["[80, 8000-8100, '443']", "'80,8000:8100, 443'", "80, 8000-8100 ,443,80"] {
        let section = format!("{{outbound: {{exclude_ports: {list}}}}}");
        let found = match list.starts_with('8') {
            true => read(&format!("\n  outbound:\n    exclude_ports: {list}")),
            false => read(&section),
        };
        let ports = found.unwrap().outbound.exclude_ports;
        assert_eq!(texts(&ports), ["80", "8000-8100", "443"], "{list}");
    }
    assert_eq!(read("{outbound: {exclude_ports: 80}}").unwrap().outbound.exclude_ports.len(), 1);
}

#[test]
fn parses_cidrs_like_iptables() {
    for (written, meant) in [
        ("2.2.2.2/24", "2.2.2.0/24"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("fd00::1", "fd00::1/128"),
        ("fd12::1/8", "fd00::/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("::ffff:10.1.2.3", "10.1.2.3/32"),
        ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::1/128", "::1/128"),
    ] {
        assert_eq!(cidr(written).unwrap().to_string(), meant, "{written}");
    }
    for wrong in
        ["", "*", "none", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0/8", "10.0.0.0/+8", "a"]
    {
        assert!(cidr(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn duplicate_list_items_are_merged() {
    let settings = read("{outbound: {exclude_cidrs: ['10.1.0.0/8', '10.2.0.0/8']}}").unwrap();
    assert_eq!(texts(&settings.outbound.exclude_cidrs), ["10.0.0.0/8"]);
}

#[test]
fn include_lists_accept_the_words_for_all_and_none() {
    let outbound = |text: &str| {
        let cidrs = read(&format!("{{outbound: {{{text}}}}}")).unwrap().outbound.include_cidrs;
        cidrs.map(|cidrs| texts(&cidrs))
    };
    assert_eq!(outbound("include_cidrs: '*'"), None);
    assert_eq!(outbound("include_cidrs: ['*']"), None);
    assert_eq!(outbound("include_cidrs: []"), None);
    assert_eq!(outbound("include_cidrs: none"), Some(vec![]));
    assert_eq!(outbound("include_cidrs: 10.0.0.0/8"), Some(vec!["10.0.0.0/8".to_owned()]));
    assert_eq!(outbound("include_ports: [80]"), Some(vec![]));
    assert_eq!(outbound("include_ports: [80], include_cidrs: []"), Some(vec![]));
    assert_eq!(outbound("include_ports: [80], include_cidrs: '*'"), None);

    let inbound = |text: &str| {
        read(&format!("{{inbound: {{include_ports: {text}}}}}")).unwrap().inbound.include_ports
    };
    assert_eq!(inbound("'*'"), None);
    assert_eq!(inbound("[]"), None);
    assert_eq!(inbound("none"), Some(vec![]));
    assert_eq!(inbound("[80]"), Some(vec![PortRange::from(80)]));
}

#[test]
fn list_mistake_names_the_item() {
    let errors = read("{outbound: {exclude_cidrs: '10.0.0.0/8,nowhere', exclude_uids: [0, root]}}");
    let reported: Vec<String> =
        errors.unwrap_err().problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        reported,
        [
            "underpass.yaml:1:42: interception.outbound.exclude_cidrs[1]: \"nowhere\": must be an \
             address or a CIDR, such as 10.0.0.0/8, 10.1.2.3 or fd00::/8",
            "underpass.yaml:1:82: interception.outbound.exclude_uids[1]: \"root\": must be a \
             number, as `id -u NAME` prints it",
        ]
    );
    assert_refused("{outbound: {exclude_ports: {a: 1}}}", "outbound.exclude_ports");
    assert_refused("{outbound: {exclude_ports: [80, ~]}}", "outbound.exclude_ports[1]");
    assert_refused("{outbound: {exclude_ports: '80,'}}", "outbound.exclude_ports[1]");
}

#[test]
fn rejects_invalid_ports() {
    for port in ["0", "70000", "90-80", "http", "'*'", "none"] {
        assert_refused(
            &format!("{{outbound: {{exclude_ports: [{port}]}}}}"),
            "outbound.exclude_ports[0]",
        );
        assert_refused(
            &format!("{{inbound: {{include_ports: [1, {port}]}}}}"),
            "inbound.include_ports[1]",
        );
    }
    assert_refused("{outbound: {exclude_cidrs: '*'}}", "outbound.exclude_cidrs[0]");
}

#[test]
fn rejects_invalid_interface_names() {
    for name in ["eth0", "veth@x", "br-0123456789ab", "wg.1", "tun#1"] {
        assert_eq!(interface(name).as_deref(), Ok(name));
    }
    let long = "a".repeat(16);
    for name in
        ["", ".", "..", "lo", "eth+", "eth*", "a b", "a/b", "a:1", "a\"", "a'", "a\\b", &long]
    {
        assert!(interface(name).is_err(), "{name}");
    }
    assert!(interface("eth+").unwrap_err().contains("wildcards are not supported"));
    assert_refused("{outbound: {exclude_interfaces: [lo]}}", "outbound.exclude_interfaces[0]");
    assert_refused("{inbound: {exclude_interfaces: [lo]}}", "inbound.exclude_interfaces[0]");
    assert_refused("{virtual_interfaces: [lo]}", "virtual_interfaces[0]");
}

#[test]
fn user_and_group_ids_are_numbers() {
    for id in ["root", "-1", "4294967295", "1-2"] {
        assert_refused(
            &format!("{{outbound: {{exclude_uids: [{id}]}}}}"),
            "outbound.exclude_uids[0]",
        );
        assert_refused(
            &format!("{{outbound: {{exclude_gids: [{id}]}}}}"),
            "outbound.exclude_gids[0]",
        );
    }
}

#[test]
fn rejects_loopback_cidr_outside_loopback_network() {
    let loopback = |text: &str| {
        let section = format!("{{profile: sidecar, loopback_cidr: '{text}'}}");
        read(&section).map(|settings| settings.loopback_cidr.to_string())
    };
    assert_eq!(loopback("127.0.0.1/8").unwrap(), "127.0.0.0/8");
    assert_eq!(loopback("127.0.0.6").unwrap(), "127.0.0.6/32");
    for wrong in ["127.0.0.0/7", "0.0.0.0/0", "10.0.0.0/8", "::1", "*"] {
        assert!(loopback(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn rejects_contradicting_settings_at_their_key() {
    for (section, key) in [
        ("{inbound: {mode: tproxy}}", "inbound.mode"),
        ("{profile: osm, inbound: {mode: tproxy}}", "inbound.mode"),
        ("{profile: sidecar, ingress: true}", "ingress"),
        ("{profile: osm, ingress: true}", "ingress"),
        ("{proxy_uids: [1]}", "proxy_uids"),
        ("{proxy_gids: [1]}", "proxy_gids"),
        ("{profile: osm, proxy_gids: [1]}", "proxy_gids"),
        ("{profile: osm, proxy_uids: []}", "proxy_uids"),
        ("{profile: sidecar, proxy_uids: [], proxy_gids: []}", "proxy_uids"),
        ("{loopback_cidr: 127.0.0.0/8}", "loopback_cidr"),
        ("{profile: osm, loopback_cidr: 127.0.0.0/8}", "loopback_cidr"),
        ("{outbound: {include_gids: [1]}}", "outbound.include_gids"),
        ("{profile: osm, outbound: {include_gids: [1]}}", "outbound.include_gids"),
        (
            "{profile: sidecar, outbound: {include_gids: [1], exclude_gids: [2]}}",
            "outbound.exclude_gids",
        ),
        ("{dns_servers: ['10.0.0.1']}", "dns_servers"),
        ("{profile: osm, dns: capture}", "dns"),
        ("{inbound: {include_ports: [1], exclude_ports: [2]}}", "inbound.exclude_ports"),
        ("{inbound: {include_ports: none, exclude_ports: [2]}}", "inbound.exclude_ports"),
        ("{profile: osm, virtual_interfaces: [veth0]}", "virtual_interfaces"),
    ] {
        assert_refused(section, key);
    }
}

#[test]
fn reads_kubelet_probes_as_a_word_or_as_ports() {
    let probes = |section: &str| read(section).unwrap().kubelet_probes;
    assert_eq!(probes("{}"), KubeletProbes::Off);
    assert_eq!(probes("{kubelet_probes: off}"), KubeletProbes::Off);
    assert_eq!(probes("{kubelet_probes: on}"), KubeletProbes::On);
    let ports = vec![8080.into(), PortRange { first: 9000, last: 9010 }];
    for list in ["[8080, 9000-9010]", "'8080,9000-9010'"] {
        let section = format!("{{kubelet_probes: {list}}}");
        assert_eq!(probes(&section), KubeletProbes::Ports(ports.clone()));
    }
    assert_eq!(probes("{profile: sidecar}"), KubeletProbes::Off);
    // Istio's own rules exempt probes to every port.
    assert_eq!(probes("{exact: true}"), KubeletProbes::On);
    assert_eq!(probes("{exact: true, profile: sidecar}"), KubeletProbes::Off);
}

#[test]
fn exempts_probes_to_declared_ports_only() {
    let ports = KubeletProbes::Ports(vec![8080.into(), PortRange { first: 9000, last: 9010 }]);
    assert!(ports.exempt(8080) && ports.exempt(9005));
    assert!(!ports.exempt(80) && !ports.exempt(9011));
    assert!(KubeletProbes::On.exempt(80) && !KubeletProbes::Off.exempt(80));
}

#[test]
fn rejects_invalid_kubelet_probes() {
    assert_refused("{kubelet_probes: 'true'}", "kubelet_probes[0]");
    assert_refused("{kubelet_probes: [80, on]}", "kubelet_probes[1]");
    assert_refused("{kubelet_probes: []}", "kubelet_probes");
    assert_refused("{profile: sidecar, kubelet_probes: on}", "kubelet_probes");
    assert_refused("{profile: osm, kubelet_probes: [80]}", "kubelet_probes");
    assert_refused("{exact: true, kubelet_probes: off}", "kubelet_probes");
    assert_refused("{exact: true, kubelet_probes: [80]}", "kubelet_probes");
}

#[test]
fn accepts_compatible_settings() {
    for section in [
        "{profile: sidecar, proxy_uids: [], proxy_gids: [0]}",
        "{outbound: {include_cidrs: [10.0.0.0/8], exclude_cidrs: [10.1.0.0/16]}}",
        "{inbound: {include_ports: '*', exclude_ports: [2]}}",
        "{dns: capture, dns_servers: ['10.0.0.1', '::ffff:10.0.0.2']}",
        "{proxy_uids: [], proxy_gids: [], ingress: true, loopback_cidr: 127.0.0.1}",
    ] {
        assert_eq!(mistakes(section), [""; 0], "{section}");
    }
}

#[test]
fn profile_none_ignores_contradicting_rule_settings() {
    let section = "{profile: none, ingress: true, proxy_gids: [1], dns_servers: ['::1'], \
                   inbound: {mode: tproxy, include_ports: [1], exclude_ports: [1]}}";
    assert_eq!(mistakes(section), [""; 0]);
}

#[test]
fn unknown_profile_is_the_only_mistake() {
    assert_refused("{profile: sidekick, ingress: true, proxy_uids: []}", "profile");
}

#[test]
fn rejects_unknown_nested_key() {
    let found = mistakes("{outbound: {exclude_cidr: x}, inbound: [1]}");
    assert_eq!(
        found,
        ["outbound.exclude_cidr: no such key", "inbound: must be a mapping (key: value)"]
    );
}
