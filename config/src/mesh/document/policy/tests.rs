//! Tests of reading policies. `mesh/policy/tests.rs` tests their evaluation.

use crate::mesh::{Mesh, PolicyAction, PolicyScope};

fn mistakes(text: &str) -> Vec<String> {
    let problems = Mesh::from_text("m", text).expect_err(text).problems;
    problems.iter().map(ToString::to_string).collect()
}

/// The only mistake of a policy with this match, without the location.
fn mistake_in(one_match: &str) -> String {
    let text = format!(
        "policies:\n- {{name: p, namespace: n, scope: Global, action: Deny, rules: [[[{one_match}]]]}}\n"
    );
    let found = mistakes(&text);
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].split_once("rules[0][0][0]").unwrap().1.to_owned()
}

#[test]
fn scope_selects_workloads() {
    let text = "
policies:
- {name: everywhere, namespace: root, scope: Global, action: Deny, dryRun: false, rules: []}
- {name: here, namespace: shop, scope: Namespace, action: Allow, dryRun: true, rules: [[]]}
- {name: picked, namespace: shop, scope: WorkloadSelector, action: Deny, rules: []}
";
    let mesh = Mesh::from_text("m", text).unwrap();
    let names = |namespace| -> Vec<_> {
        mesh.policies(namespace, None).iter().map(ToString::to_string).collect()
    };
    assert_eq!(names("shop"), ["root/everywhere", "shop/here"]);
    assert_eq!(names("bank"), ["root/everywhere"]);
    assert_eq!(mesh.size().policies, 3);
    let here = mesh.policies("shop", None).iter().nth(1).unwrap();
    assert_eq!((here.scope, here.action), (PolicyScope::Namespace, PolicyAction::Allow));
    assert!(here.dry_run);
}

#[test]
fn requires_keys_that_restrict_policy() {
    assert_eq!(
        mistakes("policies: [{}]"),
        [
            "m:1:12: policies[0].name: is needed",
            "m:1:12: policies[0].namespace: is needed",
            "m:1:12: policies[0].scope: is needed",
            "m:1:12: policies[0].action: is needed",
            "m:1:12: policies[0].rules: is needed",
        ]
    );
    let rules = |rules: &str| {
        mistakes(&format!(
            "policies:\n- {{name: p, namespace: n, scope: Global, action: Allow, rules: {rules}}}\n"
        ))
    };
    assert_eq!(rules("~"), ["m:2:64: policies[0].rules: is needed"]);
    assert_eq!(rules("[~]"), ["m:2:65: policies[0].rules[0]: is needed"]);
    assert_eq!(rules("[[~]]"), ["m:2:66: policies[0].rules[0][0]: is needed"]);
    assert_eq!(
        rules("[[[~]]]"),
        [
            "m:2:67: policies[0].rules[0][0][0]: must be a mapping of conditions, such as {destinationPorts: [80]}"
        ]
    );
    assert_eq!(
        rules("[[{sourceIps: [10.0.0.1]}]]"),
        ["m:2:66: policies[0].rules[0][0]: must be a list"]
    );
    assert_eq!(rules("[[[x]]]").len(), 1);
}

#[test]
fn rejects_unknown_words_and_keys() {
    let text = "policies:\n- {name: a/b, namespace: n, scope: global, action: Log, rules: [], dryRun: maybe, dryrun: x}\n";
    assert_eq!(
        mistakes(text),
        [
            "m:2:91: policies[0].dryrun: \"x\": no such key",
            "m:2:10: policies[0].name: \"a/b\": must not contain '/'",
            "m:2:36: policies[0].scope: \"global\": must be one of Global, Namespace, WorkloadSelector",
            "m:2:52: policies[0].action: \"Log\": must be one of Allow, Deny",
            "m:2:76: policies[0].dryRun: \"maybe\": must be true or false",
        ]
    );
    assert_eq!(mistake_in("{sourceIp: [10.0.0.1]}"), ".sourceIp: no such key");
    let empty_namespace =
        "policies: [{name: p, namespace: '', scope: Namespace, action: Deny, rules: []}]";
    assert_eq!(
        mistakes(empty_namespace),
        ["m:1:33: policies[0].namespace: \"\": must not be empty with scope: Namespace"]
    );
}

