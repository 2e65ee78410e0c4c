//! Limits the unread data of a tunnel: shrinks all stream windows before slow readers block other
//! streams, and copies data out of h2's buffers.
//!
//! Unread data counts against its stream's window and against the connection's window, and h2
//! returns both credits together. Slow readers therefore use up the connection's window. While
//! unread data exceeds a quarter of it, SETTINGS_INITIAL_WINDOW_SIZE is small, which also changes
//! the windows of open streams (RFC 9113 section 6.9.2). Other streams continue with the small
//! window, and further slow readers hold little data.
//!
//! `send_buffer` limits the data queued for a peer that does not read.

use super::TunnelState;
use crate::tunnel::settings::Http2Settings;

/// The window size of all streams of one connection. The connection's task checks it only after
/// enough data has arrived.
#[derive(Debug)]
pub(crate) struct Windows {
    full_window: u32,
    reduced_window: u32,
    /// The number of unread bytes above which windows become small. They become large again below
    /// half of it.
    crowded_above: usize,
    is_reduced: bool,
    /// The cost of all data received until the last check.
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

    /// Checks the unread data if enough has arrived since the last check, and changes the window
    /// size if necessary. Returns true if it changed: SETTINGS must be sent.
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
        // Fails until the peer has acknowledged the last change. The next check tries again.
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
