//! Tests of unread streams beside a busy stream of the same tunnel.

use http::HeaderMap;

use crate::testing::Served;
use crate::testing::frames::{DATA, RawClient, SETTINGS, connect, frame};
use crate::tunnel::settings::ServerSettings;
use crate::tunnel::stream::{TunnelReader, TunnelWriter};

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
/// The number of frames of 16 KiB that the busy stream receives: more than two check intervals.
const FILLERS: usize = 600;

async fn accept(served: &mut Served) -> (TunnelReader, TunnelWriter) {
    served.next().await.accept(HeaderMap::new()).unwrap().split()
}

/// Sends a piece on stream 1 before each frame on stream 3, and reads only stream 3. Then reads
/// stream 1, and returns its chunks.
async fn chunks_beside_busy_stream(piece: impl Fn(u8, usize) -> Vec<u8>) -> Vec<usize> {
    let (mut client, server) = RawClient::new_with_settings_sent(ServerSettings::default()).await;
    let mut served = Served::new(server);
    let begin = [frame(SETTINGS, ACK, 0, &[]), connect(1), connect(3)].concat();
    client.send(&begin).await;
    let (mut stalled, _stalled_writer) = accept(&mut served).await;
    let (mut busy, _busy_writer) = accept(&mut served).await;
    let filler = frame(DATA, 0, 3, &[0; 16 << 10]);
    let mut sent = Vec::new();
    for index in 0..FILLERS {
        let piece = piece(index.to_le_bytes()[0], index);
        if !piece.is_empty() {
            client.send(&frame(DATA, 0, 1, &piece)).await;
        }
        client.send(&filler).await;
        sent.extend(piece);
        let mut read = 0;
        while read < 16 << 10 {
            read += busy.read().await.unwrap().unwrap().len();
        }
    }
    client.send(&frame(DATA, END_STREAM, 1, &[])).await;
    let (mut chunks, mut received) = (Vec::new(), Vec::new());
    while let Some(chunk) = stalled.read().await.unwrap() {
        chunks.push(chunk.len());
        received.extend_from_slice(&chunk);
    }
    assert!(received == sent, "in order, and nothing is missing");
    assert!(stalled.is_at_end());
    chunks
}

#[tokio::test]
async fn small_pieces_that_are_not_read_are_copied_together() {
    let chunks = chunks_beside_busy_stream(|byte, _| vec![byte]).await;
    // The pieces since the last two checks are still in h2's buffers.
    assert!(chunks.len() < FILLERS * 9 / 10, "{} chunks", chunks.len());
    assert!(chunks.iter().any(|length| *length > FILLERS / 10), "{chunks:?}");
}

#[tokio::test]
async fn large_pieces_are_not_copied() {
    // The large pieces add up to one window.
    let large = |byte, index| vec![byte; if index % 20 == 0 { 128 << 10 } else { 0 }];
    let chunks = chunks_beside_busy_stream(large).await;
    assert_eq!(chunks, vec![128 << 10; FILLERS / 20]);
}
