//! The open streams of a tunnel, and their unread data.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};

use bytes::Bytes;
use foldhash::fast::RandomState;
use h2::{RecvStream, StreamId};

use super::TunnelState;
use super::received::Received;

/// One stream of a tunnel. It counts as open from the acceptance of its request until it is
/// dropped.
#[derive(Debug)]
pub(crate) struct OpenStream {
    tunnel_state: Arc<TunnelState>,
    is_counted: AtomicBool,
    /// True if the peer has shown that its application reads the stream, since the last query.
    has_peer_read: AtomicBool,
    received: Received,
}

impl OpenStream {
    /// Creates a stream that does not count as open yet.
    pub(super) fn new(tunnel_state: Arc<TunnelState>) -> Self {
        let (is_counted, has_peer_read) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { tunnel_state, is_counted, has_peer_read, received: Received::default() }
    }

    /// Counts the stream as open. Later calls do nothing.
    pub(crate) fn count(&self) {
        if !self.is_counted.swap(true, Ordering::Relaxed) {
            self.tunnel_state.add_open_stream();
        }
    }

    pub(crate) fn tunnel_state(&self) -> &Arc<TunnelState> {
        &self.tunnel_state
    }

    /// Starts to receive. From now on the stream's unread data is counted.
    pub(crate) fn receive(self: &Arc<Self>, recv: RecvStream) {
        let stream = recv.stream_id();
        self.received.attach(recv);
        self.tunnel_state.streams.add(stream, self);
    }

    /// Stops receiving. Further data is dropped.
    pub(crate) fn stop_receiving(&self, stream: StreamId) {
        self.tunnel_state.streams.remove(stream);
        self.received.detach();
    }

    /// Returns the next received chunk, which is never empty. `None` at the end. The previous chunk
    /// counts as read.
    pub(crate) fn poll_received(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, h2::Error>>> {
        self.received.poll_read(cx)
    }

    /// Returns true if all data has been read and END_STREAM was received.
    pub(crate) fn is_at_end(&self) -> bool {
        self.received.is_at_end()
    }

    pub(crate) fn record_peer_read(&self) {
        self.has_peer_read.store(true, Ordering::Relaxed);
    }

    pub(crate) fn take_peer_read(&self) -> bool {
        self.has_peer_read.swap(false, Ordering::Relaxed)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        if *self.is_counted.get_mut() {
            self.tunnel_state.remove_open_stream();
        }
    }
}

/// The receiving streams by stream identifier.
#[derive(Debug, Default)]
pub(super) struct Streams(Mutex<HashMap<u32, Weak<OpenStream>, RandomState>>);

impl Streams {
    fn add(&self, stream: StreamId, open: &Arc<OpenStream>) {
        self.streams().insert(stream.as_u32(), Arc::downgrade(open));
    }

    fn remove(&self, stream: StreamId) {
        self.streams().remove(&stream.as_u32());
    }

    pub(super) fn get(&self, stream: u32) -> Option<Arc<OpenStream>> {
        self.streams().get(&stream)?.upgrade()
    }

    /// Copies data that has been in h2's buffers since before the last check. If the tunnel is
    /// `crowded`, copies large pieces too. Returns the number of unread bytes of all streams.
    pub(super) fn copy_stale(&self, crowded: bool) -> usize {
        let streams = self.streams();
        let open = streams.values().filter_map(Weak::upgrade);
        open.map(|open| open.received.copy_stale(crowded)).sum()
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Weak<OpenStream>, RandomState>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
