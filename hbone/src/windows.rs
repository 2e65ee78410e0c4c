//! How much of a tunnel its stopped readers may hold: before that holds up the others, every stream's window shrinks.
//!
//! What came for a stream and was not read counts against its own window and against the connection's, and h2 gives both back
//! together. So readers that have stopped take from the connection's window, each up to its own, until nobody gets anything.
//! While they hold more than a quarter of it, SETTINGS_INITIAL_WINDOW_SIZE is a small one (RFC 9113 section 6.9.2: it changes the
//! window of open streams too), with which the other streams go on and those that stop later hold little.
//!
//! Not here: what we queue for a peer that does not read (`send_buffer`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use foldhash::fast::RandomState;
use h2::{FlowControl, StreamId};

use crate::Http2Settings;
use crate::link::{Link, OpenStream};

/// What the open streams of one connection hold that was not read.
#[derive(Debug, Default)]
pub(crate) struct Unread(Mutex<Streams>);

type Streams = HashMap<u32, (FlowControl, Weak<OpenStream>), RandomState>;

impl Unread {
    pub(crate) fn add(&self, stream: &FlowControl, open: &Arc<OpenStream>) {
        self.streams().insert(stream.stream_id().as_u32(), (stream.clone(), Arc::downgrade(open)));
    }

    /// The open stream with this identifier.
    pub(crate) fn stream(&self, stream: u32) -> Option<Arc<OpenStream>> {
        self.streams().get(&stream)?.1.upgrade()
    }

    pub(crate) fn remove(&self, stream: StreamId) {
        // Its last handle may be this one, and then h2 cleans up: not under our lock.
        let _removed = self.streams().remove(&stream.as_u32());
    }

    /// In bytes.
    fn held(&self) -> usize {
        self.streams().values().map(|(flow, _)| flow.used_capacity()).sum()
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The window that every stream of one connection has, by what is held unread. It is the connection's task that looks, and only
/// when enough has come for it to have changed.
#[derive(Debug)]
pub(crate) struct Windows {
    wide: u32,
    narrow: u32,
    /// How much unread makes the windows narrow; half of it makes them wide again.
    crowded: usize,
    is_narrow: bool,
    /// How many bytes had gone over the connection when we last looked.
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

    /// Tells the peer another window by `set`, if it is time to look and need be. Whether it did: then there is something to send.
    pub(crate) fn adjust(
        &mut self,
        link: &Link,
        set: impl FnOnce(u32) -> Result<(), h2::Error>,
    ) -> bool {
        let moved = link.bytes_moved();
        if moved.saturating_sub(self.looked) < self.interval() {
            return false;
        }
        let held = link.unread().held();
        let crowded = if self.is_narrow { self.crowded / 2 } else { self.crowded };
        let narrow = held >= crowded;
        if narrow == self.is_narrow {
            self.looked = moved;
            return false;
        }
        let window = if narrow { self.narrow } else { self.wide };
        // While the peer has not acknowledged the last change there can be no other: the next time, which is soon.
        if set(window).is_err() {
            return false;
        }
        tracing::debug!(window, held, "the streams of a tunnel get another window");
        self.is_narrow = narrow;
        self.looked = moved;
        true
    }

    fn interval(&self) -> u64 {
        self.crowded as u64 / 4
    }
}
