//! Much of it: every byte once and in order, spliced or copied, and nothing held when it is over.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::splice;
use super::testing::{End, Scene, Way};

/// A stream whose every byte depends on where it is.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect()
}

/// Sends `total` bytes of the pattern in pieces of all sizes, then FIN.
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

/// Reads to FIN in pieces of all sizes, now and then giving others their turn: how much that was, and whether any was spliced.
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

/// Whether any was spliced.
async fn both_ways(client: &mut TcpStream, server: &mut TcpStream) -> bool {
    let ((), there) = tokio::join!(send(client, TOTAL), receive(server));
    let ((), back) = tokio::join!(send(server, TOTAL + 1), receive(client));
    assert_eq!((there.0, back.0), (TOTAL, TOTAL + 1));
    there.1 || back.1
}

#[tokio::test]
async fn spliced_bulk_arrives_whole_with_its_fin_and_is_counted_exactly() {
    let mut scene = Scene::new(Way::Plain).await;
    let (mut client, mut server) = scene.take_sockets();
    assert!(both_ways(&mut client, &mut server).await, "it is spliced");
    let (outcome, moved) = scene.ended().await;
    assert!(outcome.is_ok(), "{outcome:?}");
    assert_eq!(moved, 2 * TOTAL as u64 + 1);
    assert_eq!((splice::members(), splice::spare()), (0, 0), "no pipe is left");
}

#[tokio::test]
async fn without_memory_for_more_bulk_is_copied_in_small_pieces() {
    let mut scene = Scene::with_buffers(Way::Plain, 4096).await;
    let (mut client, mut server) = scene.take_sockets();
    let buffers = scene.buffers.clone();
    assert!(!both_ways(&mut client, &mut server).await, "there is no memory for a pipe");
    assert_eq!(scene.ended().await.1, 2 * TOTAL as u64 + 1);
    assert_eq!(buffers.used(), 0);
}

#[tokio::test]
async fn bulk_that_is_cut_leaves_nothing_in_a_pipe_of_others() {
    let mut cut = Scene::new(Way::Plain).await;
    let mut healthy = Scene::new(Way::Plain).await;
    cut.bulk_to_client().await;
    healthy.bulk_to_client().await;
    assert_eq!(splice::members(), 2);
    // One pipe is full, since nobody reads; and then its reader is gone.
    cut.server.send_until_it_blocks().await;
    assert!(cut.buffers.used() >= 256 * 1024, "{}", cut.buffers.used());
    cut.client.abort();
    assert_eq!(cut.server.end_of_writing().await, End::Reset);
    let buffers = cut.buffers.clone();
    Way::Plain.assert_clients(cut.ended().await.0);
    assert_eq!(buffers.used(), 0);
    let next = pattern(0, 4 << 20);
    let ((), received) =
        tokio::join!(healthy.server.send(&next), healthy.client.receive(next.len()));
    assert!(received == next, "bytes of another connection");
}

#[tokio::test]
async fn what_was_bulk_and_is_a_conversation_again_is_copied_again() {
    let mut scene = Scene::new(Way::Plain).await;
    scene.bulk_to_client().await;
    assert_eq!(splice::members(), 1);
    for _ in 0..20 {
        scene.exchange().await;
    }
    assert_eq!((splice::members(), splice::spare()), (0, 0));
    assert_eq!(scene.buffers.used(), 0, "an idle connection holds nothing");
}

#[tokio::test]
async fn a_tunnel_carries_bulk_and_holds_no_buffer_when_it_rests() {
    for way in [Way::IntoTunnel, Way::OutOfTunnel] {
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
