//! The HTTP endpoints: readiness and metrics.

pub(crate) mod endpoints;
