//! Tests of lookups in the mesh. The first table has the cases of ztunnel's DNS tests.

use std::fmt::Write as _;

use super::*;
use crate::dns::name::encode;

const MESH: &str = "
services:
- {hostname: www.google.com, namespace: ns1, vips: [nw1/1.1.1.1]}
- {hostname: productpage.ns1.svc.cluster.local, namespace: ns1, vips: [nw1/9.9.9.9]}
- {hostname: example.ns2.svc.cluster.local, namespace: ns2, vips: [nw1/10.10.10.10]}
- {hostname: everywhere.io, namespace: ns2, vips: [nw1/10.10.10.110]}
- {hostname: everywhere.io, namespace: ns1, vips: [nw1/10.10.10.112]}
- {hostname: canonical.svc, namespace: ns2, vips: [nw1/10.10.10.140]}
- {hostname: canonical.svc, namespace: ns3, vips: [nw1/10.10.10.141], canonical: true}
- {hostname: canonical.with.local, namespace: ns1, vips: [nw1/10.10.10.150]}
- {hostname: canonical.with.local, namespace: ns2, vips: [nw1/10.10.10.151], canonical: true}
- hostname: details.ns2.svc.cluster.remote
  namespace: ns2
  vips: [nw1/11.11.11.11, nw1/12.12.12.12]
- {hostname: ipv4.localhost, namespace: ns1, vips: [nw1/2.2.2.2]}
- {hostname: ipv6.localhost, namespace: ns1, vips: ['nw1/2001:db8::1']}
- {hostname: dual.localhost, namespace: ns1, vips: [nw1/2.2.2.2, 'nw1/2001:db8::1']}
- {hostname: '*.wildcard', namespace: ns1, vips: [nw1/10.10.10.10]}
- {hostname: '*.b.wildcard', namespace: ns1, vips: [nw1/11.11.11.11]}
- {hostname: '*.svc.mesh.company.net', namespace: ns1, vips: [nw1/10.1.2.3]}
- {hostname: nw2-only.ns1.svc.cluster.local, namespace: ns1, vips: [nw2/20.20.20.20]}
- hostname: both-networks.ns1.svc.cluster.local
  namespace: ns1
  vips: [nw1/21.21.21.21, nw2/22.22.22.22]
- {hostname: headless.ns1.svc.cluster.local, namespace: ns1}
- {hostname: headless-v6.ns1.svc.cluster.local, namespace: ns1, ipFamilies: IPv6}
- {hostname: empty.ns1.svc.cluster.local, namespace: ns1}
- {hostname: headless.example.com, namespace: ns1}
- {hostname: no-endpoints.example.com, namespace: ns1}
- {hostname: hidden.ns2.svc.cluster.local, namespace: ns2, vips: [nw1/5.5.5.5], visibility: Namespace}
workloads:
- name: pod-0
  namespace: ns1
  network: nw1
  workloadIps: [30.30.30.30, '2001:db8::30']
  services: {ns1/headless.ns1.svc.cluster.local: {}}
- name: pod-1
  namespace: ns1
  network: nw1
  workloadIps: [31.31.31.31, '2001:db8::31']
  services: {ns1/headless.ns1.svc.cluster.local: {}}
- name: sick
  namespace: ns1
  network: nw1
  status: Unhealthy
  workloadIps: [39.39.39.39]
  services: {ns1/headless.ns1.svc.cluster.local: {}}
- name: far
  namespace: ns1
  network: nw2
  workloadIps: [38.38.38.38]
  services: {ns1/headless.ns1.svc.cluster.local: {}}
- name: external
  namespace: ns1
  network: nw1
  workloadIps: [32.32.32.32]
  services: {ns1/headless.example.com: {}}
- name: six
  namespace: ns1
  network: nw1
  workloadIps: [33.33.33.33, '2001:db8::33']
  services: {ns1/headless-v6.ns1.svc.cluster.local: {}}
";

fn name(text: &str) -> DomainName {
    let wire = encode(text).unwrap();
    let mut labels = Vec::new();
    let mut rest = &*wire;
    while let [length @ 1..=63, tail @ ..] = rest {
        let (label, tail) = tail.split_at(usize::from(*length));
        labels.push(label);
        rest = tail;
    }
    DomainName::of_labels(labels.into_iter())
}

fn pod() -> PodView {
    let [namespace, network, domain] = ["ns1", "nw1", "cluster.local"].map(str::to_owned);
    PodView { namespace, network, domain, ipv6: true }
}

fn looked_up(pod: &PodView, text: &str, kind: RecordType) -> String {
    let mesh = Mesh::from_text("mesh", MESH).unwrap();
    let search = ["ns1.svc.cluster.local", "svc.cluster.local", "cluster.local"];
    let Some(mut found) = find(&mesh, pod, &search.map(str::to_owned), &name(text), kind) else {
        return "forwarded".to_owned();
    };
    found.addresses.sort();
    let mut shown = found.alias.map(|labels| format!("alias of {labels} ")).unwrap_or_default();
    write!(shown, "{:?}", found.addresses).unwrap();
    shown
}

