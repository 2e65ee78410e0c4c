//! The metrics of the pods of a node. The names of `workload_manager_*` are those of ztunnel.

use metrics::{counter, describe_counter, describe_gauge, gauge};

const PODS: &str = "underpass_pods";
const NOT_ADDED: &str = "underpass_pods_without_plugin";
const KUBERNETES: &str = "underpass_kubernetes_connected";
const BROKER_REFUSALS: &str = "underpass_broker_refusals_total";
const ACTIVE: &str = "workload_manager_active_proxy_count";
const PENDING: &str = "workload_manager_pending_proxy_count";
const STARTED: &str = "workload_manager_proxies_started_total";
const STOPPED: &str = "workload_manager_proxies_stopped_total";

/// The states that ztunnel counts too.
const SERVING: &str = "serving";
const WAITING: &str = "pending";

pub(super) fn describe() {
    describe_gauge!(PODS, "Pods of the node, by state.");
    describe_gauge!(NOT_ADDED, "Running pods of the node without a call of the CNI plugin.");
    describe_gauge!(KUBERNETES, "Whether changes of pods at the API server arrive (1) or not (0).");
    describe_counter!(
        BROKER_REFUSALS,
        "Messages of the proxy process that the broker refused, by reason."
    );
    describe_gauge!(ACTIVE, "Pods of the node that are served.");
    describe_gauge!(PENDING, "Pods of the node that wait for their enrolment.");
    describe_counter!(STARTED, "Pods of the node whose enrolment has succeeded.");
    describe_counter!(STOPPED, "Pods of the node that were served and have been removed.");
}

/// Reports the number of pods in each state.
pub(crate) fn states(counts: &[(&'static str, usize)]) {
    for (state, count) in counts {
        gauge!(PODS, "state" => *state).set(*count as f64);
        match *state {
            SERVING => gauge!(ACTIVE).set(*count as f64),
            WAITING => gauge!(PENDING).set(*count as f64),
            _ => {}
        }
    }
    // Before the first pod the counters are 0, not absent.
    counter!(STARTED).increment(0);
    counter!(STOPPED).increment(0);
}

/// Counts a pod that is served from now on.
pub(crate) fn started() {
    counter!(STARTED).increment(1);
}

/// Counts a pod that was served and has been removed.
pub(crate) fn stopped() {
    counter!(STOPPED).increment(1);
}

/// Reports the number of running pods that the container runtime has not added.
pub(crate) fn not_added(count: usize) {
    gauge!(NOT_ADDED).set(count as f64);
}

/// Reports whether changes of pods arrive from the API server.
pub(crate) fn kubernetes_connected(is_connected: bool) {
    gauge!(KUBERNETES).set(f64::from(is_connected));
}

/// Counts a message of the proxy process that the broker refused.
pub(crate) fn broker_refused(reason: &'static str) {
    counter!(BROKER_REFUSALS, "reason" => reason).increment(1);
}
