//! Bounds what a tunnel's stopped readers hold: shrinks every stream's window before they hold up
//! the other streams, and copies what they hold out of h2's buffers.
//!
//! What came for a stream and was not read counts against its own window and against the
//! connection's, and h2 returns both together. Readers that have stopped therefore take from the
//! connection's window, each up to its own, until nothing is left. While they hold more than a
//! quarter of it, SETTINGS_INITIAL_WINDOW_SIZE is a small one (RFC 9113 section 6.9.2: it changes
//! the window of open streams too). The other streams go on with it, and readers that stop later
//! hold little.
//!
//! Not here: what we queue for a peer that does not read (`send_buffer`).

use super::TunnelState;
use crate::tunnel::settings::Http2Settings;

/// The window that every stream of one connection has, by what is held unread. The connection's
/// task looks at that, and only when enough has come for it to have changed.
#[derive(Debug)]
pub(crate) struct Windows {
    wide: u32,
    narrow: u32,
    /// How much unread makes the windows narrow; half of it makes them wide again.
    crowded: usize,
    is_narrow: bool,
    /// What had been received, by its cost, at the last look.
    looked: u64,
}

impl Windows {
    pub(crate) fn new(settings: &Http2Settings) -> Self {
        let Http2Settings { stream_window, crowded_stream_window, connection_window, .. } =
            settings;
        Self {
            wide: *stream_window,
            narrow: *crowded_stream_window.min(stream_window),
            crowded: usize::try_from(connection_window / 4).unwrap_or(usize::MAX),
            is_narrow: false,
            looked: 0,
        }
    }

    /// Looks at what is held, if enough has come since the last time, and sets another window if
    /// need be. Whether it did: then there is something to send.
    pub(crate) fn adjust(
        &mut self,
        tunnel: &TunnelState,
        set: impl FnOnce(u32) -> Result<(), h2::Error>,
    ) -> bool {
        let cost = tunnel.traffic.receive_cost();
        if cost.saturating_sub(self.looked) < self.interval() {
            return false;
        }
        self.looked = cost;
        let held = tunnel.streams.look(self.is_narrow);
        let crowded = if self.is_narrow { self.crowded / 2 } else { self.crowded };
        let narrow = held >= crowded;
        if narrow == self.is_narrow {
            return false;
        }
        let window = if narrow { self.narrow } else { self.wide };
        // Fails while the peer has not acknowledged the last change: the next look is soon.
        if set(window).is_err() {
            return false;
        }
        tracing::debug!(window, held, "the streams of a tunnel get another window");
        self.is_narrow = narrow;
        true
    }

    fn interval(&self) -> u64 {
        self.crowded as u64 / 4
    }
}
