//! Tests of the order and combination of policies. The config crate tests the matching of one
//! policy.

use underpass_config::{Mesh, MeshBuilder, PolicyScope, Rules, SpiffeId, Workload, WorkloadDraft};

use super::*;

const WORKLOAD: &str = "\nworkloads: [{name: web, namespace: shop, workloadIps: [10.0.0.9]}]\n";

/// Makes a mesh from `deny! shop/name Scope RULES; ...`, where `!` marks a dry run.
fn mesh(policies: &str) -> Mesh {
    let mut text = "policies:\n".to_owned();
    for line in policies.split(';').map(str::trim).filter(|line| !line.is_empty()) {
        let mut words = line.splitn(4, ' ');
        let mut word = || words.next().unwrap();
        let (action, (namespace, name)) = (word(), word().split_once('/').unwrap());
        let (scope, rules) = (word(), word());
        let (action, dry_run) = (action.trim_end_matches('!'), action.ends_with('!'));
        let action = if action == "deny" { "Deny" } else { "Allow" };
        text.push_str(&format!(
            "- {{name: {name}, namespace: {namespace}, scope: {scope}, action: {action}, dryRun: {dry_run}, rules: {rules}}}\n"
        ));
    }
    Mesh::from_text("mesh.yaml", &(text + WORKLOAD)).unwrap_or_else(|error| panic!("{error}"))
}

struct Outcome {
    decision: String,
    dry_run: Vec<String>,
}

/// The decisions of `shop/web` on a connection from `td/ns/bank/sa/teller` to port 80.
fn evaluate(mesh: &Mesh) -> Outcome {
    let workload = mesh.workload("", [10, 0, 0, 9].into()).unwrap();
    let identity: SpiffeId = "spiffe://td/ns/bank/sa/teller".parse().unwrap();
    let connection = Connection {
        source: [10, 0, 0, 1].into(),
        destination: ([10, 0, 0, 9], 80).into(),
        identity: Some(&identity),
        aliases: &[],
    };
    let policies = mesh.policies(&workload.namespace, Some(workload));
    let decision = match decide(policies, &connection) {
        Ok(_) => "allowed".to_owned(),
        Err(denial) => denial.to_string(),
    };
    let dry_run = dry_run(policies, &connection).iter().map(ToString::to_string).collect();
    Outcome { decision, dry_run }
}

const NOT_ALLOWED: &str = "allow policies exist, but none allowed";

#[test]
fn evaluates_policies_in_istios_order() {
    for (policies, decision) in [
        ("", "allowed"),
        // In the rules, `[[]]` matches everything, `[]` nothing.
        ("deny shop/a Namespace []", "allowed"),
        ("deny shop/a Namespace [[]]", "explicitly denied by: shop/a"),
        ("allow shop/a Namespace []", NOT_ALLOWED),
        ("allow shop/a Namespace [[]]", "allowed"),
        ("allow shop/a Namespace []; allow shop/b Namespace [[]]", "allowed"),
        ("allow shop/a Namespace [[]]; allow shop/b Namespace []", "allowed"),
        ("allow shop/a Namespace []; allow shop/b Namespace []", NOT_ALLOWED),
        // DENY precedes ALLOW, in any order of the list.
        ("allow shop/a Namespace [[]]; deny shop/b Namespace [[]]", "explicitly denied by: shop/b"),
        ("deny shop/b Namespace [[]]; allow shop/a Namespace [[]]", "explicitly denied by: shop/b"),
        ("deny shop/a Namespace []; allow shop/b Namespace []", NOT_ALLOWED),
        ("deny shop/a Namespace []; allow shop/b Namespace [[]]", "allowed"),
        ("deny shop/a Namespace []; deny shop/b Namespace [[]]", "explicitly denied by: shop/b"),
        // Policies of other scopes do not apply.
        ("deny root/a Global [[]]", "explicitly denied by: root/a"),
        ("allow root/a Global []", NOT_ALLOWED),
        ("deny bank/a Namespace [[]]", "allowed"),
        ("allow bank/a Namespace []", "allowed"),
        ("deny shop/a WorkloadSelector [[]]", "allowed"),
        ("allow shop/a WorkloadSelector []", "allowed"),
        ("allow root/a Global [[]]; deny shop/b Namespace [[]]", "explicitly denied by: shop/b"),
        ("deny root/a Global [[]]; allow shop/b Namespace [[]]", "explicitly denied by: root/a"),
        ("allow root/a Global []; allow shop/b Namespace [[]]", "allowed"),
        // The client has the identity td/ns/bank/sa/teller.
        ("allow shop/a Namespace [[[{namespaces: [!Exact bank]}]]]", "allowed"),
        ("allow shop/a Namespace [[[{namespaces: [!Exact shop]}]]]", NOT_ALLOWED),
        ("deny shop/a Namespace [[[{destinationPorts: [80]}]]]", "explicitly denied by: shop/a"),
        ("deny shop/a Namespace [[[{notDestinationPorts: [80]}]]]", "allowed"),
        // Dry runs do not change the decision.
        ("deny! shop/a Namespace [[]]", "allowed"),
        ("allow! shop/a Namespace []", "allowed"),
        ("allow shop/a Namespace []; allow! shop/b Namespace [[]]", NOT_ALLOWED),
        ("allow shop/a Namespace [[]]; deny! root/b Global [[]]", "allowed"),
    ] {
        assert_eq!(evaluate(&mesh(policies)).decision, decision, "{policies}");
    }
}

