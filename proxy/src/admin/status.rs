//! `/status`: collects the status of the proxy from its parts.

mod notices;
mod problems;
mod summary;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use tokio::time::Instant;
use underpass_config::{MeshSize, Profile};

use crate::admin::answer::{Answer, Refusal, json};
use crate::admin::api::states::{CertificateState, Installation, SelfTestState};
use crate::admin::api::status::{
    ControlPlane, DnsFailure, Failures, Identity, Mesh, Rules, Status,
};
use crate::admin::api::time::{rfc3339, seconds_until};
use crate::admin::query::Query;
use crate::admin::state::Admin;
use crate::node::identities::RotationState;
use crate::node::inspection::Inspection;
use crate::node::pod::Pod;
use crate::observe::conditions;
use crate::observe::pod_name::PodName;
use crate::observe::record::MINUTES;
use crate::version::VERSION;

/// The time that `/status` covers with counts of failures.
const WINDOW: Duration = Duration::from_secs(60 * MINUTES as u64);

/// Answers a request for the status.
///
/// # Errors
///
/// A parameter is unknown or malformed, or there is no such pod.
pub(crate) async fn status(admin: &Admin, mut query: Query) -> Result<Answer, Refusal> {
    let pod = query.take("pod")?.map(|pod| pod_name(&pod)).transpose()?;
    query.end("the parameter pod")?;
    Ok(json(&collect(admin, pod).await?))
}

fn pod_name(text: &str) -> Result<PodName, Refusal> {
    let malformed = || Refusal::bad_request("pod must be like NAMESPACE/NAME");
    let (namespace, name) = text.split_once('/').ok_or_else(malformed)?;
    Ok(PodName { namespace: namespace.to_owned(), name: name.to_owned() })
}

async fn collect(admin: &Admin, pod: Option<PodName>) -> Result<Status, Refusal> {
    let mut pods = admin.readiness.pods().await;
    if let Some(wanted) = &pod {
        pods.retain(|entry| entry.pod == wanted.to_string());
        let is_own = || admin.own_pod() == *wanted;
        let is_known = if admin.node.has_many_pods { !pods.is_empty() } else { is_own() };
        if !is_known {
            let reason = format!("no pod {wanted} is known to this proxy");
            return Err(Refusal::new(StatusCode::NOT_FOUND, reason));
        }
    }
    let mut served = admin.node.pods.all();
    served.retain(|one| pod.as_ref().is_none_or(|pod| *pod == *one.name));
    let summarize = |summary| Inspection::Summary { pod: pod.clone(), summary };
    let summaries = admin.inspect(summarize).await;
    let silent_workers = summaries.iter().filter(|summary| summary.is_none()).count();
    let summed = summary::sum(summaries.into_iter().flatten(), pod.as_ref());
    let mut status = Status {
        version: VERSION.to_owned(),
        pid: std::process::id(),
        started: rfc3339(admin.started),
        uptime_seconds: admin.started.elapsed().unwrap_or_default().as_secs(),
        name: name(admin),
        command: admin.command().to_owned(),
        readiness: admin.readiness.text().trim_end().to_owned(),
        identities: identities(admin, &served, pod.is_some()),
        rules: (!admin.node.has_many_pods).then(|| rules(admin)),
        mesh: mesh(admin),
        pods,
        tunnels: summed.tunnels,
        connections: summed.connections,
        failures: Failures {
            minutes: MINUTES,
            connections: summed.failures,
            dns: dns_failures(&served),
        },
        ..Status::default()
    };
    let conditions = conditions::current(&admin.settings);
    status.problems = problems::of(admin, &status, silent_workers, &conditions);
    status.notices = notices::of(&status, &conditions);
    status.healthy = status.problems.is_empty();
    Ok(status)
}

fn name(admin: &Admin) -> String {
    match &admin.settings.node.name {
        Some(node) if admin.node.has_many_pods => node.clone(),
        _ if admin.node.has_many_pods => String::new(),
        _ => admin.own_pod().to_string(),
    }
}

