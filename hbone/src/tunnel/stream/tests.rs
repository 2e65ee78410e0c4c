//! Tests of streams between an in-memory client and server: ends, aborts and back-pressure.

use std::future::poll_fn;

use bytes::Bytes;
use h2::Reason;
use http::HeaderMap;
use tokio::io::duplex;

use crate::error::HboneError;
use crate::testing::{Mesh, SECOND, SERVER, Served, StepwiseIo, request};
use crate::tunnel::client::Tunnel;
use crate::tunnel::settings::{ClientSettings, Http2Settings, ServerSettings};
use crate::tunnel::stream::{TunnelReader, TunnelStream, TunnelWriter};

/// Reads to the end. Returns the number of bytes.
async fn drain(reader: &mut TunnelReader) -> Result<usize, HboneError> {
    let mut total = 0;
    while let Some(chunk) = reader.read().await? {
        total += chunk.len();
    }
    Ok(total)
}

async fn echo(stream: TunnelStream) {
    let (mut reader, mut writer) = stream.split();
    while let Some(chunk) = reader.read().await.unwrap() {
        writer.write(chunk).await.unwrap();
    }
    writer.finish().unwrap();
}

async fn round_trip(stream: TunnelStream, data: Bytes) -> Vec<u8> {
    let (mut reader, mut writer) = stream.split();
    let send = async {
        writer.write(data).await.unwrap();
        writer.finish().unwrap();
    };
    let receive = async {
        let mut received = Vec::new();
        while let Some(chunk) = reader.read().await.unwrap() {
            received.extend_from_slice(&chunk);
        }
        received
    };
    tokio::join!(send, receive).1
}

fn pattern(len: usize) -> Bytes {
    (0..=250).cycle().take(len).collect()
}

#[tokio::test]
async fn end_is_sent_with_last_data() {
    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let ((_near_reader, mut writer), (mut reader, _far_writer)) = (near.split(), far.split());
    // More data than a window: it needs several writes, and only the last one carries END_STREAM.
    let (mut data, mut received, mut seen) = (pattern(5 << 20), 0, Vec::new());
    let total = data.len();
    let send = async {
        while !data.is_empty() {
            poll_fn(|cx| writer.poll_write(cx, &mut data, true)).await.unwrap();
        }
        // END_STREAM was sent already, so `finish` does nothing.
        writer.finish().unwrap();
        assert!(writer.write(Bytes::from_static(b"more")).await.is_err());
    };
    let receive = async {
        while let Some(chunk) = reader.read().await.unwrap() {
            received += chunk.len();
            seen.push(reader.is_at_end());
        }
    };
    tokio::join!(send, receive);
    assert_eq!(received, total);
    assert_eq!(seen.pop(), Some(true));
    assert!(seen.len() > 2 && seen.iter().all(|at_end| !at_end), "{seen:?}");
}

#[tokio::test]
async fn both_sides_are_identified_and_echoed_bytes_are_in_order() {
    let (near, far, tunnel, _served) = Mesh::new().stream().await;
    assert_eq!(near.peer().spiffe_id().to_string(), SERVER);
    assert_eq!(far.peer().spiffe_id().to_string(), crate::testing::CLIENT);
    assert_eq!(tunnel.open_streams(), 1);
    let echo = tokio::spawn(echo(far));
    // More data than the window, the send buffer and a frame together.
    let data = pattern(20 << 20);
    assert!(round_trip(near, data.clone()).await == data);
    echo.await.unwrap();
    assert_eq!(tunnel.open_streams(), 0);
}

#[tokio::test]
async fn bytes_arrive_unchanged_over_one_byte_transport() {
    let mesh = Mesh::new();
    // The minimum buffer: h2 writes its preface and first SETTINGS before it reads.
    let (near, far) = duplex(256);
    let (tunnel, server) =
        mesh.tunnel_over(StepwiseIo::new(near, 1), StepwiseIo::new(far, 1)).await;
    let mut served = Served::new(server);
    let (near, far) = tokio::join!(tunnel.connect(request(), SECOND), async {
        served.next().await.accept(HeaderMap::new())
    });
    tokio::spawn(echo(far.unwrap()));
    let data = pattern(3000);
    assert!(round_trip(near.unwrap(), data.clone()).await == data);
}

