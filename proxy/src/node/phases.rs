//! The phases of one pod, from its bound listeners to its removal.
//!
//! ```text
//! BoundPod      listeners bound in its namespace; dropping it leaves nothing behind
//!   │ guard     rules installed
//! GuardedPod    from here on the rules stay if the process ends: fail closed
//!   │ open      listeners dealt to the workers
//! OpenPod       accepts connections; its rules are not tested yet
//!   │ test, watch
//! ServingPod    rules tested and watched
//!   │ drain     listeners closed, connections ended or terminated
//!   │ leave     rules kept or removed, as `interception.on_exit` says
//! ```
//!
//! Each phase owns what it undoes. A phase that fails undoes what it did and returns why: an error
//! concerns this pod alone. `run`, the node daemon and the tests use the same phases.

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
