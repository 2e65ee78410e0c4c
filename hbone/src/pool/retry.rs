//! Decides whether a failed CONNECT request may be retried. `pool` retries it.

use h2::Reason;

use crate::error::HboneError;

/// Returns true if a request that failed with `error` before its answer may be retried: the peer
/// has not processed it, or it was lost together with a `pooled` tunnel. No application data was
/// sent yet, so a retry cannot duplicate data.
///
/// Timeouts, statuses, other codes of RST_STREAM and the loss of a new tunnel are not retried: they
/// describe this request or the peer's present state, and a retry adds load.
pub(super) fn is_retryable(error: &HboneError, pooled: bool) -> bool {
    match error {
        // RFC 9113 section 8.7: the peer has not processed the request.
        HboneError::Reset { reason } => *reason == Reason::REFUSED_STREAM,
        // RFC 9113 section 6.8: GOAWAY ends only streams above its last stream ID, which the peer
        // has not processed. Its error code is about other streams.
        HboneError::Lost { source: Some(source) } if source.is_go_away() && source.is_remote() => {
            true
        }
        // The request was not sent.
        HboneError::TunnelExpired { .. } => true,
        HboneError::Lost { .. } | HboneError::Unresponsive { .. } => pooled,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
