//! Bounds the unread data of a tunnel: shrinks the windows of all streams before stopped readers
//! block others, and copies data out of h2's buffers.
//!
//! Unread data of a stream counts against its own window and the connection's, and h2 returns both
//! together. Stopped readers therefore use up the connection's window. While they hold more than a
//! quarter of it, SETTINGS_INITIAL_WINDOW_SIZE is small, which also changes open streams (RFC 9113
//! section 6.9.2). The other streams continue with it, and readers that stop later hold little.
//!
//! Not here: data queued for a peer that does not read (`send_buffer`).

use super::TunnelState;
use crate::tunnel::settings::Http2Settings;

/// The window of every stream of one connection, derived from the unread data. The connection's
/// task checks it only after enough data has arrived.
#[derive(Debug)]
pub(crate) struct Windows {
    full_window: u32,
    reduced_window: u32,
    /// Unread bytes above which windows become small; they become large again below half of it.
    crowded_above: usize,
    is_reduced: bool,
    /// Cost of all data received up to the last check.
    checked_cost: u64,
}

impl Windows {
    pub(crate) fn new(settings: &Http2Settings) -> Self {
        let Http2Settings { stream_window, crowded_stream_window, connection_window, .. } =
            settings;
        Self {
            full_window: *stream_window,
            reduced_window: *crowded_stream_window.min(stream_window),
            crowded_above: usize::try_from(connection_window / 4).unwrap_or(usize::MAX),
            is_reduced: false,
            checked_cost: 0,
        }
    }

    /// Checks the unread data if enough has arrived since the last check, and changes the window if
    /// necessary. Returns whether it did, so that SETTINGS must be sent.
    pub(crate) fn adjust(
        &mut self,
        tunnel: &TunnelState,
        set: impl FnOnce(u32) -> Result<(), h2::Error>,
    ) -> bool {
        let cost = tunnel.traffic.receive_cost();
        if cost.saturating_sub(self.checked_cost) < self.interval() {
            return false;
        }
        self.checked_cost = cost;
        let held = tunnel.streams.copy_stale(self.is_reduced);
        let limit = if self.is_reduced { self.crowded_above / 2 } else { self.crowded_above };
        let reduce = held >= limit;
        if reduce == self.is_reduced {
            return false;
        }
        let window = if reduce { self.reduced_window } else { self.full_window };
        // Fails until the peer has acknowledged the last change; the next check is soon.
        if set(window).is_err() {
            return false;
        }
        tracing::debug!(window, held, "changed the flow-control window of a tunnel's streams");
        self.is_reduced = reduce;
        true
    }

    fn interval(&self) -> u64 {
        self.crowded_above as u64 / 4
    }
}