#[test]
fn names_of_ztunnels_tests_have_the_same_answers() {
    for (name, expected) in [
        ("www.google.com", "[1.1.1.1]"),
        ("WWW.Google.com.", "[1.1.1.1]"),
        ("www.google.com.ns1.svc.cluster.local", "alias of 3 [1.1.1.1]"),
        ("www.bing.com", "forwarded"),
        ("productpage.ns1.svc.cluster.local", "[9.9.9.9]"),
        ("productpage.ns1", "[9.9.9.9]"),
        ("productpage", "[9.9.9.9]"),
        ("productpage.ns1.ns1.svc.cluster.local", "alias of 2 [9.9.9.9]"),
        ("example.ns2", "[10.10.10.10]"),
        ("example.ns2.svc", "[10.10.10.10]"),
        ("example.ns2.svc.cluster.local", "[10.10.10.10]"),
        ("example.ns2.svc.cluster", "forwarded"),
        ("example.ns2.not-svc", "forwarded"),
        ("example", "forwarded"),
        ("details.ns2.svc.cluster.remote", "[11.11.11.11, 12.12.12.12]"),
        ("details.ns2", "forwarded"),
        ("dual.localhost", "[2.2.2.2]"),
        ("ipv6.localhost", "[]"),
        ("foo.wildcard", "[10.10.10.10]"),
        ("a.b.wildcard", "[11.11.11.11]"),
        ("foo.svc.mesh.company.net", "[10.1.2.3]"),
        ("foo.foons.svc.mesh.company.net", "[10.1.2.3]"),
        ("foo.svc.mesh.company.net.ns1.svc.cluster.local", "[10.1.2.3]"),
        ("nw2-only.ns1.svc.cluster.local", "[]"),
        ("both-networks.ns1.svc.cluster.local", "[21.21.21.21]"),
        ("headless.ns1.svc.cluster.local", "[30.30.30.30, 31.31.31.31]"),
        ("headless-v6.ns1.svc.cluster.local", "[]"),
        ("headless.pod0.ns1.svc.cluster.local", "forwarded"),
        ("headless.pod0.ns1", "forwarded"),
        ("no-endpoints.example.com", "forwarded"),
        ("headless.example.com", "forwarded"),
        ("everywhere.io", "[10.10.10.112]"),
        ("canonical.svc", "[10.10.10.141]"),
        ("canonical.with.local", "[10.10.10.150]"),
    ] {
        assert_eq!(looked_up(&pod(), name, RecordType::A), expected, "{name}");
    }
    for (name, expected) in [
        ("productpage.ns1.ns1.svc.cluster.local", "alias of 2 []"),
        ("dual.localhost", "[2001:db8::1]"),
        ("ipv4.localhost", "[]"),
        ("headless.ns1.svc.cluster.local", "[2001:db8::30, 2001:db8::31]"),
        ("headless-v6.ns1.svc.cluster.local", "[2001:db8::33]"),
    ] {
        assert_eq!(looked_up(&pod(), name, RecordType::AAAA), expected, "{name}");
    }
}

#[test]
fn pods_of_headless_services_have_names() {
    for name in ["pod-0.headless.ns1.svc.cluster.local", "pod-0.headless.ns1.svc", "pod-0.headless"]
    {
        assert_eq!(looked_up(&pod(), name, RecordType::A), "[30.30.30.30]", "{name}");
        assert_eq!(looked_up(&pod(), name, RecordType::AAAA), "[2001:db8::30]", "{name}");
    }
    for name in ["far.headless", "pod-9.headless", "pod-0.productpage"] {
        assert_eq!(looked_up(&pod(), name, RecordType::A), "forwarded", "{name}");
    }
}

#[test]
fn headless_service_without_endpoints_in_mesh_is_forwarded() {
    assert_eq!(looked_up(&pod(), "empty", RecordType::A), "forwarded");
}

#[test]
fn service_is_found_only_by_workloads_that_may_see_it() {
    let other = PodView { namespace: "ns2".to_owned(), ..pod() };
    assert_eq!(looked_up(&pod(), "hidden.ns2", RecordType::A), "forwarded");
    assert_eq!(looked_up(&other, "hidden.ns2", RecordType::A), "[5.5.5.5]");
}

#[test]
fn ipv6_addresses_are_hidden_if_they_are_not_captured() {
    let without = PodView { ipv6: false, ..pod() };
    assert_eq!(looked_up(&without, "dual.localhost", RecordType::AAAA), "[]");
    assert_eq!(looked_up(&without, "dual.localhost", RecordType::A), "[2.2.2.2]");
}

#[test]
fn other_types_find_the_name_without_addresses() {
    assert_eq!(looked_up(&pod(), "www.google.com", RecordType(65)), "[]");
    assert_eq!(looked_up(&pod(), "www.bing.com", RecordType(65)), "forwarded");
}

#[test]
fn names_that_no_service_can_have_are_forwarded() {
    let deep = format!("{}wildcard", "a.".repeat(40));
    assert_eq!(looked_up(&pod(), &deep, RecordType::A), "forwarded");
    let mesh = Mesh::from_text("mesh", MESH).unwrap();
    let odd = DomainName::of_labels([&b"www.google"[..], b"com"].into_iter());
    assert_eq!(find(&mesh, &pod(), &[], &odd, RecordType::A), None);
    let root = DomainName::of_labels(std::iter::empty());
    assert_eq!(find(&mesh, &pod(), &[], &root, RecordType::A), None);
}
