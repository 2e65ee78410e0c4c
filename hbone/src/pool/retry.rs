//! Which failed CONNECT requests may be tried again.
//!
//! Not here: doing it.

use h2::Reason;

use crate::error::HboneError;

/// Whether a request that ended with `error` before its answer can be repeated without harm and
/// with hope: the peer says that it did not act on it, or its tunnel was `pooled` and may have been
/// dead when the request went in. No byte of the application was sent yet, so the peer has seen
/// nothing that a second attempt could double.
///
/// A late answer, a status, any other code of RST_STREAM and the loss of a new tunnel are the
/// peer's word on this request or its present state: asking again would only add to it.
pub(super) fn is_safe(error: &HboneError, pooled: bool) -> bool {
    match error {
        // RFC 9113 section 8.7: no processing has occurred.
        HboneError::Reset { reason } => *reason == Reason::REFUSED_STREAM,
        // RFC 9113 section 6.8: a received GOAWAY only ends streams above its last stream id, which
        // were not acted on, and those that had not been sent. Its code speaks of other streams.
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
