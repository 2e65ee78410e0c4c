//! The phases of `underpass run`, from its bound sockets to its end.
//!
//! ```text
//! Bound     every socket bound, mesh and certificate files loaded; nothing else is changed
//! │ guard   install the rules
//! Guarded   from here on the rules stay if the process ends: fail closed
//! │ serve   drop privileges, obtain the certificate, start the workers, run the self-test
//! Serving   ready
//! │ end     on a stop signal, or after another process has taken over
//! Draining  unready
//! │ finish  stop accepting, send GOAWAY, drain, keep or remove the rules
//! ```
//!
//! A take-over has the same phases with the running process's listeners, and sends its requests
//! between them (`take_over.rs`). With a broker, mesh, certificates and workers are in the proxy
//! process (`proxy_part.rs`), whose end is a failure in every phase.

mod bound;
pub(super) mod draining;
pub(super) mod endpoints;
mod guarded;
mod serving;

use std::sync::Arc;

use underpass_config::Settings;
use underpass_interception::NamespaceThread;

pub(crate) use self::bound::Bound;
use crate::process::descriptor_store::DescriptorStore;
use crate::process::pause_gate::PauseGate;
use crate::process::supervise::{Supervisor, Task};

/// The parts of the process that exist in every phase.
struct Core {
    settings: Arc<Settings>,
    supervisor: Supervisor,
    thread: NamespaceThread,
    /// Pauses the repair of the rules while another process takes over.
    rules_gate: PauseGate,
    /// Answers on the instance socket, until another process has taken over.
    instance: Option<Task>,
    /// The listeners in the supervisor's store.
    store: DescriptorStore,
    /// Supervises `thread`.
    _privileged: Task,
}
