//! Decides where a connection goes, and whether it is allowed.

pub(crate) mod authorization;
pub(crate) mod connection_registry;
pub(crate) mod endpoint_health;
pub(crate) mod lookups;
pub(crate) mod policy;
pub(crate) mod resolve;
pub(crate) mod route;
pub(crate) mod snapshot;
pub(crate) mod subject;
