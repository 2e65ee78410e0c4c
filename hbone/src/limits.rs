//! Limits on resources that peers and clients can occupy.
//!
//! ```text
//! Budget           a limit, divided into parts for pods and sources
//! Share            the units that one connection or request has taken from a budget
//! KeyedBudget      the parts of a budget by key, such as a source address
//! Queue            the order in which waiters get a share
//! ConnectionSlots  connections that a new one can displace, the heaviest source first
//! ```
//!
//! `token_bucket` limits request rates. Not here: the answer to a refused connection.

mod budget;
mod keyed;
pub(crate) mod log_limit;
mod queue;
mod slots;
mod source;
pub(crate) mod token_bucket;

pub use budget::{Budget, Exhausted, Share, Sharing};
pub use keyed::{ByKey, KeyedBudget};
pub use queue::{Queue, QueuePermit};
pub use slots::{ConnectionSlot, ConnectionSlots, RequestInProgress};
pub use source::SourceNetwork;
