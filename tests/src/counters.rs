//! Reads the rule counters of a pod, and computes which rules matched since an earlier reading.

use std::collections::BTreeMap;

use underpass_interception::{NamespaceAccess, counters};

use crate::or_fail::OrFail;
use crate::pods::Pod;

/// The rules that count packets instead of connections.
const PACKET_COUNTERS: [&str; 3] = ["proxy-zone", "mark-proxy-connection", "return-to-proxy"];
/// The prefix of rules that only jump to own chains.
const JUMP: &str = "enter-";

/// A reading of a pod's rule counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>);

impl Pod {
    /// Reads the rule counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let read = self.run(|| -> std::io::Result<_> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(counters(&NamespaceAccess::current()?)))
        });
        let read = read.or_fail("make a runtime").or_fail("read the rules' counters");
        Counters(read.into_iter().map(|counter| (counter.id, counter.packets)).collect())
    }

    /// The rules that have matched since `before`, sorted by name, with the number of connections.
    #[must_use]
    pub fn connections_since(&self, before: &Counters) -> Vec<(String, u64)> {
        let mut since = self.counters().since(before);
        since.retain(|(rule, _)| {
            !PACKET_COUNTERS.contains(&rule.as_str()) && !rule.starts_with(JUMP)
        });
        since
    }
}

impl Counters {
    /// The counter of a rule; 0 if the rule does not exist.
    #[must_use]
    pub fn get(&self, rule: &str) -> u64 {
        self.0.get(rule).copied().unwrap_or(0)
    }

    /// Whether there are no rules.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The changed counters, each with its increase.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<(String, u64)> {
        let increases = self.0.iter().map(|(rule, now)| (rule.clone(), now - before.get(rule)));
        increases.filter(|(_, by)| *by > 0).collect()
    }
}
