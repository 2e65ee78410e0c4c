//! `/drain` and `/undrain` take a pod out of use and back; `/renew_tunnels` replaces its tunnels.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use underpass_config::parse_duration;
use underpass_hbone::log_panic;

use crate::admin::answer::Refusal;
use crate::admin::query::Query;
use crate::admin::state::Admin;
use crate::decide::subject::Decision;
use crate::node::pod::Pod;
use crate::traffic::inbound_drain::DrainState;

/// The longest deadline that a request may set.
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// The drain of a pod.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Drain {
    /// `NAMESPACE/NAME`.
    pub(crate) pod: String,
    pub(crate) state: State,
    /// The number of open inbound connections, streams and tunnels.
    pub(crate) inbound: usize,
    /// The time until the rest is terminated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seconds_left: Option<u64>,
    /// The number of inbound connections, streams and tunnels that the drain has terminated.
    pub(crate) terminated: usize,
}

/// The state of a pod's inbound connections. Of several pods with the same name, the least state
/// is reported: the name is in use while one of them serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// New ones are accepted.
    Serving,
    /// New ones are refused, and open ones end.
    Draining,
    /// New ones are refused, and none is open.
    Drained,
}

/// A pod whose tunnels are replaced.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Renewed {
    /// `NAMESPACE/NAME`.
    pub(crate) pod: String,
}

/// The drain of the pod `?pod=NAMESPACE/NAME`.
pub(crate) async fn show(admin: &Admin, mut query: Query) -> Result<Drain, Refusal> {
    let named = admin.pod_of(&mut query, "/drain")?;
    query.end("the parameter pod")?;
    Ok(report(&served(admin, &named)?).await)
}

/// Takes the pod `?pod=NAMESPACE/NAME` out of use: refuses new inbound connections, lets the open
/// ones end, and terminates the rest after `?deadline` (`timeouts.drain`).
pub(crate) async fn begin(admin: &Admin, mut query: Query) -> Result<Drain, Refusal> {
    let named = admin.pod_of(&mut query, "/drain")?;
    let deadline = query.take("deadline")?;
    query.end("the parameters pod and deadline")?;
    let malformed =
        || Refusal::bad_request("deadline must be a time such as 30s or 5m, and 24h at most");
    let parsed = |text: &str| parse_duration(text).filter(|time| *time <= MAX_DEADLINE);
    let deadline = deadline.map(|text| parsed(&text).ok_or_else(malformed)).transpose()?;
    let deadline = deadline.unwrap_or(admin.node.timeouts.drain);
    let pods = served(admin, &named)?;
    for pod in pods.clone() {
        let drain = pod.inbound_drain.begin(deadline);
        let finishing = async move { pod.inbound_drain.finish(drain, &pod.connections).await };
        tokio::spawn(log_panic("drain of a pod", finishing));
    }
    set_readiness(admin, true);
    let seconds = deadline.as_secs();
    tracing::info!(
        pod = named,
        seconds,
        "an operator drains the pod: it takes no new inbound connections"
    );
    Ok(report(&pods).await)
}

/// Accepts inbound connections of the pod `?pod=NAMESPACE/NAME` again.
pub(crate) async fn undo(admin: &Admin, mut query: Query) -> Result<Drain, Refusal> {
    let named = admin.pod_of(&mut query, "/undrain")?;
    query.end("the parameter pod")?;
    let pods = served(admin, &named)?;
    let drained = pods.iter().filter(|pod| pod.inbound_drain.undo()).count();
    set_readiness(admin, false);
    if drained > 0 {
        tracing::info!(pod = named, "the pod takes inbound connections again");
    }
    Ok(report(&pods).await)
}

/// Closes the tunnels that the pod `?pod=NAMESPACE/NAME` has opened, each when its last stream
/// ends. Later connections open new tunnels.
pub(crate) async fn renew_tunnels(admin: &Admin, mut query: Query) -> Result<Renewed, Refusal> {
    let named = admin.pod_of(&mut query, "/renew_tunnels")?;
    query.end("the parameter pod")?;
    let pods = served(admin, &named)?;
    let workers = admin.liveness.workers().ok_or_else(|| unknown(&named))?;
    for pod in &pods {
        workers.renew_tunnels(pod.id).await;
    }
    tracing::info!(pod = named, "the tunnels of the pod are closed when their last streams end");
    Ok(Renewed { pod: named })
}

/// Orchestrators direct no new connections to a workload whose proxy is not ready. A node stays
/// ready for its other pods.
fn set_readiness(admin: &Admin, is_drained: bool) {
    if !admin.node.has_many_pods {
        admin.readiness.drained_by_request(is_drained);
    }
}

/// The served pods with this name: while a pod is replaced, there are two.
fn served(admin: &Admin, name: &str) -> Result<Vec<Arc<Pod>>, Refusal> {
    let mut pods = admin.node.pods.all();
    pods.retain(|pod| pod.name.to_string() == name);
    if pods.is_empty() { Err(unknown(name)) } else { Ok(pods) }
}

fn unknown(name: &str) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, format!("no pod {name} is served"))
}

/// The drain of pods with the same name.
async fn report(pods: &[Arc<Pod>]) -> Drain {
    let pod = pods.first().map(|pod| pod.name.to_string()).unwrap_or_default();
    let mut sum =
        Drain { pod, state: State::Drained, inbound: 0, seconds_left: None, terminated: 0 };
    for pod in pods {
        sum.inbound += pod.connections.count(Decision::is_inbound).await;
        let state = match pod.inbound_drain.state() {
            DrainState::Serving => State::Serving,
            DrainState::Draining { deadline } => {
                let left = deadline.saturating_duration_since(Instant::now());
                sum.seconds_left = sum.seconds_left.max(Some(left.as_secs()));
                State::Draining
            }
            DrainState::Drained { terminated } => {
                sum.terminated += terminated;
                State::Drained
            }
        };
        sum.state = sum.state.min(state);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::pod;

    #[tokio::test]
    async fn serving_pod_wins_over_a_drained_one_of_the_same_name() {
        let pods = [pod(&[]), pod(&[])];
        let [leaving, replacement] = &pods;
        let state = async || report(&pods).await.state;
        let drain = leaving.inbound_drain.begin(MAX_DEADLINE);
        assert_eq!(state().await, State::Serving, "the first one drains");
        leaving.inbound_drain.finish(drain, &leaving.connections).await;
        assert_eq!(state().await, State::Serving, "the first one is drained");
        let drain = replacement.inbound_drain.begin(MAX_DEADLINE);
        assert_eq!(state().await, State::Draining);
        replacement.inbound_drain.finish(drain, &replacement.connections).await;
        assert_eq!(state().await, State::Drained);
    }
}