#[tokio::test]
async fn directions_end_independently() {
    for client_first in [true, false] {
        let (near, far, _tunnel, _served) = Mesh::new().stream().await;
        let (first, second) = if client_first { (near, far) } else { (far, near) };
        let (mut first_reader, mut first_writer) = first.split();
        let (mut second_reader, mut second_writer) = second.split();
        first_writer.write(Bytes::from_static(b"request")).await.unwrap();
        first_writer.finish().unwrap();
        drop(first_writer);
        assert_eq!(drain(&mut second_reader).await.unwrap(), 7);
        second_writer.write(Bytes::from_static(b"late answer")).await.unwrap();
        second_writer.finish().unwrap();
        assert_eq!(drain(&mut first_reader).await.unwrap(), 11);
    }
}

/// Aborts one side by `stop`, and checks the error of the other side. Returns its reason.
async fn reason_of_abort(client_aborts: bool, stop: impl Fn(TunnelReader, TunnelWriter)) -> Reason {
    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let (stopping, other) = if client_aborts { (near, far) } else { (far, near) };
    let (stopping_reader, mut stopping_writer) = stopping.split();
    let (mut reader, mut writer) = other.split();
    stopping_writer.write(Bytes::from_static(b"part")).await.unwrap();
    assert_eq!(reader.read().await.unwrap().unwrap(), "part");
    stop(stopping_reader, stopping_writer);
    let HboneError::Reset { reason } = reader.read().await.unwrap_err() else {
        panic!("an abort must be a reset");
    };
    assert!(reader.read().await.is_err(), "an abort stays an abort");
    assert!(matches!(writer.closed().await, HboneError::Reset { .. }));
    let refused = writer.write(Bytes::from_static(b"x")).await.unwrap_err();
    assert!(matches!(refused, HboneError::Reset { .. }), "{refused:?}");
    assert!(writer.finish().is_err());
    reason
}

#[tokio::test]
async fn abort_is_an_error_in_both_directions_of_the_peer() {
    for client_aborts in [true, false] {
        let aborted = |_reader, mut writer: TunnelWriter| writer.abort();
        assert_eq!(reason_of_abort(client_aborts, aborted).await, Reason::CONNECT_ERROR);
        let dropped = |reader, writer| drop((reader, writer));
        assert_eq!(reason_of_abort(client_aborts, dropped).await, Reason::CONNECT_ERROR);
        let after_finish =
            |_reader, mut writer: TunnelWriter| writer.send.send_reset(Reason::CANCEL);
        assert_eq!(reason_of_abort(client_aborts, after_finish).await, Reason::CANCEL);
        let no_error = |_reader, mut writer: TunnelWriter| writer.send.send_reset(Reason::NO_ERROR);
        assert_eq!(reason_of_abort(client_aborts, no_error).await, Reason::NO_ERROR);
    }
}

#[tokio::test]
async fn finished_writer_can_abort_the_other_direction() {
    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let (_near_reader, mut near_writer) = near.split();
    let (mut reader, mut writer) = far.split();
    near_writer.finish().unwrap();
    assert!(reader.read().await.unwrap().is_none());
    near_writer.finish().unwrap();
    near_writer.abort();
    let HboneError::Reset { reason } = writer.closed().await else { panic!() };
    assert_eq!(reason, Reason::CONNECT_ERROR);
}

#[tokio::test]
async fn lost_connection_is_an_error_not_an_end() {
    let (near, far, tunnel, served) = Mesh::new().stream().await;
    let (mut reader, mut writer) = near.split();
    served.abort().await;
    let (mut far_reader, mut far_writer) = far.split();
    for error in [
        reader.read().await.unwrap_err(),
        writer.closed().await,
        writer.write(Bytes::from_static(b"x")).await.unwrap_err(),
        writer.finish().unwrap_err(),
        far_reader.read().await.unwrap_err(),
        far_writer.closed().await,
    ] {
        assert!(matches!(error, HboneError::Lost { .. }), "{error:?}");
    }
    assert!(tunnel.is_closed());
}

