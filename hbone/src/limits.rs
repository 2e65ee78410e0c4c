//! Limits on resources that peers and clients can occupy.
//!
//! ```text
//! Budget        how much there is; parts of it for pods and sources, fair when it is short
//! Share         what one connection or request has of a budget, for as long as it lives
//! KeyedBudget   the parts of a budget by key, such as a source address
//! Queue         the order in which those that wait get a share
//! ConnectionSlots  connections that lose their share to a new one, the heaviest source first
//! ```
//!
//! Not here: request rates (`token_bucket`), and the answer to a refused connection.

mod budget;
mod keyed;
pub(crate) mod log_limit;
mod queue;
mod slots;
mod source;
pub(crate) mod token_bucket;

pub use budget::{Budget, Exhausted, Share, Sharing};
pub use keyed::{ByKey, KeyedBudget};
pub use queue::{Queue, Turn};
pub use slots::{ConnectionSlot, ConnectionSlots, RequestInProgress};
pub use source::SourceNetwork;
