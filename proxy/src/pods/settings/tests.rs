//! Tests of pods' settings from facts, labels and annotations.

use std::collections::BTreeMap;

use underpass_config::{Dns, PodDns, PortRange};

use super::*;
use crate::pods::facts::tests::facts;

fn node(text: &str) -> Settings {
    Settings::of_text("node.yaml", text).unwrap()
}

fn map(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn annotated(annotations: &[(&str, &str)]) -> PodFacts {
    PodFacts { annotations: map(annotations), ..facts() }
}

fn enrolled(node_settings: &str, pod: &PodFacts) -> Settings {
    match pod_settings(&node(node_settings), pod).unwrap() {
        PodSettings::Enrolled(settings) => *settings,
        PodSettings::Exempt(reason) => panic!("not enrolled: {reason}"),
    }
}

/// The settings of a pod with one annotation.
fn settings_with(key: &str, value: &str) -> Settings {
    enrolled("", &annotated(&[(key, value)]))
}

fn error_of(pod: &PodFacts) -> String {
    pod_settings(&node(""), pod).unwrap_err().to_string()
}

fn ports<const N: usize>(ports: [u16; N]) -> Vec<PortRange> {
    ports.map(PortRange::from).into()
}

#[test]
fn resolver_settings_are_those_of_the_pod() {
    let dns = PodDns { search: vec!["a.example".to_owned()], ..PodDns::default() };
    let pod = PodFacts { dns: dns.clone(), ..facts() };
    assert_eq!(enrolled("dns: {domain: cluster.example}", &pod).dns.pod, dns);
}

#[test]
fn identity_is_that_of_the_pods_own_service_account() {
    let settings = enrolled("workload: {trustDomain: example.org, network: east}", &facts());
    let workload = &settings.workload;
    assert_eq!(workload.spiffe_id.to_string(), "spiffe://example.org/ns/shop/sa/web");
    assert_eq!((workload.name.as_str(), workload.network.as_str()), ("web-1", "east"));
    assert_eq!((workload.namespace.as_str(), workload.service_account.as_str()), ("shop", "web"));
}

#[test]
fn rejects_names_that_are_invalid_in_an_identity() {
    let pod = PodFacts { namespace: "..".to_owned(), ..facts() };
    let error = pod_settings(&node(""), &pod).unwrap_err();
    assert!(matches!(error, FactsError::Identity { .. }), "{error}");
}

#[test]
fn pod_without_labels_has_the_nodes_interception_settings() {
    let text = "interception: {exact: true, outbound: {exclude_ports: [22]}}";
    assert_eq!(enrolled(text, &facts()).interception, node(text).interception);
}

#[test]
fn label_and_sidecar_exclude_a_pod() {
    let opted_out = PodFacts { labels: map(&[("istio.io/dataplane-mode", "none")]), ..facts() };
    let has_sidecar = annotated(&[("sidecar.istio.io/status", "{}")]);
    for (pod, reason) in
        [(opted_out, ExemptReason::OptedOut), (has_sidecar, ExemptReason::HasSidecar)]
    {
        assert_eq!(pod_settings(&node(""), &pod).unwrap(), PodSettings::Exempt(reason));
    }
    let enrolled_by_label =
        PodFacts { labels: map(&[("istio.io/dataplane-mode", "ambient")]), ..facts() };
    enrolled("", &enrolled_by_label);
}

#[test]
fn label_of_namespace_applies_to_pods_without_their_own() {
    let in_namespace = |mode: &str| PodFacts { namespace_mode: Some(mode.to_owned()), ..facts() };
    let opted_out = PodSettings::Exempt(ExemptReason::OptedOut);
    assert_eq!(pod_settings(&node(""), &in_namespace("none")).unwrap(), opted_out);
    enrolled("", &in_namespace("ambient"));
    let labels = map(&[("istio.io/dataplane-mode", "ambient")]);
    enrolled("", &PodFacts { labels, ..in_namespace("none") });
    pod_settings(&node(""), &in_namespace("sidecar")).unwrap_err();
}

#[test]
fn known_probe_ports_alone_are_exempt() {
    let probes = |settings: &str, ports: Option<&[u16]>| {
        let probe_ports = ports.map(|ports| ports.iter().copied().collect());
        let settings = format!("node: {{pods: {{cni: /x}}, probes: translate}}\n{settings}");
        enrolled(&settings, &PodFacts { probe_ports, ..facts() }).interception.kubelet_probes
    };
    assert_eq!(probes("", None), KubeletProbes::On);
    assert_eq!(probes("", Some(&[8080, 9000])), KubeletProbes::Ports(ports([8080, 9000])));
    assert_eq!(probes("", Some(&[])), KubeletProbes::Off);
    let listed = "interception: {kubelet_probes: [7000]}";
    assert_eq!(probes(listed, Some(&[8080])), KubeletProbes::Ports(ports([7000])));
    assert_eq!(probes("interception: {exact: true}", Some(&[8080])), KubeletProbes::On);
    let facts = PodFacts { probe_ports: Some([8080].into()), ..facts() };
    assert_eq!(enrolled("", &facts).interception.kubelet_probes, KubeletProbes::Off);
}

#[test]
fn exempt_namespace_excludes_a_pod_unless_an_agent_selects_it() {
    let pod = PodFacts { namespace: "kube-system".to_owned(), ..facts() };
    let exempt = PodSettings::Exempt(ExemptReason::ExemptNamespace);
    assert_eq!(pod_settings(&node(""), &pod).unwrap(), exempt);
    enrolled("node: {exempt_namespaces: []}", &pod);
    enrolled("node: {pods: {zds: /run/zds.sock}}", &pod);
}

#[test]
fn rejects_unknown_dataplane_mode() {
    for mode in ["", "None", "sidecar", "none\n"] {
        let pod = PodFacts { labels: map(&[("istio.io/dataplane-mode", mode)]), ..facts() };
        let error = error_of(&pod);
        assert!(error.contains("istio.io/dataplane-mode") && error.contains("ambient or none"));
    }
}

#[test]
fn annotations_set_outbound_capture() {
    let key = |name: &str| format!("traffic.sidecar.istio.io/{name}");
    let outbound = |name: &str, value: &str| settings_with(&key(name), value).interception.outbound;
    let nets: Vec<_> = ["10.0.0.0/8", "fd00::/8"].map(|net| net.parse().unwrap()).into();
    let ranges = "10.0.0.0/8, fd00::/8";
    assert_eq!(outbound("excludeOutboundIPRanges", ranges).exclude_cidrs, nets);
    assert_eq!(outbound("includeOutboundIPRanges", ranges).include_cidrs, Some(nets));
    assert_eq!(outbound("includeOutboundIPRanges", "*").include_cidrs, None);
    assert_eq!(outbound("includeOutboundIPRanges", "").include_cidrs, Some(Vec::new()));
    assert_eq!(outbound("excludeOutboundPorts", "22,80").exclude_ports, ports([22, 80]));
    assert_eq!(outbound("excludeOutboundPorts", "").exclude_ports, []);
    assert_eq!(outbound("excludeInterfaces", "eth1").exclude_interfaces, ["eth1"]);
}

#[test]
fn included_ports_add_to_the_included_ranges() {
    let pod = annotated(&[("traffic.sidecar.istio.io/includeOutboundPorts", "443")]);
    let node_settings = "interception: {outbound: {include_cidrs: [10.0.0.0/8]}}";
    for (text, cidrs) in [("", None), (node_settings, Some(vec!["10.0.0.0/8".parse().unwrap()]))] {
        let outbound = enrolled(text, &pod).interception.outbound;
        assert_eq!((outbound.include_ports, outbound.include_cidrs), (ports([443]), cidrs));
    }
}

#[test]
fn annotations_set_inbound_capture() {
    let key = |name: &str| format!("traffic.sidecar.istio.io/{name}");
    let inbound = |name: &str, value: &str| settings_with(&key(name), value).interception.inbound;
    assert_eq!(inbound("includeInboundPorts", "80").include_ports, Some(ports([80])));
    assert_eq!(inbound("includeInboundPorts", "*").include_ports, None);
    assert_eq!(inbound("includeInboundPorts", "").include_ports, Some(Vec::new()));
    assert_eq!(inbound("excludeInboundPorts", "80,81").exclude_ports, ports([80, 81]));
    assert_eq!(inbound("excludeInterfaces", "eth1").exclude_interfaces, ["eth1"]);
    for value in ["true", "1", "T"] {
        assert!(
            settings_with("ambient.istio.io/bypass-inbound-capture", value).interception.ingress
        );
    }
    assert!(
        !settings_with("ambient.istio.io/bypass-inbound-capture", "false").interception.ingress
    );
    let virtual_interfaces = settings_with("istio.io/reroute-virtual-interfaces", "net1,net2");
    assert_eq!(virtual_interfaces.interception.virtual_interfaces, ["net1", "net2"]);
}

#[test]
fn annotation_replaces_the_nodes_value() {
    let node_settings = "interception: {outbound: {exclude_ports: [22]}}";
    let pod = annotated(&[("traffic.sidecar.istio.io/excludeOutboundPorts", "80")]);
    assert_eq!(enrolled(node_settings, &pod).interception.outbound.exclude_ports, ports([80]));
}

#[test]
fn annotation_sets_dns_capture() {
    let node = "interception: {dns: capture, dns_servers: [10.0.0.10]}";
    let dns = |settings: &str, value: &str| {
        let pod = annotated(&[("ambient.istio.io/dns-capture", value)]);
        enrolled(settings, &pod).interception.dns
    };
    for value in ["true", "1"] {
        assert_eq!((dns("", value), dns(node, value)), (Dns::Capture, Dns::Capture));
    }
    assert_eq!((dns("", "false"), dns(node, "false")), (Dns::Off, Dns::Off));
    for value in ["yes", "capture"] {
        let error = error_of(&annotated(&[("ambient.istio.io/dns-capture", value)]));
        assert!(error.contains("ambient.istio.io/dns-capture"), "{error}");
    }
}

#[test]
fn rejects_hostile_annotation_values() {
    for (key, value) in [
        ("istio.io/reroute-virtual-interfaces", "eth0 -j ACCEPT"),
        ("istio.io/reroute-virtual-interfaces", "eth0\n-A OUTPUT -j ACCEPT"),
        ("istio.io/reroute-virtual-interfaces", "eth+"),
        ("istio.io/reroute-virtual-interfaces", "lo"),
        ("istio.io/reroute-virtual-interfaces", "a,,b"),
        ("traffic.sidecar.istio.io/excludeInterfaces", "\"; flush ruleset; \""),
        ("traffic.sidecar.istio.io/excludeInterfaces", "sixteen-letters-"),
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.0.0.0/33"),
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.0.0.0/8\n0.0.0.0/0"),
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/8,*"),
        ("traffic.sidecar.istio.io/includeOutboundPorts", "*"),
        ("traffic.sidecar.istio.io/excludeOutboundPorts", "80;443"),
        ("traffic.sidecar.istio.io/includeInboundPorts", "http"),
        ("traffic.sidecar.istio.io/excludeInboundPorts", "0"),
        ("ambient.istio.io/bypass-inbound-capture", "yes"),
    ] {
        let error = error_of(&annotated(&[(key, value)]));
        assert!(error.contains(&format!("annotation {key}")), "{key}={value:?}: {error}");
    }
}

#[test]
fn rejects_contradicting_annotations() {
    let error = error_of(&annotated(&[
        ("traffic.sidecar.istio.io/includeInboundPorts", "80"),
        ("traffic.sidecar.istio.io/excludeInboundPorts", "81"),
    ]));
    assert!(error.contains("excludeInboundPorts"), "{error}");
}

#[test]
fn reports_mistakes_of_all_annotations_at_once() {
    let error = error_of(&annotated(&[
        ("traffic.sidecar.istio.io/includeInboundPorts", "http"),
        ("istio.io/reroute-virtual-interfaces", "a/b"),
    ]));
    assert!(error.contains("includeInboundPorts") && error.contains("reroute"), "{error}");
}
