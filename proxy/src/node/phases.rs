//! The phases of one pod, from its bound listeners to its removal.
//!
//! ```text
//! BoundPod      listeners bound in the pod's namespace; nothing else is changed
//!   │ guard     install the rules
//! GuardedPod    from here on the rules stay if the process ends: fail closed
//!   │ open      give the listeners to the workers
//! OpenPod       accepts connections; its rules are not tested yet
//!   │ test, watch
//! ServingPod    rules tested and watched
//!   │ drain     close the listeners; wait for connections, then terminate the rest
//!   │ leave     keep or remove the rules according to `interception.on_exit`
//! ```
//!
//! Each phase owns the resources that it must release. A phase that fails releases them and returns
//! an error that concerns only this pod. `run`, the node daemon and the tests use these phases.

mod bound;
mod guarded;
mod open;
mod rules;
mod serving;

pub(crate) use self::bound::{BoundPod, PodSpec};
pub(crate) use self::guarded::GuardedPod;
pub(crate) use self::open::OpenPod;
pub(crate) use self::rules::RulesOwner;
pub(crate) use self::serving::ServingPod;
