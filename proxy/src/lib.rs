//! underpass: transparent zero-trust networking below the application.
//!
//! This library contains the proxy and its command line; `main.rs` only calls [`main`].
//! In reading order:
//!
//! * `cli`: the commands;
//! * `broker`: a node daemon as two processes;
//! * `process`: start, reload, take-over and stop of the process;
//! * `node`: state of the process, of a pod, of a worker, and of a pod on a worker;
//! * `pods`: the pods of a node daemon: facts, settings, sources;
//! * `traffic`: accepting, connecting, inbound and outbound connections, copying;
//! * `decide`: routes, policies, and the health of endpoints;
//! * `dns`: the DNS proxy of a pod, and lookups of hostnames;
//! * `mesh`: the sources of the mesh, and the publication of its snapshots;
//! * `limits`: bounds of memory, connections and file descriptors;
//! * `observe`: access log, metrics and traces of connections;
//! * `rules`: installation, tests and repair of the interception rules;
//! * `admin`: readiness, metrics and administration over HTTP;
//! * `demo`: the demonstration.

mod admin;
mod backoff;
pub mod bench;
mod broker;
mod cli;
mod decide;
mod demo;
mod dns;
mod error;
mod limits;
mod mesh;
mod node;
mod observe;
mod pods;
#[doc(hidden)]
mod process;
mod rules;
pub mod spawn;
#[doc(hidden)]
pub mod testing;
mod traffic;
mod version;

pub use cli::main;

/// Entry points for the fuzz targets in `fuzz/` only.
#[cfg(feature = "fuzz")]
pub mod fuzz {
    /// Runs a script of a node agent against the ZDS session. Panics if the session differs from
    /// its model.
    pub fn zds_session(script: &[u8]) {
        crate::pods::zds::session::script::run(script);
    }

    /// Decodes a message between the broker and the proxy process. Panics if the message changes
    /// when it is encoded and decoded again.
    pub fn broker_messages(bytes: &[u8]) {
        crate::broker::message::check_bytes(bytes);
    }

    /// Reads a DNS message as a query, a response, and both. Panics if a response of the proxy is
    /// malformed or too long.
    pub fn dns_messages(message: &[u8]) {
        crate::dns::check_bytes(message);
    }

    /// Decodes a line between the CNI plugin and the daemon. Panics if the message changes when it
    /// is encoded and decoded again.
    pub fn cni_messages(line: &[u8]) {
        crate::pods::cni::protocol::check_line(line);
    }
}
