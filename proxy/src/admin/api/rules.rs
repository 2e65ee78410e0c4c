//! `/rules`: the interception rules of a pod, with live counters.

use http::StatusCode;
use serde_json::Value;

use crate::admin::answer::Refusal;
use crate::admin::query::Query;
use crate::admin::state::Admin;

/// The rules of the pod `?pod=NAMESPACE/NAME`. `underpass run` has one pod.
pub(crate) async fn rules(admin: &Admin, mut query: Query) -> Result<Value, Refusal> {
    let given = query.take("pod")?;
    query.end("the parameter pod")?;
    let own = admin.own_pod().to_string();
    let pod = match given {
        Some(pod) if admin.node.has_many_pods || pod == own => pod,
        None if !admin.node.has_many_pods => own,
        Some(pod) => return Err(Refusal::new(StatusCode::NOT_FOUND, format!("no pod {pod}"))),
        None => {
            let reason = "the parameter pod is needed: /rules?pod=NAMESPACE/NAME";
            return Err(Refusal::bad_request(reason));
        }
    };
    let unavailable =
        |reason: String| Refusal::new(StatusCode::NOT_FOUND, format!("{pod}: {reason}"));
    admin.rules(&pod).await.map_err(unavailable)
}
