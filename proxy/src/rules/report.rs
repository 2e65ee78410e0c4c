//! Reports the rules of a pod for `/rules`: the plan with live counters, the path of each kind of
//! traffic through them, and differences from the plan.

use std::collections::HashMap;

use serde_json::{Value, json};
use underpass_interception::RuleCounter;

use crate::error::chain;
use crate::rules::capture::Capture;

impl Capture {
    /// The rules, each with its reason and its counter, and whether they are installed. A rule
    /// without a counter is not installed.
    pub(crate) async fn report(&self) -> Value {
        let profile = self.profile().to_string();
        let Some(rules) = self.rules() else {
            return json!({ "profile": profile, "installed_by_proxy": false });
        };
        let mut errors = Vec::new();
        let mut report = self.explain().await.unwrap_or_else(|error| {
            errors.push(chain(&error));
            rules.plan().json()
        });
        match rules.counters().await {
            Ok(counters) => add_counters(&mut report, &counters),
            Err(error) => errors.push(chain(&error)),
        }
        let difference = match rules.verify().await {
            Ok(difference) => difference.map(|difference| difference.to_string()),
            Err(error) => {
                errors.push(chain(&error));
                None
            }
        };
        let foreign = rules.foreign_rules().await.unwrap_or_default();
        let foreign: Vec<_> = foreign.iter().map(ToString::to_string).collect();
        let more = [
            ("profile", profile.into()),
            ("backend", rules.backend().to_string().into()),
            ("installed_by_proxy", true.into()),
            ("is_intact", (difference.is_none() && errors.is_empty()).into()),
            ("difference", difference.into()),
            ("foreign_rules", foreign.into()),
            ("errors", errors.into()),
        ];
        if let Some(fields) = report.as_object_mut() {
            fields.extend(more.map(|(key, value): (&str, Value)| (key.to_owned(), value)));
        }
        report
    }
}

/// Adds `packets` and `bytes` to each rule that has a counter.
fn add_counters(report: &mut Value, counters: &[RuleCounter]) {
    let mut sums: HashMap<&str, [u64; 2]> = HashMap::new();
    for counter in counters {
        let [packets, bytes] = sums.entry(&counter.id).or_default();
        *packets += counter.packets;
        *bytes += counter.bytes;
    }
    let rules = report.get_mut("rules").and_then(Value::as_array_mut);
    for rule in rules.into_iter().flatten().filter_map(Value::as_object_mut) {
        let id = rule.get("id").and_then(Value::as_str);
        if let Some([packets, bytes]) = id.and_then(|id| sums.get(id).copied()) {
            rule.insert("packets".to_owned(), packets.into());
            rule.insert("bytes".to_owned(), bytes.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_one_rule_are_added_up() {
        let mut report = json!({"rules": [{"id": "a"}, {"id": "b"}]});
        let counter = |packets, bytes| RuleCounter { id: "a".to_owned(), packets, bytes };
        add_counters(&mut report, &[counter(1, 10), counter(2, 20)]);
        let expected = json!({"rules": [{"id": "a", "packets": 3, "bytes": 30}, {"id": "b"}]});
        assert_eq!(report, expected);
    }
}
