//! Decides which failed CONNECT requests may be retried.
//!
//! Not here: the retry itself.

use h2::Reason;

use crate::error::HboneError;

/// Whether a request that failed with `error` before its answer may be retried: the peer has not
/// processed it, or its `pooled` tunnel may have been lost before. No byte of the application has
/// been sent yet, so a retry cannot duplicate data.
///
/// Timeouts, statuses, other codes of RST_STREAM and the loss of a new tunnel are not retried: they
/// describe this request or the peer's present state, and a retry adds load.
pub(super) fn is_safe(error: &HboneError, pooled: bool) -> bool {
    match error {
        // RFC 9113 section 8.7: no processing has occurred.
        HboneError::Reset { reason } => *reason == Reason::REFUSED_STREAM,
        // RFC 9113 section 6.8: a received GOAWAY ends only streams above its last stream ID, which
        // were not processed, and unsent ones. Its code concerns other streams.
        HboneError::Lost { source: Some(source) } if source.is_go_away() && source.is_remote() => {
            true
        }
        // Nothing was sent.
        HboneError::TunnelExpired { .. } => true,
        HboneError::Lost { .. } | HboneError::Unresponsive { .. } => pooled,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
