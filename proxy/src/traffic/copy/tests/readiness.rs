//! Tests of the behaviour of tokio's readiness on which `readiness.rs` depends. A release of tokio
//! that changes it fails here.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::pin;
use std::task::Poll;

use bytes::BytesMut;
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use underpass_interception::reset_on_close;

use super::super::readiness::{aborted, mark_drained, read_pending_end};
use super::testing::pair;

/// Both ends of a connection without data. The first read of the accepted end clears tokio's
/// initial assumption that it is readable.
async fn quiet_pair() -> (TcpStream, TcpStream) {
    let (ours, theirs) = pair().await;
    mark_drained(&ours);
    (ours, theirs)
}

/// Whether tokio would make a system call to read.
fn asks_kernel(stream: &TcpStream) -> bool {
    let asked = Cell::new(false);
    let _would_block = stream.try_io(Interest::READABLE, || {
        asked.set(true);
        Err::<(), _>(ErrorKind::WouldBlock.into())
    });
    asked.get()
}

async fn is_readable(stream: &TcpStream) -> bool {
    poll_fn(|cx| Poll::Ready(stream.poll_read_ready(cx).is_ready())).await
}

#[tokio::test]
async fn wouldblock_error_clears_read_readiness_until_next_event() {
    let (ours, mut theirs) = quiet_pair().await;
    theirs.write_all(b"first").await.unwrap();
    ours.readable().await.unwrap();
    assert!(asks_kernel(&ours));
    mark_drained(&ours);
    assert!(!asks_kernel(&ours), "the readiness is cleared, though data is unread");
    assert!(!is_readable(&ours).await);
    theirs.write_all(b", second").await.unwrap();
    ours.readable().await.unwrap();
    let mut buffer = BytesMut::with_capacity(100);
    assert_eq!(ours.try_read_buf(&mut buffer).unwrap(), 13);
}

#[tokio::test]
async fn wouldblock_error_keeps_readiness_for_fin() {
    let (ours, mut theirs) = quiet_pair().await;
    theirs.shutdown().await.unwrap();
    assert!(ours.ready(Interest::READABLE).await.unwrap().is_read_closed());
    mark_drained(&ours);
    assert!(asks_kernel(&ours));
    assert!(is_readable(&ours).await);
    let mut buffer = BytesMut::with_capacity(100);
    assert!(matches!(read_pending_end(&ours, &mut buffer), Some(Ok(()))));
}

#[tokio::test]
async fn wouldblock_error_keeps_readiness_for_reset() {
    let (ours, theirs) = quiet_pair().await;
    reset_on_close(&theirs);
    drop(theirs);
    ours.readable().await.unwrap();
    mark_drained(&ours);
    let mut buffer = BytesMut::with_capacity(100);
    let end = read_pending_end(&ours, &mut buffer).unwrap();
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn drained_socket_without_event_has_no_pending_end() {
    let (ours, mut theirs) = quiet_pair().await;
    theirs.write_all(b"data").await.unwrap();
    ours.readable().await.unwrap();
    mark_drained(&ours);
    theirs.shutdown().await.unwrap();
    let mut buffer = BytesMut::with_capacity(100);
    assert!(read_pending_end(&ours, &mut buffer).is_none(), "epoll was not polled yet");
    assert!(buffer.is_empty());
}

#[tokio::test]
async fn reset_ends_the_wait_for_an_abort_and_fin_does_not() {
    let (ours, mut theirs) = quiet_pair().await;
    theirs.shutdown().await.unwrap();
    ours.readable().await.unwrap();
    let mut waiting = pin!(aborted(&ours));
    let pending = poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx).is_pending())).await;
    assert!(pending, "a FIN is no abort");
    reset_on_close(&theirs);
    drop(theirs);
    let error = waiting.await;
    assert_eq!(error.kind(), ErrorKind::BrokenPipe, "Linux's error for RST after FIN");
}

#[tokio::test]
async fn reset_ends_the_wait_for_an_abort_though_data_is_unread() {
    let (ours, mut theirs) = quiet_pair().await;
    theirs.write_all(b"unread").await.unwrap();
    ours.readable().await.unwrap();
    reset_on_close(&theirs);
    drop(theirs);
    assert_eq!(aborted(&ours).await.kind(), ErrorKind::ConnectionReset);
}
