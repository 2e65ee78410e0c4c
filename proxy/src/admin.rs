//! Serves readiness and metrics over HTTP.

pub(crate) mod endpoints;
