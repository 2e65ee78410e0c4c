//! Tests of sent records: sizes, system calls, back-pressure, and close_notify.

use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::AsyncWrite;

use super::*;
use crate::tls::record::MAX_SEALED;

type Polled<T> = Poll<io::Result<T>>;

fn polled<T>(
    stream: &mut TlsStream<Wire>,
    poll: impl FnOnce(Pin<&mut TlsStream<Wire>>, &mut Context<'_>) -> Polled<T>,
) -> Polled<T> {
    poll(Pin::new(stream), &mut Context::from_waker(Waker::noop()))
}

fn ready<T>(polled: Polled<T>) -> T {
    match polled {
        Poll::Ready(Ok(value)) => value,
        Poll::Ready(Err(error)) => panic!("{error}"),
        Poll::Pending => panic!("pending"),
    }
}

fn flush(stream: &mut TlsStream<Wire>) -> Polled<()> {
    polled(stream, |stream, cx| stream.poll_flush(cx))
}

fn shut_down(stream: &mut TlsStream<Wire>) -> Polled<()> {
    polled(stream, |stream, cx| stream.poll_shutdown(cx))
}

/// Writes `content` completely, then flushes.
pub(super) fn write(stream: &mut TlsStream<Wire>, mut content: &[u8]) {
    while !content.is_empty() {
        let written = ready(polled(stream, |stream, cx| stream.poll_write(cx, content)));
        content = &content[written..];
    }
    ready(flush(stream));
}

fn write_pieces(stream: &mut TlsStream<Wire>, lengths: &[usize]) -> usize {
    let all = numbered(lengths.iter().sum());
    let mut rest = &all[..];
    let pieces = lengths.iter().map(|length| {
        let (piece, after) = rest.split_at(*length);
        rest = after;
        IoSlice::new(piece)
    });
    let pieces: Vec<_> = pieces.collect();
    ready(polled(stream, |stream, cx| stream.poll_write_vectored(cx, &pieces)))
}

/// The lengths of the received records. Asserts that their content is correct.
fn lengths(peer: &mut Peer) -> Vec<usize> {
    let records = peer.received();
    assert!(records.iter().all(|(kind, _)| *kind == DATA));
    let contents: Vec<_> = records.into_iter().map(|(_, content)| content).collect();
    assert!(contents.concat() == numbered(contents.concat().len()));
    contents.iter().map(Vec::len).collect()
}

#[test]
fn gathers_pieces_into_records() {
    const FULL: usize = MAX_CONTENT;
    for (pieces, expected) in [
        (&[1][..], &[1][..]),
        (&[0, 5, 0, 7, 0], &[12]),
        (&[256, 1000], &[1256]),
        (&[256, FULL - 256], &[FULL]),
        (&[10_000, 10_000, 10_000], &[FULL, 30_000 - FULL]),
        // Many small slices are copied into one record.
        (&[300; 64], &[FULL, 64 * 300 - FULL]),
        // A short slice before a large one gets its own record.
        (&[256, FULL], &[256, FULL]),
        (&[256, 3 * FULL - 247], &[256, FULL, FULL, FULL - 247]),
        (&[FULL, 1], &[FULL, 1]),
    ] {
        let (mut stream, mut peer) = client();
        assert_eq!(write_pieces(&mut stream, pieces), pieces.iter().sum::<usize>());
        ready(flush(&mut stream));
        assert_eq!(lengths(&mut peer), expected, "{pieces:?}");
    }
}

#[test]
fn large_frame_is_written_by_one_call() {
    let (mut stream, mut peer) = client();
    assert_eq!(write_pieces(&mut stream, &[256, (128 << 10) - 247]), 9 + (128 << 10));
    assert_eq!(peer.wire.pipe().calls, 0, "only the flush sends");
    ready(flush(&mut stream));
    assert_eq!(peer.wire.pipe().calls, 1);
    assert_eq!(lengths(&mut peer).len(), 9);
}

#[test]
fn write_larger_than_buffer_takes_full_records_only() {
    let (mut stream, mut peer) = client();
    let written = write_pieces(&mut stream, &[1 << 20]);
    assert!(written > 0 && written.is_multiple_of(MAX_CONTENT), "{written}");
    ready(flush(&mut stream));
    assert!(lengths(&mut peer).iter().all(|length| *length == MAX_CONTENT));
}

#[test]
fn empty_write_sends_nothing() {
    let (mut stream, mut peer) = client();
    assert_eq!(write_pieces(&mut stream, &[0, 0]), 0);
    ready(flush(&mut stream));
    assert!(peer.received().is_empty());
}

#[test]
fn peer_that_does_not_read_blocks_writes() {
    let (mut stream, mut peer) = client();
    peer.wire.pipe().room = 1000;
    let all = numbered(1 << 20);
    let mut taken = 0;
    while let Poll::Ready(written) =
        polled(&mut stream, |stream, cx| stream.poll_write(cx, &all[taken..]))
    {
        taken += written.unwrap();
    }
    assert!(taken <= 9 * MAX_CONTENT, "{taken}");
    assert!(flush(&mut stream).is_pending());
    for room in [1, MAX_SEALED, 30_000] {
        peer.wire.pipe().room = room;
        assert!(flush(&mut stream).is_pending());
    }
    peer.wire.pipe().room = usize::MAX;
    write(&mut stream, &all[taken..]);
    assert_eq!(lengths(&mut peer).iter().sum::<usize>(), all.len());
}

#[test]
fn sends_close_notify_once_and_nothing_after_it() {
    let (mut stream, mut peer) = server();
    let written = polled(&mut stream, |stream, cx| stream.poll_write(cx, b"last"));
    assert_eq!(ready(written), 4);
    ready(shut_down(&mut stream));
    ready(shut_down(&mut stream));
    assert_eq!(peer.received(), [(DATA, b"last".to_vec()), (ALERT, vec![1, 0])]);
    let Poll::Ready(Err(error)) = polled(&mut stream, |stream, cx| stream.poll_write(cx, b"more"))
    else {
        panic!("nothing is written after the end");
    };
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    // The receiving direction stays open. After close_notify, a violation is not answered with an
    // alert.
    peer.send(DATA, b"still");
    assert_eq!(read_all(&mut stream, 100).0, b"still");
    peer.send_raw(&[1, 2, 3, 4, 5]);
    read_all(&mut stream, 100).1.unwrap().unwrap_err();
    assert!(peer.received().is_empty());
}

#[test]
fn writes_after_close_notify_of_peer() {
    let (mut stream, mut peer) = client();
    peer.send(ALERT, &[1, 0]);
    read_all(&mut stream, 100).1.unwrap().unwrap();
    write(&mut stream, b"ours");
    ready(shut_down(&mut stream));
    assert_eq!(peer.received(), [(DATA, b"ours".to_vec()), (ALERT, vec![1, 0])]);
}

#[test]
fn failed_stream_writes_only_the_alert() {
    let (mut stream, mut peer) = client();
    peer.wire.pipe().room = 0;
    let written = polled(&mut stream, |stream, cx| stream.poll_write(cx, b"before"));
    assert_eq!(ready(written), 6);
    peer.send_raw(&[23, 3, 3, 255, 255]);
    assert_eq!(tls_error(read_all(&mut stream, 100).1), Error::PeerSentOversizedRecord);
    let Poll::Ready(Err(error)) = polled(&mut stream, |stream, cx| stream.poll_write(cx, b"after"))
    else {
        panic!("nothing is accepted after the failure");
    };
    assert_eq!(tls_error(Some(Err(error))), Error::PeerSentOversizedRecord);
    peer.wire.pipe().room = usize::MAX;
    ready(shut_down(&mut stream));
    let alert = vec![2, u8::from(AlertDescription::RecordOverflow)];
    assert_eq!(peer.received(), [(DATA, b"before".to_vec()), (ALERT, alert)]);
}
