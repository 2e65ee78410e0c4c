//! Reports connections that `interception.kubelet_probes` exempts from mTLS and policies: logs a
//! warning at the start, then counts and logs these connections.
//!
//! The interception crate defines the rule. `decide/policy.rs` exempts probes that reach the proxy
//! from `proxy.mtls`.

use std::time::Duration;

use underpass_config::{InterceptionSettings, KubeletProbes, Profile, interval_at_multiples};
use underpass_interception::{
    Interception, KUBELET_PROBE_IN, KUBELET_PROBE_V4, KUBELET_PROBE_V6, RuleCounter,
};

use crate::error::chain;
use crate::observe::metrics;

/// The interval of reading the rule's counter, and so the minimum time between two log lines.
const READ_INTERVAL: Duration = Duration::from_secs(60);

/// Logs the exempt ports. Only the ambient profile identifies the kubelet by its source address.
pub(crate) fn warn(settings: &InterceptionSettings) {
    let probes = &settings.kubelet_probes;
    let ports = match probes {
        _ if settings.profile != Profile::Ambient => return,
        KubeletProbes::Off => return,
        KubeletProbes::On => "all".to_owned(),
        KubeletProbes::Ports(_) => probes.to_string(),
    };
    tracing::warn!(
        ports,
        hint =
            "use interception.kubelet_probes only where a node agent reserves that source address",
        "connections from {KUBELET_PROBE_V4} and {KUBELET_PROBE_V6} to these ports are exempt from mTLS and policies"
    );
}

/// Counts and logs the connections that `rules` exempt, if this proxy installs them. Never returns.
pub(crate) async fn watch(rules: Option<&Interception>) {
    let Some(interception) = rules else { return };
    metrics::kubelet_probes(0);
    let mut increase = CounterIncrease::default();
    let mut readings = interval_at_multiples(READ_INTERVAL);
    loop {
        match interception.counters().await {
            Ok(counters) => report(increase.to(exempted(&counters))),
            Err(error) => tracing::debug!(error = chain(&error), "cannot read the rules' counters"),
        }
        readings.tick().await;
    }
}

/// Counts and logs connections that the rules have exempted.
fn report(connections: u64) {
    if connections > 0 {
        metrics::kubelet_probes(connections);
        tracing::info!(
            connections,
            "connections from the kubelet's probe address bypassed the proxy (interception.kubelet_probes)"
        );
    }
}

/// The number of connections that the rules of both address families have exempted.
fn exempted(counters: &[RuleCounter]) -> u64 {
    let is_exemption = |counter: &&RuleCounter| {
        counter.id.strip_prefix(KUBELET_PROBE_IN).is_some_and(|rest| matches!(rest, "" | "-v6"))
    };
    counters.iter().filter(is_exemption).map(|counter| counter.packets).sum()
}

/// Computes the increase of a kernel counter between two readings. The first reading is the base,
/// because an earlier process may have counted. A replaced rule counts from zero.
#[derive(Debug, Default)]
struct CounterIncrease {
    last: Option<u64>,
}

impl CounterIncrease {
    fn to(&mut self, now: u64) -> u64 {
        match self.last.replace(now) {
            None => 0,
            Some(last) if now < last => now,
            Some(last) => now - last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_increase_restarts_from_zero_for_replaced_rule() {
        let mut increase = CounterIncrease::default();
        let increases: Vec<u64> = [7, 7, 9, 2, 3].map(|now| increase.to(now)).into();
        assert_eq!(increases, [0, 0, 2, 2, 1]);
    }

    #[test]
    fn exempted_packets_of_both_families_are_summed() {
        let counter = |id: &str, packets| RuleCounter { id: id.to_owned(), packets, bytes: 0 };
        let counters = [
            counter("kubelet-probe-in", 3),
            counter("kubelet-probe-in-v6", 4),
            counter("kubelet-probe-out", 10),
            counter("reject-kubelet-probe-in-v6", 20),
        ];
        assert_eq!(exempted(&counters), 7);
    }
}
