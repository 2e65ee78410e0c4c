//! Moves the pods of a node to the process that takes over, one by one, with their sources.
//!
//! ```text
//! new process              running process
//! next                ──>  pod, its namespace and listeners; or a pod that is gone; or the end
//! rules UID           ──>  stops repairing the pod's rules            ┐ an attempt to adopt
//! (installs its rules, which are usually installed; accepts)          │ the pod; some run
//! accept UID          ──>  stops accepting for the pod                │ at a time
//! (tests the rules)                                                   │
//! served UID          ──>  (or "resume UID" after a failure, or       │
//!                          "exempt UID" for a pod to be left alone)   ┘
//! next …                   pods that changed meanwhile; also asked while attempts run
//! released UID        ──>  removes the rules of a pod that is gone, and may enrol another pod in
//!                          its namespace
//! source              ──>  pauses the source; its state and descriptors; "again" if `next` comes
//!                          first
//! next …                   pods that changed until then, and pods that are not served
//! accept              ──>  as in `process/take_over.rs`
//! ready               ──>  finishes removals, and removes the rules of the pods to be left alone
//! ```
//!
//! Until `ready` the running process keeps every pod, with its listeners and connections, and
//! resumes all of them if the new process fails. Afterwards it drains them, and leaves the rules to
//! the new process. If the running process ends before, the new process keeps what it adopted, and
//! its source enrols the other pods, as after a crash.
//!
//! A pod that cannot be adopted is served by the running process until `ready`, and is then
//! enrolled as a new one. Its rules stay, so its traffic is refused meanwhile.

pub(crate) mod handed;
pub(crate) mod incoming;
mod message;
pub(crate) mod outgoing;

/// The requests of the new process; those about one pod are followed by its uid.
const NEXT: &str = "next";
const RULES: &str = "rules";
const ACCEPT: &str = "accept";
const SERVED: &str = "served";
const RESUME: &str = "resume";
const EXEMPT: &str = "exempt";
const RELEASED: &str = "released";
const SOURCE: &str = "source";

/// The answers of the running process.
const POD: &str = "pod";
const GONE: &str = "gone";
const END: &str = "end";
/// The answer to `source`: a pod has been removed meanwhile.
const AGAIN: &str = "again";

#[cfg(test)]
mod tests;
