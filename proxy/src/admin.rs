//! Serves readiness, metrics and administration over HTTP/1.
//!
//! ```text
//! server.rs      accepts connections and bounds them
//! routes.rs      the paths of each listener; `authority.rs` and `query.rs` check requests
//! answer.rs      bodies: text, JSON, streams
//! readiness.rs   the conditions of readiness; `liveness.rs` asks the workers
//! state.rs       the state that administration reads and changes
//! client.rs      requests of `underpass status` and the like
//! api/           the answers of administration, a file for each path
//! page.rs        the files of the web page, which reads those answers
//! ```
//!
//! Everything runs on the control thread. A long answer is a stream, which lets other tasks run
//! between two chunks.

pub(crate) mod answer;
pub(crate) mod api;
mod authority;
pub(crate) mod client;
pub(crate) mod liveness;
mod page;
pub(crate) mod query;
pub(crate) mod readiness;
pub(crate) mod routes;
pub(crate) mod server;
mod stall;
pub(crate) mod state;
pub(crate) mod status;
