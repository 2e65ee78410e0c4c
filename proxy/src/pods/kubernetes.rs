//! Kubernetes' facts about the pods of this node and their namespaces (`node.kubernetes`).
//!
//! ```text
//! API server ─ list, watch ─▶ watch ─▶ reflector (the protocol without I/O) ─▶ view ─▶ cni/facts
//! ```
//!
//! The last facts stay while there is no connection. The daemon only reads, and only the pods of
//! this node. In reading order: `objects`, `view`, `reflector`, `api` (requests), `watch`.

pub(crate) mod api;
pub(crate) mod objects;
mod reflector;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod view;
pub(crate) mod watch;
