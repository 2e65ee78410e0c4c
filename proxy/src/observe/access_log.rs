//! The access log: one line for each connection that `logging.access` selects.
//!
//! The fields have ztunnel's names, so that parsers keep working. docs/operations.md lists them.

use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use tracing::Level;
use underpass_config::{AccessLogSettings, Hint, Quoted};

use crate::error::Fault;
use crate::observe::ended::Ended;
use crate::observe::trace::random_bits;

/// The selection in effect; `None` selects all connections. One for the process, as its log is.
static SELECTION: RwLock<Option<AccessLogSettings>> = RwLock::new(None);

/// Applies the settings, at the start and when they have changed.
pub(crate) fn select(settings: &AccessLogSettings) {
    // No code panics while it holds the lock.
    *SELECTION.write().unwrap_or_else(PoisonError::into_inner) = Some(settings.clone());
}

/// Writes the line of a connection if it is selected.
pub(crate) fn log(ended: &Ended<'_>) {
    let level = match ended.error.map(|error| error.reason().fault) {
        None => Level::INFO,
        Some(Fault::Client) => Level::WARN,
        Some(Fault::Peer | Fault::Us) => Level::ERROR,
    };
    let selection = SELECTION.read().unwrap_or_else(PoisonError::into_inner);
    let is_selected = selection.as_ref().is_none_or(|settings| selects(settings, ended));
    drop(selection);
    if is_selected {
        write(ended, level);
    }
}

/// Claims select nothing: a peer could hide its connections.
fn selects(settings: &AccessLogSettings, ended: &Ended<'_>) -> bool {
    let namespaces = [ended.source, ended.destination].map(|party| party.proven_names().namespace);
    // Both ends of a tunnel have the trace, and so log the same connections.
    let random = || ended.trace.map_or_else(|| fastrand::u64(..), random_bits);
    settings.selects(namespaces, ended.error.is_some(), random)
}

fn write(ended: &Ended<'_>, level: Level) {
    let Ended { direction, source, destination, service, trace, durations, .. } = *ended;
    let error = ended.error.map(|error| Quoted::chain(error));
    let error = error.as_ref().map(Quoted::as_str);
    let hint = ended.error.and_then(Hint::hint);
    let (src, src_claimed) = (source.proven_names(), source.claimed_names());
    let (dst, dst_claimed) = (destination.proven_names(), destination.claimed_names());
    let [address, tunnelled] = ended.addresses();
    macro_rules! access {
        ($level:expr, $message:literal) => {
            tracing::event!(
                target: "access",
                $level,
                src.addr = source.address.map(tracing::field::display),
                src.workload = src.workload,
                src.namespace = src.namespace,
                src.identity = source.identity.as_ref().map(ToString::to_string),
                src.cluster = src.cluster,
                src.claimed.workload = src_claimed.workload,
                src.claimed.namespace = src_claimed.namespace,
                src.claimed.cluster = src_claimed.cluster,
                dst.addr = address.map(tracing::field::display),
                dst.hbone_addr = tunnelled.map(tracing::field::display),
                dst.service = service.map(|service| &*service.hostname),
                dst.workload = dst.workload,
                dst.namespace = dst.namespace,
                dst.identity = destination.identity.as_ref().map(ToString::to_string),
                dst.cluster = dst.cluster,
                dst.claimed.workload = dst_claimed.workload,
                dst.claimed.namespace = dst_claimed.namespace,
                dst.claimed.cluster = dst_claimed.cluster,
                direction = direction.as_str(),
                trace_id = trace.map(|trace| format!("{:032x}", trace.trace_id())),
                bytes_sent = ended.sent,
                bytes_recv = ended.received,
                connect_ms = durations.connect.map(milliseconds),
                first_byte_ms = durations.first_byte.map(milliseconds),
                duration = format!("{}ms", durations.total.as_millis()),
                reason = ended.error.map(|error| error.reason().code),
                error,
                hint = hint.as_deref(),
                $message
            )
        };
    }
    match level {
        Level::INFO => access!(Level::INFO, "connection complete"),
        Level::WARN => access!(Level::WARN, "connection failed"),
        _ => access!(Level::ERROR, "connection failed"),
    }
}

/// Milliseconds with three decimal places.
fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests;
