//! Updates the facts about the attached pods, and finds the pods that were never attached.
//!
//! A pod whose labels, annotations or service account change is enrolled, changed or exempted while
//! it runs. A pod of an earlier process is enrolled once its facts are known.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use underpass_config::{Hint as _, PodDns, PodUid, next_multiple};

use super::{Entry, Ledger, Progress};
use crate::error::chain;
use crate::observe::metrics;
use crate::pods::cni::attachment::PodReference;
use crate::pods::cni::facts::{FactOrigin, facts_of};
use crate::pods::cni::report::{Condition, Report};
use crate::pods::cni::results::{CniResults, Sandbox};
use crate::pods::cni::unadded::{UnaddedChange, UnaddedPods};
use crate::pods::enrolment::EnrolError;
use crate::pods::facts::PodFacts;
use crate::pods::kubernetes::objects::ClusterPod;
use crate::process::pause_gate::PauseGate;

/// The interval at which the runtime's results are read: no call reports a pod that was added
/// without the plugin.
const RESULTS_INTERVAL: Duration = Duration::from_secs(10);
/// The maximum number of pods that the message of a problem names.
const MAX_NAMED: usize = 3;

impl Ledger {
    /// Follows the facts while `gate` is open. Never returns.
    pub(in crate::pods::cni) async fn follow_facts(
        self: Arc<Self>,
        results: CniResults,
        report: Arc<Report>,
        gate: PauseGate,
    ) {
        let mut origin = self.facts.origin();
        let mut unadded = UnaddedPods::default();
        let mut results_due = Instant::now();
        loop {
            // Pods without an addition may be added or end at any time.
            let are_results_due = results_due <= Instant::now() || !unadded.is_empty();
            let apply = async {
                self.apply_facts();
                let running = match &origin {
                    FactOrigin::Kubernetes(_) => self.running_in_cluster(&origin),
                    // One file for each pod of the node: too much for each addition and removal.
                    FactOrigin::Mesh(_) => {
                        are_results_due.then(|| self.running_by_results(&results))
                    }
                };
                let next = running.and_then(|running| self.report_unadded(running, &mut unadded));
                report_conditions(&origin, &unadded, &report);
                next
            };
            // It waits while another process takes over: then the pods must not change.
            let Some(next) = gate.pass(apply).await else { continue };
            if are_results_due {
                results_due = next_multiple(RESULTS_INTERVAL);
            }
            let grace_ends = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = origin.changed() => {}
                () = self.changed.notified() => {}
                () = grace_ends => {}
                () = sleep_until(results_due) => {}
            }
        }
    }

    /// Passes changed facts to the registry. If the facts of a pod are no longer found, the last
    /// ones stay: after a restart those that the earlier process has stored.
    pub(super) fn apply_facts(&self) {
        for entry in self.known().entries.values_mut() {
            match self.facts.find(&entry.pod) {
                Ok(facts) if entry.facts.current.as_ref() == Some(&facts) => {}
                Ok(facts) => self.enrol(entry, facts),
                Err(problem) if entry.facts.current.is_none() => {
                    let hint = problem.hint();
                    entry.log(problem.to_string(), hint.as_deref());
                    if let Some(stored) = entry.facts.stored.clone().filter(|_| problem.is_outage())
                    {
                        tracing::warn!(uid = %entry.pod.pod.uid, "enrolling a pod with stored facts");
                        self.enrol(entry, stored);
                    }
                }
                Err(_) => {}
            }
        }
    }

    fn enrol(&self, entry: &mut Entry, facts: PodFacts) {
        match (self.open)(Path::new(&entry.pod.namespace_path)) {
            Ok(namespace) if namespace.id() == entry.namespace => {
                // The registry retries failed enrolments.
                drop(self.registry.add(facts.clone(), namespace));
                entry.facts.current = Some(facts);
                entry.problem = None;
                self.store(entry);
            }
            // The sweep removes the pod.
            Ok(_) => {}
            Err(error) => {
                let hint = error.hint();
                entry.log(chain(&error), hint.as_deref());
            }
        }
    }

    /// Stores the new facts of a pod that an earlier call has stored.
    fn store(&self, entry: &mut Entry) {
        // The file has `stored` only until the next save, so each later change is new.
        let is_new = entry.facts.stored.take() != entry.facts.current;
        if is_new
            && entry.progress == Progress::Enrolled
            && let Err(error) = self.store.save(&entry.to_store())
        {
            let hint = "free space in the folder of the daemon's socket";
            tracing::warn!(%error, hint, uid = %entry.pod.pod.uid, "cannot store the facts of a pod");
        }
    }

    /// Reports pods that run without an addition as failed. Returns the time at which another pod
    /// may have to be reported.
    fn report_unadded(&self, running: Vec<PodFacts>, unadded: &mut UnaddedPods) -> Option<Instant> {
        let UnaddedChange { new, gone, next } = unadded.update(Instant::now(), running);
        // Holding the lock ensures that a concurrent addition adds its pod to the registry later.
        let known = self.known();
        for facts in new.into_iter().filter(|facts| !known.has(&facts.uid)) {
            let (pod, uid) = (facts.full_name(), facts.uid.clone());
            let error = EnrolError::NotAdded;
            let hint = error.hint();
            tracing::error!(pod, %uid, %error, hint = hint.as_deref(), "a pod bypasses the mesh");
            self.registry.fail(facts, error);
        }
        for uid in gone.into_iter().filter(|uid| !known.has(uid)) {
            drop(self.registry.remove(&uid));
        }
        metrics::pods::not_added(unadded.names().len());
        next
    }

    /// The running pods that should have been added and have no attachment; `None` without a list
    /// of the node's pods.
    fn running_in_cluster(&self, origin: &FactOrigin) -> Option<Vec<PodFacts>> {
        let added: BTreeSet<PodUid> = {
            let known = self.known();
            known.entries.values().map(|entry| entry.pod.pod.uid.clone()).collect()
        };
        let view = origin.cluster().filter(|view| view.is_complete())?;
        let is_candidate = |pod: &&ClusterPod| {
            pod.is_running
                && !pod.host_network
                && !pod.addresses.is_empty()
                && !added.contains(&pod.uid)
        };
        let candidates = view.pods().map(|pod| &**pod).filter(is_candidate);
        let facts = candidates.filter_map(|pod| facts_of(&view, pod, pod.addresses.clone()).ok());
        Some(facts.filter(|facts| self.facts.selects(facts)).collect())
    }

    /// The pods that the runtime has connected to a network, and that have no attachment.
    fn running_by_results(&self, results: &CniResults) -> Vec<PodFacts> {
        let sandboxes = results.sandboxes();
        let known = self.known();
        let is_added = |sandbox: &Sandbox| {
            let mut added = known.entries.keys();
            added.any(|attachment| attachment.container() == sandbox.container)
        };
        let unadded = sandboxes.into_iter().filter(|sandbox| {
            // libcni keeps the results of containers that ended with a reboot.
            !is_added(sandbox) && (self.open)(&sandbox.namespace_path).is_ok()
        });
        let facts = unadded.map(|sandbox| names(sandbox.pod));
        facts.filter(|facts| self.facts.selects(facts)).collect()
    }
}

