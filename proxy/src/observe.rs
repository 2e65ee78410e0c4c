//! Access log and metrics of connections.

pub(crate) mod metrics;
pub(crate) mod party;
pub(crate) mod pod_name;
pub(crate) mod record;
