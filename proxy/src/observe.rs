//! What is recorded of a connection: access log and metrics.

pub(crate) mod metrics;
pub(crate) mod party;
pub(crate) mod record;