impl Entry {
    /// Logs a new problem with the facts of a pod.
    fn log(&mut self, problem: String, hint: Option<&str>) {
        if self.problem.as_ref() != Some(&problem) {
            let uid = &self.pod.pod.uid;
            tracing::error!(%uid, error = problem, hint, "cannot enrol a pod, or apply its new facts");
            self.problem = Some(problem);
        }
    }
}

fn report_conditions(origin: &FactOrigin, unadded: &UnaddedPods, report: &Report) {
    let (is_complete, problem) = match origin.cluster() {
        None => (true, None),
        Some(view) => (view.is_complete(), view.problem().map(str::to_owned)),
    };
    let because = problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default();
    let unlisted =
        format!("the API server has not sent the node's pods and the namespaces{because}");
    report.set(Condition::Facts, (!is_complete).then_some(unlisted));
    let stale = |problem| format!("changes of pods at the API server do not arrive: {problem}");
    report.set_notice(problem.filter(|_| is_complete).map(stale));
    report.set(Condition::AllAdded, bypassing(unadded));
}

/// The problem of pods that bypass the mesh, with the names of some of them.
fn bypassing(unadded: &UnaddedPods) -> Option<String> {
    let names: Vec<&str> = unadded.names().take(MAX_NAMED).collect();
    let more = match unadded.names().len().saturating_sub(MAX_NAMED) {
        _ if names.is_empty() => return None,
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let names = names.join(", ");
    Some(format!(
        "pods bypass the mesh, because the runtime did not call the CNI plugin: {names}{more}"
    ))
}

/// The facts about a pod of which only the names are known.
fn names(pod: PodReference) -> PodFacts {
    let PodReference { namespace, name, uid } = pod;
    PodFacts {
        uid,
        name,
        namespace,
        service_account: String::new(),
        ips: Vec::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        namespace_mode: None,
        probe_ports: None,
        interception: None,
        dns: PodDns::default(),
    }
}
