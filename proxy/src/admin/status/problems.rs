//! The problems of the proxy: everything that is pending or wrong, with hints.

use std::borrow::Cow;
use std::sync::Arc;

use underpass_config::Hint as _;

use crate::admin::api::states::{CertificateState, Installation, Part, PodState, SelfTestState};
use crate::admin::api::status::{Problem, Status};
use crate::admin::readiness::DRAINED_BY_REQUEST;
use crate::admin::state::Admin;
use crate::error::{Described, ProxyError};
use crate::node::identities::RotationState;
use crate::node::pod::Pod;
use crate::observe::conditions::Condition;
use crate::observe::mesh_health::Rejected;

/// An outage of the control plane for less time is no problem: control planes end their streams
/// from time to time.
const MIN_OUTAGE_SECONDS: u64 = 5;
/// A pod that is pending without an error for less time is no problem.
const MIN_PENDING_SECONDS: u64 = 10;
/// Words in the reasons why the process is not ready, with hints.
const READINESS_HINTS: [(&str, &str); 3] = [
    (DRAINED_BY_REQUEST, "`underpass admin undrain` ends the drain"),
    ("out of file descriptors", "raise the limit of open files (ulimit -n, LimitNOFILE)"),
    ("the source of pods", "check that the source of pods (node.pods) runs"),
];

/// The problems of the proxy with this status. `silent_workers` did not answer.
pub(super) fn of(
    admin: &Admin,
    status: &Status,
    silent_workers: usize,
    conditions: &[Condition],
) -> Vec<Problem> {
    let mut problems = certificates(admin, status);
    problems.extend(rules(admin, status));
    problems.extend(control_plane(admin, status));
    problems.extend(rejected(admin));
    problems.extend(mesh_file(admin));
    problems.extend(conditions.iter().filter(|one| one.is_problem()).map(Problem::from));
    problems.extend(networks(admin));
    problems.extend(pods(status));
    problems.extend(readiness(admin, &problems));
    if silent_workers > 0 {
        let problem = format!("{silent_workers} of {} workers do not answer", admin.node.workers);
        let hint = "look for a saturated CPU, then restart the proxy and report this defect";
        problems.push(problem_of(Part::Workers, problem, Some(hint.into())));
    }
    problems
}

fn problem_of(part: Part, problem: impl Into<String>, hint: Option<Cow<'_, str>>) -> Problem {
    Problem { part, pod: None, problem: problem.into(), hint: hint.map(Cow::into_owned) }
}

fn described(part: Part, before: &str, cause: Option<&Described>) -> Problem {
    match cause {
        Some(Described { error, hint }) => {
            problem_of(part, format!("{before}: {error}"), hint.clone())
        }
        None => problem_of(part, before, None),
    }
}

/// The reasons why the process is not ready, without those that a known problem describes better.
fn readiness(admin: &Admin, known: &[Problem]) -> Vec<Problem> {
    let mut reasons = admin.readiness.reasons();
    let parts = [Part::Rules, Part::Certificate, Part::ControlPlane];
    for part in parts.into_iter().filter(|part| known.iter().any(|one| one.part == *part)) {
        reasons.retain(|reason| !reason.contains(part.text()));
    }
    let problem = |reason: &Cow<'_, str>| {
        let known = READINESS_HINTS.iter().find(|(words, _)| reason.contains(words));
        let hint = known.map(|(_, hint)| Cow::Borrowed(*hint));
        problem_of(Part::Readiness, format!("not ready: {reason}"), hint)
    };
    reasons.iter().map(problem).collect()
}

/// The certificates that are listed and awaited, expired, or not renewed.
fn certificates(admin: &Admin, status: &Status) -> Vec<Problem> {
    let states = admin.identities.as_ref().map(|identities| identities.states());
    let problem = |RotationState { requested, current, failure }| {
        let spiffe_id = current.as_ref().map_or(&requested, |current| &current.spiffe_id);
        let spiffe_id = spiffe_id.to_string();
        let listed = status.identities.iter().find(|one| one.spiffe_id == spiffe_id)?;
        let what = match (listed.state, &failure) {
            (CertificateState::Awaited, _) => {
                format!("no certificate is issued yet for {spiffe_id}")
            }
            (CertificateState::Expired, _) => format!("the certificate of {spiffe_id} has expired"),
            (_, Some(_)) => format!("the certificate of {spiffe_id} cannot be renewed"),
            (_, None) => return None,
        };
        Some(described(Part::Certificate, &what, failure.as_ref()))
    };
    states.into_iter().flatten().filter_map(problem).collect()
}

