//! `/drain`: replaces the tunnels of a pod.

use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::admin::answer::Refusal;
use crate::admin::query::Query;
use crate::admin::state::Admin;

/// The outcome of a drain.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Drained {
    /// `NAMESPACE/NAME`.
    pub(crate) pod: String,
}

/// Closes the tunnels that the pod `?pod=NAMESPACE/NAME` has opened, each when its last stream
/// ends. Later connections open new tunnels.
pub(crate) async fn drain(admin: &Admin, mut query: Query) -> Result<Drained, Refusal> {
    let given = query.take("pod")?;
    query.end("the parameter pod")?;
    let name = given.ok_or_else(|| {
        Refusal::bad_request("the parameter pod is needed: /drain?pod=NAMESPACE/NAME")
    })?;
    let pods = admin.node.pods.all().into_iter();
    let named: Vec<_> = pods.filter(|pod| pod.name.to_string() == name).collect();
    let Some(workers) = admin.liveness.workers().filter(|_| !named.is_empty()) else {
        return Err(Refusal::new(StatusCode::NOT_FOUND, format!("no pod {name} is served")));
    };
    for pod in &named {
        workers.renew_tunnels(pod.id).await;
    }
    tracing::info!(pod = name, "the tunnels of the pod are closed when their last streams end");
    Ok(Drained { pod: name })
}
