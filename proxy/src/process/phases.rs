//! The phases of `underpass run`, from its bound sockets to its end.
//!
//! ```text
//! Bound     every socket bound, mesh and certificate files loaded; nothing else is changed
//! │ guard   install the rules
//! Guarded   from here on the rules stay if the process ends: fail closed
//! │ serve   change the user, obtain the certificate, start the workers, run the self-test
//! Serving   ready
//! │ end     on a stop signal, or after another process has taken over
//! Draining  unready
//! │ finish  stop accepting, send GOAWAY, drain, keep or remove the rules
//! ```
//!
//! A take-over has the same phases with the running process's listeners, and sends its requests
//! between them (`take_over.rs`).

mod bound;
pub(super) mod draining;
pub(super) mod endpoints;
mod guarded;
mod serving;

use std::sync::Arc;

use underpass_config::Settings;
use underpass_interception::NamespaceThread;

pub(crate) use self::bound::Bound;
use self::endpoints::Endpoints;
use crate::node::Node;
use crate::node::identities::Identities;
use crate::observe::otlp::Telemetry;
use crate::process::cpus::available_cpus;
use crate::process::supervise::{Supervisor, Task};

/// The parts of the process that exist in every phase.
struct Core {
    settings: Arc<Settings>,
    supervisor: Supervisor,
    node: Arc<Node>,
    /// `None` without certificates: HBONE is off.
    identities: Option<Arc<Identities>>,
    thread: NamespaceThread,
    endpoints: Endpoints,
    /// The export of traces.
    telemetry: Option<Telemetry>,
    /// Supervises `thread`.
    _privileged: Task,
}

fn workers(settings: &Settings) -> usize {
    settings.proxy.workers.unwrap_or_else(available_cpus)
}
