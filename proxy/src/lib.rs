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

mod admin;
pub mod bench;
mod cli;
mod decide;
mod demo;
mod error;
mod limits;
mod mesh;
mod node;
mod observe;
#[doc(hidden)]
mod process;
mod rules;
pub mod spawn;
#[doc(hidden)]
pub mod testing;
mod traffic;

pub use cli::main;