#[tokio::test(start_paused = true)]
async fn unread_stream_blocks_its_writer_after_one_window() {
    let http2 = Http2Settings {
        stream_window: 100_000,
        connection_window: 300_000,
        send_buffer: 50_000,
        ..Http2Settings::default()
    };
    let client = ClientSettings { http2: http2.clone(), ..ClientSettings::default() };
    let server = ServerSettings { http2, ..ServerSettings::default() };
    for client_writes in [true, false] {
        let (near, far, _tunnel, _served) =
            Mesh::with(client.clone(), server.clone()).stream().await;
        let (writing, reading) = if client_writes { (near, far) } else { (far, near) };
        let (mut reader, _kept) = reading.split();
        let (_kept, mut writer) = writing.split();
        let mut sent = 0;
        let piece = Bytes::from_static(&[0; 1000]);
        while tokio::time::timeout(SECOND, writer.write(piece.clone())).await.is_ok() {
            sent += piece.len();
        }
        assert_eq!(sent, 100_000, "the stream window, and no more");
        // The next read returns the flow-control credit of this chunk.
        let chunk = reader.read().await.unwrap().unwrap();
        let stuck = tokio::time::timeout(SECOND, writer.write(piece.clone())).await;
        assert!(
            stuck.is_err(),
            "{} bytes were read, but their credit is not returned",
            chunk.len()
        );
        let mut received = chunk.len();
        while received < sent {
            received += reader.read().await.unwrap().unwrap().len();
        }
        let (written, _) = tokio::join!(writer.write(piece.clone()), reader.read());
        written.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn unread_streams_are_bounded_by_connection_window() {
    let http2 = Http2Settings {
        stream_window: 100_000,
        connection_window: 300_000,
        ..Http2Settings::default()
    };
    let server = ServerSettings { http2, ..ServerSettings::default() };
    let mesh = Mesh::with(ClientSettings::default(), server);
    let (tunnel, server) = mesh.tunnel().await;
    let mut served = Served::new(server);
    let mut unread = Vec::new();
    let mut sent = 0;
    let piece = Bytes::from_static(&[0; 1000]);
    for _ in 0..10 {
        let (near, far) = tokio::join!(tunnel.connect(request(), SECOND), async {
            served.next().await.accept(HeaderMap::new())
        });
        let (reader, mut writer) = near.unwrap().split();
        while tokio::time::timeout(SECOND, writer.write(piece.clone())).await.is_ok() {
            sent += piece.len();
        }
        unread.push((reader, writer, far.unwrap()));
    }
    assert_eq!(sent, 300_000);
}

/// Opens a stream. Returns the writer of one direction and its reader.
async fn direction(
    tunnel: &Tunnel,
    served: &mut Served,
    client_writes: bool,
) -> (TunnelStream, TunnelStream) {
    let (near, far) = tokio::join!(tunnel.connect(request(), SECOND), async {
        served.next().await.accept(HeaderMap::new())
    });
    let (near, far) = (near.unwrap(), far.unwrap());
    if client_writes { (near, far) } else { (far, near) }
}

#[tokio::test(start_paused = true)]
async fn unread_streams_do_not_block_other_streams() {
    // A sixteenth of the default windows.
    let http2 = Http2Settings {
        stream_window: 256 << 10,
        crowded_stream_window: 8 << 10,
        connection_window: 4 << 20,
        ..Http2Settings::default()
    };
    let client = ClientSettings { http2: http2.clone(), ..ClientSettings::default() };
    let server = ServerSettings { http2, ..ServerSettings::default() };
    for client_writes in [true, false] {
        let (tunnel, server) = Mesh::with(client.clone(), server.clone()).tunnel().await;
        let mut served = Served::new(server);
        let mut stalled = Vec::new();
        for _ in 0..99 {
            let (writing, reading) = direction(&tunnel, &mut served, client_writes).await;
            let (kept_reader, mut writer) = writing.split();
            let (reader, kept_writer) = reading.split();
            let (mut sent, piece) = (0, pattern(10_000));
            while tokio::time::timeout(SECOND, writer.write(piece.clone())).await.is_ok() {
                sent += piece.len();
            }
            stalled.push((sent, reader, writer, kept_reader, kept_writer));
        }
        let (writing, reading) = direction(&tunnel, &mut served, client_writes).await;
        tokio::spawn(echo(reading));
        let data = pattern(5 << 20);
        let moved = tokio::time::timeout(60 * SECOND, round_trip(writing, data.clone())).await;
        assert!(moved.expect("the stream continues") == data);
        // The stalled streams continue without loss.
        for (sent, mut reader, mut writer, ..) in stalled {
            writer.finish().unwrap();
            let received = tokio::time::timeout(SECOND, drain(&mut reader)).await;
            assert!(received.expect("the stream continues").unwrap() >= sent);
        }
    }
}

#[tokio::test]
async fn unread_small_writes_do_not_end_the_tunnel() {
    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let (mut reader, _kept) = near.split();
    let (_kept, mut writer) = far.split();
    for _ in 0..40_000 {
        writer.write(Bytes::from_static(b"tick\n")).await.unwrap();
    }
    writer.finish().unwrap();
    tokio::task::yield_now().await;
    assert_eq!(drain(&mut reader).await.unwrap(), 200_000);
}