#[test]
fn workload_selects_policies_of_any_scope_and_namespace() {
    let everything = Rules::from(vec![vec![]]);
    let policy = |name: &str, namespace: &str, scope, action| Policy {
        name: name.into(),
        namespace: namespace.into(),
        scope,
        action,
        dry_run: false,
        rules: everything.clone(),
    };
    let decision = |names: &[&str]| {
        let mut builder = MeshBuilder::default();
        let selected = PolicyScope::WorkloadSelector;
        builder.policy(policy("all", "shop", selected, PolicyAction::Allow));
        builder.policy(policy("none", "shop", selected, PolicyAction::Deny));
        builder.policy(policy("theirs", "bank", PolicyScope::Namespace, PolicyAction::Deny));
        builder.policy(Policy {
            rules: Rules::default(),
            ..policy("unmatched", "shop", selected, PolicyAction::Allow)
        });
        let workload = mesh("").workload("", [10, 0, 0, 9].into()).unwrap().clone();
        builder.workload(WorkloadDraft {
            workload: Workload::clone(&workload),
            services: Vec::new(),
            policies: names.iter().map(|name| (*name).into()).collect(),
        });
        evaluate(&builder.build().unwrap()).decision
    };
    assert_eq!(decision(&[]), "allowed");
    assert_eq!(decision(&["shop/all"]), "allowed");
    assert_eq!(decision(&["shop/unmatched"]), NOT_ALLOWED);
    assert_eq!(decision(&["shop/unmatched", "shop/all"]), "allowed");
    assert_eq!(decision(&["shop/all", "shop/none"]), "explicitly denied by: shop/none");
    assert_eq!(decision(&["bank/theirs"]), "explicitly denied by: bank/theirs");
}

#[test]
fn dry_run_policies_report_their_decisions() {
    const NO_DECISIONS: &[&str] = &[];
    for (policies, expected) in [
        ("", NO_DECISIONS),
        ("deny shop/a Namespace [[]]; allow shop/b Namespace [[]]", NO_DECISIONS),
        ("deny! shop/a Namespace []", NO_DECISIONS),
        ("deny! shop/a Namespace [[]]", &["dry run: would be denied by: shop/a"]),
        (
            "deny! shop/a Namespace [[]]; deny! shop/b Namespace [[]]",
            &["dry run: would be denied by: shop/a", "dry run: would be denied by: shop/b"],
        ),
        ("allow! shop/a Namespace [[]]", &["dry run: would be allowed by: shop/a"]),
        ("allow! shop/a Namespace []", &["dry run: would not be allowed by any policy"]),
        (
            "allow! shop/a Namespace []; allow! shop/b Namespace [[]]",
            &["dry run: would be allowed by: shop/b"],
        ),
        // An enforced ALLOW policy matches, so the dry-run ALLOW policy is not reported.
        ("allow! shop/a Namespace []; allow shop/b Namespace [[]]", NO_DECISIONS),
        ("allow! shop/a Namespace []; allow shop/b Namespace []", NO_DECISIONS),
        // DENY is reported first; ALLOW only if no enforced policy denies.
        (
            "allow! shop/a Namespace [[]]; deny! shop/b Namespace [[]]",
            &["dry run: would be denied by: shop/b", "dry run: would be allowed by: shop/a"],
        ),
        (
            "deny! shop/a Namespace [[]]; allow! shop/b Namespace []",
            &["dry run: would be denied by: shop/a", "dry run: would not be allowed by any policy"],
        ),
        (
            "allow! shop/a Namespace [[]]; deny! shop/b Namespace [[]]; deny shop/c Namespace [[]]",
            &["dry run: would be denied by: shop/b"],
        ),
        // Policies of other scopes are not reported.
        ("deny! bank/a Namespace [[]]; deny! shop/a WorkloadSelector [[]]", NO_DECISIONS),
    ] {
        assert_eq!(evaluate(&mesh(policies)).dry_run, expected, "{policies}");
    }
}