fn rules(admin: &Admin, status: &Status) -> Option<Problem> {
    let rules = status.rules.as_ref()?;
    if rules.state == Installation::Changed && !admin.settings.interception.repair {
        let hint = "find that program, and restart the proxy, which installs its rules again";
        let problem = "another program has changed the rules, and interception.repair is off: traffic may bypass the proxy";
        return Some(problem_of(Part::Rules, problem, Some(hint.into())));
    }
    if rules.state == Installation::Changed {
        let hint = "`underpass rules verify` shows the difference; stop the program that makes it";
        let problem = "another program has changed the rules, and traffic is blocked";
        return Some(problem_of(Part::Rules, problem, Some(hint.into())));
    }
    let problem = "the self-test of the rules failed: traffic may bypass the proxy";
    let hint = "`underpass rules verify` lists rules of other programs that precede these";
    (rules.self_test == SelfTestState::Failed)
        .then(|| problem_of(Part::Rules, problem, Some(hint.into())))
}

fn control_plane(admin: &Admin, status: &Status) -> Option<Problem> {
    let plane = status.mesh.control_plane.as_ref().filter(|plane| !plane.connected)?;
    let health = admin.readiness.mesh().control_plane();
    let error = health.and_then(|health| health.error);
    let is_short = plane.for_seconds < MIN_OUTAGE_SECONDS && admin.readiness.has_started();
    let what = format!("no stream to the control plane {}", plane.address);
    (!is_short).then(|| described(Part::ControlPlane, &what, error.as_ref()))
}

/// The resources of the control plane that this proxy cannot use.
fn rejected(admin: &Admin) -> Option<Problem> {
    let Rejected { count, first } = admin.readiness.mesh().rejected()?;
    let problem = format!("resources of the control plane that cannot be used: {count}; {first}");
    let hint = "correct them in the control plane: connections that they may forbid are refused until then";
    Some(problem_of(Part::Mesh, problem, Some(hint.into())))
}

fn mesh_file(admin: &Admin) -> Option<Problem> {
    let error = admin.readiness.mesh().file_error()?;
    Some(described(Part::Mesh, "the last change of the mesh file is not in use", Some(&error)))
}

/// The pods whose workload the mesh has in another network.
fn networks(admin: &Admin) -> Vec<Problem> {
    let snapshot = admin.node.mesh.borrow().clone();
    let problem = |pod: Arc<Pod>| {
        let error = pod.context.check_own(&snapshot).err()?;
        let is_other_network = matches!(error, ProxyError::OtherNetwork { .. });
        let problem = problem_of(Part::Mesh, error.to_string(), error.hint());
        is_other_network.then(|| Problem { pod: Some(pod.name.to_string()), ..problem })
    };
    admin.node.pods.all().into_iter().filter_map(problem).collect()
}

fn pods(status: &Status) -> impl Iterator<Item = Problem> {
    let problematic = status.pods.iter().filter(|pod| match pod.state {
        PodState::Pending => pod.has_failed || pod.for_seconds >= Some(MIN_PENDING_SECONDS),
        PodState::Failed | PodState::Draining => true,
        PodState::Serving => pod.detail.is_some(),
        PodState::Exempt | PodState::Leaving => false,
    });
    problematic.map(|pod| {
        let detail = pod.detail.as_deref().map(|detail| format!(": {detail}")).unwrap_or_default();
        let problem = format!("{}{detail}", pod.state);
        let hint = pod.hint.clone().map(Cow::Owned);
        Problem { pod: Some(pod.pod.clone()), ..problem_of(Part::Pod, problem, hint) }
    })
}
