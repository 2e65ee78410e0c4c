//! Separates the privileges of `underpass node`, and of `underpass run` with
//! `privileges.broker: auto`: the broker, and the proxy process.
//!
//! ```text
//! broker (this binary, as it was started)          proxy process (this binary, executed again)
//! NET_ADMIN (a node: and SYS_ADMIN) on one         a user of its own, no capability
//! thread, KILL on another; settings, source of     mesh, workers, tunnels, policies, client of
//! pods, registry, rules, listeners, key of the     the control plane and of Istio's CA,
//! local CA, connection to the SPIRE agent          endpoints for readiness and metrics
//!      │  commands, with listeners attached    ──────▶  serve, stop accepting, drain, close a pod
//!      │  certificates of the served pods      ──────▶
//!      ◀──────  requests: sockets of a served pod or of the node, the status of all pods
//! ```
//!
//! The proxy process parses what peers send. It names a pod that it serves. It cannot name a
//! network namespace, a mark, a rule, an address, a port or an identity. It cannot change rules.
//! The broker refuses, counts and logs everything else (`requests.rs`), and limits the rate.
//!
//! The broker is the parent: it has the privileges from the start, so that no process gains any.
//! If one of the two ends or the proxy process hangs, the other one ends too. The rules stay, so
//! that the connections of the pods fail instead of bypassing the proxy.
//!
//! * `message`: the messages, and `link`: the connection;
//! * of the broker: `separation` (whether there is one), `child`, `remote` (the other process' data
//!   plane), `requests`, `recorder`, `identities` (the certificates of pods), `heartbeat`;
//! * of the proxy process: `proxy_process`, `served` (its pods), `operations` (their sockets),
//!   `reported` (the broker's metrics).

pub(crate) mod child;
mod heartbeat;
mod identities;
mod link;
pub(crate) mod message;
mod operations;
pub(crate) mod proxy_process;
pub(crate) mod recorder;
pub(crate) mod remote;
mod reported;
pub(crate) mod requests;
pub(crate) mod separation;
mod served;
#[cfg(test)]
mod tests;