#[test]
fn invalid_value_rejects_policy() {
    let cidr = "must be a CIDR or an address, such as 10.0.0.0/8, 10.1.2.3 or fd00::/8";
    for (text, key) in [
        ("10.0.0.0/33", "sourceIps"),
        ("10.0.0", "notSourceIps"),
        ("fd00::/129", "destinationIps"),
        ("10.0.0.0/+8", "notDestinationIps"),
        ("10.0.0.0/", "sourceIps"),
        ("any", "sourceIps"),
    ] {
        let found = mistake_in(&format!("{{{key}: [\"{text}\"]}}"));
        assert_eq!(found, format!(".{key}[0]: \"{text}\": {cidr}"));
    }
    for text in ["0", "65536", "-1", "http", "8000-8100"] {
        let found = mistake_in(&format!("{{destinationPorts: [80, {text}]}}"));
        assert_eq!(found, format!(".destinationPorts[1]: \"{text}\": must be a port, 1 to 65535"));
    }
    assert_eq!(mistake_in("{destinationPorts: [~]}"), ".destinationPorts[0]: is needed");
    assert_eq!(
        mistake_in("{sourceIps: [!Not 10.0.0.1]}"),
        ".sourceIps[0]: \"10.0.0.1\": must have no tag"
    );
    assert_eq!(mistake_in("{destinationPorts: 80}"), ".destinationPorts: \"80\": must be a list");
    for key in ["principals", "notNamespaces", "sourceIps", "destinationPorts"] {
        let reason = "has no values";
        assert_eq!(mistake_in(&format!("{{{key}: }}")), format!(".{key}: {reason}"));
    }
}

#[test]
fn string_match_requires_kind() {
    let typeless = "must name one kind of match";
    for (written, reason) in [
        ("shop", typeless),
        ("~", typeless),
        ("[]", typeless),
        ("{}", typeless),
        ("{exact: a, prefix: b}", typeless),
        ("{exakt: a}", "no such key"),
        ("{exact: ~}", "is needed"),
        ("{exact: !Exact a}", "must have no tag"),
        ("{presence: false}", "must be true"),
        ("{presence: ~}", "must be true"),
        ("!Regex a", "must be one of !Exact, !Prefix, !Suffix and !Presence"),
        ("!exact a", "must be one of !Exact, !Prefix, !Suffix and !Presence"),
        ("!Exact ", "needs a text"),
        ("!Prefix [a]", "must be a single value"),
        ("!Presence [a]", "must be !Presence []"),
        ("!Presence a", "must be !Presence []"),
    ] {
        for key in ["namespaces", "notPrincipals"] {
            let found = mistake_in(&format!("{{{key}: [{written}]}}"));
            assert!(found.contains(reason), "{written}: {found}");
        }
    }
}

#[test]
fn rejects_principal_with_scheme() {
    for written in ["!Exact spiffe://td/ns/a/sa/b", "{prefix: 'spiffe://td'}", "!Suffix 'spiffe:'"]
    {
        let found = mistake_in(&format!("{{principals: [{written}]}}"));
        assert!(found.contains("must be written without spiffe://"), "{found}");
    }
}

#[test]
fn service_account_requires_namespace() {
    assert_eq!(
        mistake_in("{serviceAccounts: [{serviceAccount: a}]}"),
        ".serviceAccounts[0].namespace: is needed"
    );
    assert_eq!(
        mistake_in("{notServiceAccounts: [~]}"),
        ".notServiceAccounts[0]: must be {namespace: NAMESPACE, serviceAccount: NAME}"
    );
    assert!(
        mistake_in("{serviceAccounts: [{namespace: n, serviceAccount: a, x: y}]}")
            .contains("no such key")
    );
    assert!(mistake_in("{serviceAccounts: [n/a]}").contains("must be {namespace"));
}
