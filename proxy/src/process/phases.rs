//! The phases of `underpass run`, from its bound sockets to its end.
//!
//! ```text
//! Bound     every socket bound, mesh and certificate files loaded; dropping it leaves nothing
//!   │ guard   rules installed
//! Guarded   from here on the rules stay if the process ends: fail closed
//!   │ serve   proxy's user, certificate, workers, self-test, ready
//! Serving
//!   │ end     a stop signal, or another process has taken over: unready
//! Draining
//!   │ finish  stop accepting, GOAWAY, drain, keep or remove the rules
//! ```
//!
//! A take-over has the same phases with the running process's listeners (`take_over.rs`); its
//! requests are between them.

mod bound;
mod draining;
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
use crate::process::cpus::processors;
use crate::process::supervise::{Supervisor, Task};

/// The parts of the process that every phase has.
struct Core {
    settings: Arc<Settings>,
    supervisor: Supervisor,
    node: Arc<Node>,
    /// `None` without certificates: HBONE is off.
    identities: Option<Arc<Identities>>,
    /// The thread that performs privileged operations.
    thread: NamespaceThread,
    endpoints: Endpoints,
    /// Waits for the end of that thread.
    _privileged: Task,
}

fn workers(settings: &Settings) -> usize {
    settings.proxy.workers.unwrap_or_else(processors)
}
