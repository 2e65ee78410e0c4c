//! The sources of certificates of a SPIRE agent: its Workload API for one process, its Delegated
//! Identity API for the pods of a node.

mod delegated;
#[cfg(test)]
mod testing;
mod workload;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use self::delegated::DelegatedIdentitySource;
pub use self::workload::WorkloadApiSource;
use crate::error::{HboneError, IssuerProblem};

/// The timeout of the first answer. Later updates arrive at any time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

fn agent_problem(socket: &Path, what: IssuerProblem, source: Option<io::Error>) -> HboneError {
    let issuer = socket.display().to_string();
    HboneError::Issuer { issuer, what, source: source.map(Arc::new) }
}