/// The certificates of all workloads, or those of the served pods only.
fn identities(admin: &Admin, served: &[Arc<Pod>], only_served: bool) -> Vec<Identity> {
    let Some(identities) = &admin.identities else { return Vec::new() };
    let mut users = BTreeMap::<_, Vec<String>>::new();
    for pod in served {
        let requested = pod.context.own.spiffe_id.to_string();
        users.entry(requested).or_default().push(pod.name.to_string());
    }
    let now = SystemTime::now();
    let mut all = Vec::new();
    for RotationState { requested, current, .. } in identities.states() {
        let pods = users.remove(&requested.to_string()).unwrap_or_default();
        if only_served && pods.is_empty() {
            continue;
        }
        let left = current.as_ref().map(|current| seconds_until(now, current.expires));
        let state = match left {
            Some(1..) => CertificateState::Valid,
            Some(_) => CertificateState::Expired,
            None => CertificateState::Awaited,
        };
        let spiffe_id = current.as_ref().map_or(&requested, |current| &current.spiffe_id);
        all.push(Identity {
            pods,
            spiffe_id: spiffe_id.to_string(),
            state,
            expires: current.as_ref().map(|current| rfc3339(current.expires)),
            expires_in_seconds: left,
        });
    }
    all.sort_by(|one, other| one.spiffe_id.cmp(&other.spiffe_id));
    all
}

/// The rules of the only pod.
fn rules(admin: &Admin) -> Rules {
    let (health, interception) = (admin.readiness.rules(), &admin.settings.interception);
    let has_started = admin.readiness.has_started();
    let state = match interception.profile {
        Profile::None => Installation::ManagedByAnotherProgram,
        _ if !interception.install => Installation::ManagedByAnotherProgram,
        _ if !health.are_installed() => Installation::NotInstalled,
        _ if health.are_lost() || health.are_unrepaired() => Installation::Changed,
        _ if interception.repair && has_started => Installation::Verified,
        _ => Installation::Installed,
    };
    let self_test = if health.has_self_test_failed() {
        SelfTestState::Failed
    } else if !has_started || interception.profile == Profile::None {
        SelfTestState::NotRun
    } else if health.is_self_tested() {
        SelfTestState::Passed
    } else {
        SelfTestState::Skipped
    };
    let repairs = health.repairs();
    Rules {
        profile: interception.profile.to_string(),
        state,
        self_test,
        foreign: health.foreign_rules(),
        repairs: repairs.count,
        last_repair_seconds_ago: repairs.last.map(|at| at.elapsed().unwrap_or_default().as_secs()),
    }
}

fn mesh(admin: &Admin) -> Mesh {
    let snapshot = admin.node.mesh.borrow().clone();
    let MeshSize { workloads, services, policies } = snapshot.mesh.size();
    let health = admin.readiness.mesh().control_plane();
    let control_plane = admin.settings.xds.as_ref().map(|xds| ControlPlane {
        address: xds.address.clone(),
        connected: health.as_ref().is_some_and(|health| health.is_connected),
        for_seconds: health.as_ref().map_or(0, |health| health.since.elapsed().as_secs()),
        error: health.as_ref().and_then(|health| Some(health.error.as_ref()?.error.clone())),
    });
    let file = admin.settings.mesh_file.as_ref().map(|file| file.display().to_string());
    let generation = snapshot.generation;
    Mesh { generation, workloads, services, policies, file, control_plane }
}

/// The names that failed within [`WINDOW`], the most recent first.
fn dns_failures(served: &[Arc<Pod>]) -> Vec<DnsFailure> {
    let now = Instant::now();
    let mut failures = Vec::new();
    for pod in served {
        let recent = pod.failed_names.since(now, WINDOW).into_iter();
        failures.extend(recent.map(|failed| DnsFailure {
            pod: pod.name.to_string(),
            name: failed.name.to_string(),
            kind: failed.kind.to_owned(),
            reason: failed.reason.to_owned(),
            count: failed.count,
            last_seconds_ago: now.saturating_duration_since(failed.last).as_secs(),
            error: failed.error,
            hint: Some(failed.hint.to_owned()),
        }));
    }
    failures.sort_by_key(|failure| failure.last_seconds_ago);
    failures
}
