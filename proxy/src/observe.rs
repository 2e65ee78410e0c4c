//! Access log, metrics and traces of connections.

pub(crate) mod access_log;
pub(crate) mod conditions;
pub(crate) mod ended;
pub(crate) mod log_loss;
pub(crate) mod mesh_health;
pub(crate) mod metrics;
pub(crate) mod otlp;
pub(crate) mod party;
pub(crate) mod pod_name;
pub(crate) mod record;
pub(crate) mod trace;
