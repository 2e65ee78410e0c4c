//! Tests of valid, invalid and random pod files.

use proptest::prelude::*;

use super::*;

const VALID: &str = r#"uid: 0c1f-a
netns: /run/netns/pod-a
workload: {name: client-1, namespace: shop, serviceAccount: client}
ips: [10.0.0.1, "fd00::1"]
labels: {istio.io/dataplane-mode: ambient, empty: }
annotations:
  traffic.sidecar.istio.io/excludeOutboundPorts: "22,80"
  note: |
    two
    lines
interception:
  outbound: {exclude_ports: [443]}
dns: {nameservers: [10.0.0.53, "fd00::53"], search: [shop.example], options: [timeout:1]}
"#;

fn mistakes(text: &str) -> Vec<String> {
    let Err(errors) = PodFile::parse("a.yaml", text) else { return Vec::new() };
    errors.problems.iter().map(ToString::to_string).collect()
}

#[test]
fn parses_every_key() {
    let file = PodFile::parse("a.yaml", VALID).unwrap();
    assert_eq!((file.uid.as_str(), file.netns.to_str()), ("0c1f-a", Some("/run/netns/pod-a")));
    let names = [&file.name, &file.namespace, &file.service_account];
    assert_eq!(names, ["client-1", "shop", "client"]);
    assert_eq!(file.ips.len(), 2);
    assert_eq!(file.labels["empty"], "");
    assert_eq!(file.annotations["note"], "two\nlines\n");
    assert!(file.interception.is_some());
    assert_eq!((file.dns.policy, file.dns.nameservers.len()), (DnsPolicy::None, 2));
    assert_eq!((&*file.dns.search[0], &*file.dns.options[0]), ("shop.example", "timeout:1"));
}

#[test]
fn optional_keys_may_be_absent() {
    let file = "uid: a\nnetns: /a\nips: 10.0.0.1\n\
        workload: {name: a, namespace: b, serviceAccount: c}";
    let file = PodFile::parse("a.yaml", file).unwrap();
    assert!(file.labels.is_empty() && file.annotations.is_empty() && file.interception.is_none());
    assert_eq!(file.dns, PodDns::default());
}

#[test]
fn reports_every_missing_key_at_once() {
    let found = mistakes("labels: {}");
    for key in
        ["uid", "netns", "workload.name", "workload.namespace", "workload.serviceAccount", "ips"]
    {
        assert!(found.iter().any(|one| one.contains(&format!("{key}: is missing"))), "{key}");
    }
    assert_eq!(found.len(), 6, "{found:?}");
}

#[test]
fn reports_every_mistake_with_its_place() {
    let found = mistakes(
        "uid: a/b\nnetns: run/a\nips: [10.0.0.1, x]\nlabel: {}\nlabels: {a: [1]}\n\
         workload: {name: '', namespace: b, serviceaccount: c}\n\
         dns: {nameservers: [x, 127.0.0.1], search: ['a b'], domain: a}",
    );
    for part in [
        "a.yaml:1:6: uid: \"a/b\"",
        "a.yaml:2:8: netns: \"run/a\"",
        "a.yaml:3:17: ips[1]: \"x\"",
        "label: no such key",
        "labels.a: must be a single value",
        "workload.name: \"\": must not be empty",
        "workload.serviceaccount: \"c\": no such key",
        "workload.serviceAccount: is missing",
        "dns.nameservers[0]: \"x\"",
        "dns.nameservers: must not be loopback addresses",
        "dns.search[0]: \"a b\"",
        "dns.domain: \"a\": no such key",
    ] {
        assert!(found.iter().any(|one| one.contains(part)), "{part}: {found:#?}");
    }
}

#[test]
fn rejects_document_that_is_not_a_pod() {
    for text in ["", "[]", "a", "uid: [", "ips: []", "ips: ", "ips: ''"] {
        assert!(!mistakes(text).is_empty(), "{text}");
    }
    let no_ips = VALID.replace("[10.0.0.1, \"fd00::1\"]", "[]");
    assert_eq!(mistakes(&no_ips).len(), 1);
}

/// Checks that parsing is deterministic, and returns either a file or an error.
fn check(text: &str) {
    let [first, second] = [(); 2].map(|()| PodFile::parse("a.yaml", text));
    assert_eq!(first, second);
    if let Err(errors) = first {
        assert!(!errors.problems.is_empty());
    }
}

proptest! {
    #[test]
    fn reads_any_text_without_panic(text in "\\PC{0,400}") {
        check(&text);
    }

    #[test]
    fn reads_mutated_file_without_panic(at in 0..VALID.len(), with in "\\PC{0,3}", cut in 0..9usize) {
        let (head, tail) = (VALID.get(..at), VALID.get(at + cut..));
        if let (Some(head), Some(tail)) = (head, tail) {
            check(&format!("{head}{with}{tail}"));
        }
    }
}
