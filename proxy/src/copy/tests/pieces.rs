//! A direction by itself, between sides that a test plays.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::net::TcpStream;

use super::super::{Direction, Side};
use crate::error::ProxyError;

/// Gives one piece, and takes some bytes at a time.
#[derive(Default)]
struct Played {
    gives: Option<Bytes>,
    at_end: bool,
    takes: usize,
    taken: Vec<u8>,
    /// Whether that was said to be the last, each time.
    last: Vec<bool>,
}

impl Side for Played {
    fn poll_read(&mut self, _: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>> {
        self.gives.take().map_or(Poll::Pending, |piece| Poll::Ready(Ok(Some(piece))))
    }

    fn is_at_end(&self) -> bool {
        self.at_end
    }

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

    fn finish(&mut self) -> Result<(), ProxyError> {
        Ok(())
    }

    fn poll_aborted(&mut self, _: &mut Context<'_>) -> Poll<ProxyError> {
        Poll::Pending
    }

    fn poll_cut(&mut self, _: &mut Context<'_>) -> Poll<ProxyError> {
        Poll::Pending
    }

    fn close(&mut self, _: bool) {}

    fn socket(&self) -> Option<&TcpStream> {
        None
    }
}

/// What a piece is in, as long as anybody holds it.
struct Memory(#[expect(dead_code, reason = "it counts for as long as it lives")] Arc<()>);

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        b"a piece"
    }
}

#[tokio::test]
async fn a_direction_that_waits_holds_nothing_of_what_it_has_written() {
    let held = Arc::new(());
    let piece = Bytes::from_owner(Memory(held.clone()));
    let mut from = Played { gives: Some(piece), ..Played::default() };
    let mut to = Played { takes: 3, ..Played::default() };
    let mut direction = Direction::default();
    let moved = std::cell::Cell::new(0);
    let mut piece = |cx: &mut Context<'_>| {
        let count = |bytes| moved.set(moved.get() + bytes);
        Poll::Ready(direction.poll_piece(&mut from, &mut to, cx, &count))
    };
    assert!(matches!(poll_fn(&mut piece).await, Poll::Ready(Ok(true))));
    assert_eq!(Arc::strong_count(&held), 1);
    assert!(poll_fn(&mut piece).await.is_pending());
    assert_eq!((moved.get(), &*to.taken), (7, &b"a piece"[..]));
    assert_eq!(to.last, [false; 3]);
}

#[tokio::test]
async fn who_writes_the_last_piece_is_told_that_it_is() {
    let gives = Some(Bytes::from_static(b"a piece"));
    let mut from = Played { gives, at_end: true, ..Played::default() };
    let mut to = Played { takes: 4, ..Played::default() };
    let mut direction = Direction::default();
    let moved = poll_fn(|cx| direction.poll_piece(&mut from, &mut to, cx, &|_| {}));
    assert!(moved.await.unwrap());
    assert_eq!((&*to.taken, &*to.last), (&b"a piece"[..], &[true; 2][..]));
}
