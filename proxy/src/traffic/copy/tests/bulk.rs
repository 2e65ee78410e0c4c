//! Tests of bulk, spliced or copied: every byte arrives once and in order, and no memory is held
//! afterwards.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::splice;
use super::testing::{End, FlowKind, Scene};

/// Bytes that each depend on their position in the stream.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect()
}

/// Sends `total` bytes of the pattern in pieces of varying size, then FIN.
async fn send(stream: &mut TcpStream, total: usize) {
    let mut sent = 0;
    let mut piece = 1;
    while sent < total {
        let len = piece.min(total - sent);
        stream.write_all(&pattern(sent, len)).await.unwrap();
        sent += len;
        piece = (piece * 7 + 3) % 700_000 + 1;
    }
    stream.shutdown().await.unwrap();
}

/// Reads until FIN in pieces of varying size, and yields at times. Returns the number of bytes, and
/// whether any were spliced.
async fn receive(stream: &mut TcpStream) -> (usize, bool) {
    let (mut received, mut piece, mut spliced) = (0, 1, false);
    loop {
        let mut buffer = vec![0; piece];
        let read = stream.read(&mut buffer).await.unwrap();
        if read == 0 {
            return (received, spliced);
        }
        assert!(buffer[..read] == pattern(received, read), "wrong bytes after {received}");
        received += read;
        spliced |= splice::members() > 0;
        piece = (piece * 5 + 1) % 300_000 + 1;
        for _ in 0..piece % 8 {
            tokio::task::yield_now().await;
        }
    }
}

const TOTAL: usize = 24 << 20;

/// Sends bulk in both directions. Returns whether any was spliced.
async fn both_ways(client: &mut TcpStream, server: &mut TcpStream) -> bool {
    let ((), upload) = tokio::join!(send(client, TOTAL), receive(server));
    let ((), download) = tokio::join!(send(server, TOTAL + 1), receive(client));
    assert_eq!((upload.0, download.0), (TOTAL, TOTAL + 1));
    upload.1 || download.1
}

#[tokio::test]
async fn spliced_bulk_arrives_whole_and_is_counted_exactly() {
    let mut scene = Scene::new(FlowKind::Plain).await;
    let (mut client, mut server) = scene.take_sockets();
    assert!(both_ways(&mut client, &mut server).await, "it is spliced");
    let (outcome, moved) = scene.ended().await;
    assert!(outcome.is_ok(), "{outcome:?}");
    assert_eq!(moved, 2 * TOTAL as u64 + 1);
    assert_eq!((splice::members(), splice::spare()), (0, 0), "no pipe is left");
}

#[tokio::test]
async fn bulk_is_copied_in_small_pieces_at_buffer_limit() {
    let mut scene = Scene::with_buffers(FlowKind::Plain, 4096).await;
    let (mut client, mut server) = scene.take_sockets();
    let buffers = scene.buffers.clone();
    assert!(!both_ways(&mut client, &mut server).await, "there is no memory for a pipe");
    assert_eq!(scene.ended().await.1, 2 * TOTAL as u64 + 1);
    assert_eq!(buffers.used(), 0);
}

#[tokio::test]
async fn aborted_bulk_leaves_no_data_in_reused_pipe() {
    let mut aborted = Scene::new(FlowKind::Plain).await;
    let mut healthy = Scene::new(FlowKind::Plain).await;
    aborted.bulk_to_client().await;
    healthy.bulk_to_client().await;
    assert_eq!(splice::members(), 2);
    // The client does not read, so that the pipe fills; then the client aborts.
    aborted.server.send_until_it_blocks().await;
    assert!(aborted.buffers.used() >= 256 * 1024, "{}", aborted.buffers.used());
    aborted.client.abort();
    assert_eq!(aborted.server.end_of_writing().await, End::Reset);
    let buffers = aborted.buffers.clone();
    FlowKind::Plain.assert_client_aborted(aborted.ended().await.0);
    assert_eq!(buffers.used(), 0);
    let next = pattern(0, 4 << 20);
    let ((), received) =
        tokio::join!(healthy.server.send(&next), healthy.client.receive(next.len()));
    assert!(received == next, "bytes of another connection");
}

#[tokio::test]
async fn spliced_direction_is_copied_again_after_small_messages() {
    let mut scene = Scene::new(FlowKind::Plain).await;
    scene.bulk_to_client().await;
    assert_eq!(splice::members(), 1);
    for _ in 0..20 {
        scene.exchange().await;
    }
    assert_eq!((splice::members(), splice::spare()), (0, 0));
    assert_eq!(scene.buffers.used(), 0, "an idle connection holds nothing");
}

#[tokio::test]
async fn tunnel_carries_bulk_and_holds_no_buffer_when_idle() {
    for way in [FlowKind::IntoTunnel, FlowKind::OutOfTunnel] {
        let mut scene = Scene::new(way).await;
        let data = pattern(0, 8 << 20);
        for client_sends in [true, false] {
            let (one, other) = scene.sides(client_sends);
            let ((), received) = tokio::join!(one.send(&data), other.receive(data.len()));
            assert!(received == data, "{way:?}");
        }
        scene.exchange().await;
        assert_eq!(scene.buffers.used(), 0, "{way:?}");
    }
}
