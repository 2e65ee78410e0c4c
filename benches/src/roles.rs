//! The roles of a bench's child processes: relays and clients.

use crate::child_process::CHILD_OPTION;
use crate::{clients, relay};

/// Runs the role of this process if it is a child of a bench. Returns `false` otherwise.
///
/// # Panics
/// The role had an error, or is unknown.
#[must_use]
pub(crate) fn run_child_role() -> bool {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(CHILD_OPTION) {
        return false;
    }
    let arguments: Vec<_> = arguments.collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["relay", mode, hops] => relay::run(mode, hops),
        ["storm", server, connections] => clients::run_storm(server, connections),
        ["clients", server, connections] => clients::run_client_set(server, connections),
        _ => unreachable!("unknown role {arguments:?}"),
    }
    true
}
