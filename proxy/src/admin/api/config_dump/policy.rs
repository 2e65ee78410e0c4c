//! A policy with ztunnel's keys.

use serde::Serialize;
use serde_json::{Map, Value, json};
use underpass_config::{Condition, Match, Policy, PolicyAction, PolicyScope, StringMatch, Values};

use super::append;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyDump<'a> {
    name: &'a str,
    namespace: &'a str,
    scope: &'static str,
    action: &'static str,
    rules: Vec<Vec<Vec<Value>>>,
    dry_run: bool,
}

pub(super) fn write(policy: &Policy, chunk: &mut Vec<u8>) {
    let clause = |clause: Vec<Match>| clause.iter().map(match_dump).collect();
    let rule = |rule: Vec<Vec<Match>>| rule.into_iter().map(clause).collect();
    let dump = PolicyDump {
        name: &policy.name,
        namespace: &policy.namespace,
        scope: match policy.scope {
            PolicyScope::Global => "Global",
            PolicyScope::Namespace => "Namespace",
            PolicyScope::WorkloadSelector => "WorkloadSelector",
        },
        action: match policy.action {
            PolicyAction::Allow => "Allow",
            PolicyAction::Deny => "Deny",
        },
        rules: policy.rules.to_lists().into_iter().map(rule).collect(),
        dry_run: policy.dry_run,
    };
    append(chunk, &dump);
}

fn match_dump(conditions: &Match) -> Value {
    conditions.conditions().iter().map(field).collect::<Map<_, _>>().into()
}

/// The key and the values of a condition.
fn field(condition: &Condition) -> (String, Value) {
    let (values, negated) = condition.values();
    let [key, negated_key] = match values {
        Values::DestinationPorts(_) => ["destinationPorts", "notDestinationPorts"],
        Values::SourceIps(_) => ["sourceIps", "notSourceIps"],
        Values::DestinationIps(_) => ["destinationIps", "notDestinationIps"],
        Values::Namespaces(_) => ["namespaces", "notNamespaces"],
        Values::ServiceAccounts(_) => ["serviceAccounts", "notServiceAccounts"],
        Values::Principals(_) => ["principals", "notPrincipals"],
    };
    let account = |(namespace, name): &(String, String)| json!({ "namespace": namespace, "serviceAccount": name });
    let values = match values {
        Values::DestinationPorts(ports) => json!(ports),
        Values::SourceIps(cidrs) | Values::DestinationIps(cidrs) => {
            cidrs.iter().map(|cidr| Value::from(cidr.to_string())).collect()
        }
        Values::Namespaces(texts) | Values::Principals(texts) => texts.iter().map(text).collect(),
        Values::ServiceAccounts(accounts) => accounts.iter().map(account).collect(),
    };
    ((if negated { negated_key } else { key }).to_owned(), values)
}

fn text(text: &StringMatch) -> Value {
    match text {
        StringMatch::Exact(text) => json!({ "Exact": text }),
        StringMatch::Prefix(text) => json!({ "Prefix": text }),
        StringMatch::Suffix(text) => json!({ "Suffix": text }),
        StringMatch::Presence => json!({ "Presence": [] }),
    }
}
