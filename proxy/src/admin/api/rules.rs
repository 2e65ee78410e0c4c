//! `/rules`: the interception rules of a pod, with live counters.

use http::StatusCode;
use serde_json::Value;

use crate::admin::answer::Refusal;
use crate::admin::query::Query;
use crate::admin::state::{Admin, RulesError};

/// The rules of the pod `?pod=NAMESPACE/NAME`. `underpass run` has one pod.
pub(crate) async fn rules(admin: &Admin, mut query: Query) -> Result<Value, Refusal> {
    let pod = admin.pod_of(&mut query, "/rules")?;
    query.end("the parameter pod")?;
    let refused = |error: RulesError| {
        let status = match error {
            RulesError::UnknownPod => StatusCode::NOT_FOUND,
            RulesError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Refusal::new(status, format!("{pod}: {error}"))
    };
    admin.rules(&pod).await.map_err(refused)
}
