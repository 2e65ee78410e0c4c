//! underpass: transparent zero-trust networking below the application.
//!
//! This library is the proxy and its command line; `main.rs` only calls [`main`]. In reading order:
//!
//! * `cli` is what a user types, `app` is one proxy from start to stop; `node` is what there is one
//!   of in the process, in a pod and on a thread, `accept` brings connections in;
//! * `outbound` and `inbound` are the paths of a connection, in which `route` and `policy` decide, `dial` connects and
//!   `copy` moves the bytes;
//! * `snapshot` is the mesh that they decide by, `publish` changes it, and `connection_registry` terminates
//!   what a change forbids;
//!   `authorization` is what policies say, `endpoint_health` and `resolve` are what is known of endpoints beside the mesh;
//! * `limits` is what one worker, one client, one pod and the process may hold, and what happens beyond;
//! * `party` is what is known of each end of a connection, `record` and `metrics` report every connection, `endpoints` answers probes and scrapers, `drain` ends it all;
//! * `certificates` is who the workload is, and keeps it so; `headers` is what a tunnel tells of its ends;
//! * `capture` has the rules installed and tested, `guard` keeps them, `reload` changes what is caught while it runs;
//! * `demo` shows it.

mod accept;
mod app;
mod authorization;
#[doc(hidden)]
pub mod bench;
mod capture;
mod certificates;
mod cli;
mod connection_registry;
mod copy;
mod demo;
mod dial;
mod drain;
mod endpoint_health;
mod endpoints;
mod error;
mod guard;
mod headers;
mod inbound;
mod instance;
mod kubelet_probes;
mod limits;
mod listeners;
mod logging;
mod metrics;
mod node;
mod notify;
mod outbound;
mod parent;
mod party;
mod pause_gate;
mod policy;
mod proxy_protocol;
mod publish;
mod record;
mod reload;
mod resolve;
mod retest;
mod route;
mod self_test;
mod snapshot;
pub mod spawn;
mod take_over;
#[doc(hidden)]
pub mod testing;

pub use cli::main;

/// How many CPUs this process may use, cgroup limits and affinity included.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
