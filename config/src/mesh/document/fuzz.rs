//! Property tests of malformed documents: mutations of a valid one, and random text.

use proptest::prelude::*;

use crate::mesh::Mesh;

/// A valid document that uses every feature.
const VALID_DOCUMENT: &str = r#"workloads:
- uid: one
  name: a
  namespace: ns
  serviceAccount: web
  workloadIps: ["10.0.0.1", "fd00::1"]
  protocol: HBONE
  services: {"ns/example.com": {80: 8080}, ns/other: {}}
  locality: &here {region: r, zone: z, subzone: ""}
  waypoint: {destination: ns/example.com, hboneMtlsPort: 15008}
  applicationTunnel: {protocol: PROXY, port: 15088}
- name: b
  network: far
  locality: *here
  networkGateway: {destination: /10.0.0.1}
  status: Unhealthy
- {name: c, hostname: c.example.com, networkMode: HostNetwork, capacity: 3}
services:
- name: s
  namespace: ns
  hostname: example.com
  vips: [/127.10.0.1, remote/127.10.0.2]
  cidrVips: [{network: '', cidr: 10.1.2.3/16}]
  ports:
    80: 8080
    443: 0
  weightedWaypoints: [{destination: {destination: /10.0.0.1}, weight: 3}]
  loadBalancer: {routingPreferences: [Region, Node], mode: Failover}
  canonical: true
- {hostname: other, namespace: ns}
policies: []
"#;

/// The mesh or the errors of a document, as text. Reading twice must have the same outcome.
fn outcome(text: &str) -> String {
    match Mesh::from_text("mesh.yaml", text) {
        Ok(mesh) => format!("{:?} {:?}", mesh.workloads(), mesh.services()),
        Err(errors) => {
            assert!(!errors.problems.is_empty());
            errors.to_string()
        }
    }
}

fn check(text: &str) {
    assert_eq!(outcome(text), outcome(text), "{text}");
}

fn lines(keep: impl Fn(usize) -> bool) -> String {
    let lines = VALID_DOCUMENT.lines().enumerate().filter(|(at, _)| keep(*at));
    lines.map(|(_, line)| format!("{line}\n")).collect()
}

#[test]
fn accepts_valid_document() {
    let mesh = Mesh::from_text("mesh.yaml", VALID_DOCUMENT).unwrap();
    assert_eq!((mesh.workloads().len(), mesh.services().len()), (3, 2));
}

#[test]
fn reads_or_rejects_truncated_document() {
    for line in 0..VALID_DOCUMENT.lines().count() {
        check(&lines(|at| at != line));
        check(&lines(|at| at < line));
    }
}

proptest! {
    #[test]
    fn reads_or_rejects_document_with_flipped_bytes(
        flips in prop::collection::vec((0..VALID_DOCUMENT.len(), any::<u8>()), 1..8),
    ) {
        let mut bytes = VALID_DOCUMENT.as_bytes().to_vec();
        for (at, byte) in flips {
            bytes[at] = byte;
        }
        check(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn reads_or_rejects_document_with_swapped_words(swaps in prop::collection::vec((0..200_usize, 0..200_usize), 1..6)) {
        let mut words: Vec<_> = VALID_DOCUMENT.split_inclusive([' ', ',', '\n']).collect();
        for (one, other) in swaps {
            let count = words.len();
            words.swap(one % count, other % count);
        }
        check(&words.concat());
    }

    #[test]
    fn reads_or_rejects_document_with_value_of_other_type(
        line in 0..VALID_DOCUMENT.lines().count(),
        value in prop::sample::select(vec!["~", "[]", "{}", "[~]", "'x'", "-1", "99999999999", "*here", "!t x", "|\n   x", "&a [*a]"]),
    ) {
        let text: String = VALID_DOCUMENT.lines().enumerate().map(|(at, text)| match text.split_once(": ") {
            Some((key, _)) if at == line => format!("{key}: {value}\n"),
            _ => format!("{text}\n"),
        }).collect();
        check(&text);
    }

    #[test]
    fn reads_or_rejects_random_yaml(text in "(workloads|services|policies|[a-z0-9]{0,3}|[ \n:{}\\[\\],&*!|>'\"?#~-]){0,80}") {
        check(&text);
    }

    #[test]
    fn reads_or_rejects_random_text(text in ".{0,200}") {
        check(&text);
    }
}
