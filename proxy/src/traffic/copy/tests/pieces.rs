//! Tests of a single direction between scripted sides.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::super::direction::Direction;
use super::super::{Side, Sink, Source};
use crate::error::ProxyError;

/// A side that returns one piece per read, and takes a few bytes per write.
#[derive(Default)]
struct Scripted {
    piece: Option<Bytes>,
    at_end: bool,
    takes: usize,
    taken: Vec<u8>,
    /// The `last` argument of each write.
    last: Vec<bool>,
}

impl Side<'_> for Scripted {
    fn poll_aborted(&mut self, _: &mut Context<'_>) -> Poll<ProxyError> {
        Poll::Pending
    }

    fn close(&mut self, _: &Result<(), ProxyError>) {}
}

impl Source<'_> for Scripted {
    fn poll_read(&mut self, _: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>> {
        self.piece.take().map_or(Poll::Pending, |piece| Poll::Ready(Ok(Some(piece))))
    }

    fn is_at_end(&self) -> bool {
        self.at_end
    }
}

impl Sink<'_> for Scripted {
    fn poll_write(
        &mut self,
        _: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, ProxyError>> {
        let some = data.split_to(self.takes.min(data.len()));
        self.taken.extend_from_slice(&some);
        self.last.push(last);
        Poll::Ready(Ok(some.len()))
    }

    fn finish(&mut self, _: bool) -> Result<(), ProxyError> {
        Ok(())
    }
}

/// The memory of a piece.
struct Memory(#[expect(dead_code, reason = "the test counts references")] Arc<()>);

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        b"a piece"
    }
}

#[tokio::test]
async fn waiting_direction_holds_no_written_data() {
    let held = Arc::new(());
    let piece = Bytes::from_owner(Memory(held.clone()));
    let mut from = Scripted { piece: Some(piece), ..Scripted::default() };
    let mut to = Scripted { takes: 3, ..Scripted::default() };
    let mut direction = Direction::default();
    let moved = std::cell::Cell::new(0);
    let mut piece = |cx: &mut Context<'_>| {
        let count = |bytes| moved.set(moved.get() + bytes);
        Poll::Ready(direction.poll_piece(&mut from, &mut to, false, cx, &count))
    };
    assert!(matches!(poll_fn(&mut piece).await, Poll::Ready(Ok(true))));
    assert_eq!(Arc::strong_count(&held), 1);
    assert!(poll_fn(&mut piece).await.is_pending());
    assert_eq!((moved.get(), &*to.taken), (7, &b"a piece"[..]));
    assert_eq!(to.last, [false; 3]);
}

#[tokio::test]
async fn last_piece_is_marked_as_last_write() {
    let piece = Some(Bytes::from_static(b"a piece"));
    let mut from = Scripted { piece, at_end: true, ..Scripted::default() };
    let mut to = Scripted { takes: 4, ..Scripted::default() };
    let mut direction = Direction::default();
    let moved = poll_fn(|cx| direction.poll_piece(&mut from, &mut to, false, cx, &|_| {}));
    assert!(moved.await.unwrap());
    assert_eq!((&*to.taken, &*to.last), (&b"a piece"[..], &[true; 2][..]));
}
