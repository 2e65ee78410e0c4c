//! Tests of small writes: to a blocked peer, to a peer that does not read, and to a peer that
//! reads.

use std::future::poll_fn;
use std::sync::atomic::Ordering;

use http::{HeaderMap, Response};
use tokio::io::duplex;
use tokio::time::{Instant, timeout};

use crate::error::HboneError;
use crate::testing::{
    ADDRESS, CLIENT, HOUR, Mesh, SECOND, SERVER, Served, StepwiseIo, authority, credentials, id,
    identity, request,
};
use crate::tunnel::client::Connector;
use crate::tunnel::settings::ClientSettings;
use crate::tunnel::stream::{TunnelReader, TunnelStream, TunnelWriter};

use super::*;

/// Writes one byte, then flushes for `pause`, like a proxy without more data.
async fn write_byte(writer: &mut TunnelWriter, pause: Duration) {
    let mut byte = Bytes::from_static(b"x");
    poll_fn(|cx| writer.poll_write(cx, &mut byte, false)).await.unwrap();
    let broken = timeout(pause, flush_until_error(writer)).await;
    assert!(broken.is_err(), "{broken:?}");
}

/// Sends gathered data whenever it is due, until the stream fails.
async fn flush_until_error(writer: &mut TunnelWriter) -> HboneError {
    poll_fn(|cx| match writer.poll_flush(cx) {
        Poll::Ready(Err(error)) => Poll::Ready(error),
        Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
    })
    .await
}

/// Reads this many bytes. Returns the number of chunks.
async fn chunks(reader: &mut TunnelReader, bytes: usize) -> usize {
    let (mut chunks, mut read) = (0, 0);
    while read < bytes {
        read += reader.read().await.unwrap().unwrap().len();
        chunks += 1;
    }
    assert_eq!(read, bytes);
    chunks
}

#[tokio::test(start_paused = true)]
async fn gathers_small_writes_while_connection_is_blocked() {
    const BULK: usize = 4 << 20;
    const BYTES: usize = 5000;
    let (near, far) = duplex(64 << 10);
    let far = StepwiseIo::new(far, 64 << 10);
    let stopped = far.stopped.clone();
    let (tunnel, server) = Mesh::new().tunnel_over(near, far).await;
    let mut served = Served::new(server);
    let (stream, far) = tokio::join!(tunnel.connect(request(), SECOND), async {
        served.next().await.accept(HeaderMap::new()).unwrap()
    });
    let (other, _far_other) = tokio::join!(tunnel.connect(request(), SECOND), async {
        served.next().await.accept(HeaderMap::new()).unwrap()
    });
    let (_reader, mut writer) = stream.unwrap().split();
    let (_other_reader, mut bulk) = other.unwrap().split();
    stopped.store(true, Ordering::Relaxed);
    // Fill the connection until TLS accepts no more data.
    let filled = timeout(SECOND, bulk.write(vec![0; BULK].into())).await;
    filled.unwrap_err();
    for _ in 0..BYTES {
        write_byte(&mut writer, Duration::ZERO).await;
    }
    let (mut far_reader, _far_writer) = far.split();
    stopped.store(false, Ordering::Relaxed);
    // Nothing wakes the waiting task while the connection is blocked; keepalive polls it.
    let chunks = tokio::select! {
        chunks = chunks(&mut far_reader, BYTES) => chunks,
        broken = flush_until_error(&mut writer) => panic!("{broken}"),
    };
    assert!(chunks < 10, "{chunks} frames for {BYTES} bytes");
}

#[tokio::test(start_paused = true)]
async fn small_writes_are_sent_at_once_to_peer_without_small_frame_limit() {
    let (near, far, _tunnel, _served) = Mesh::new().stream().await;
    let ((_reader, mut writer), (mut reader, _writer)) = (near.split(), far.split());
    let start = Instant::now();
    for _ in 0..2000 {
        let mut byte = Bytes::from_static(b"x");
        poll_fn(|cx| writer.poll_write(cx, &mut byte, false)).await.unwrap();
        assert!(writer.gather.is_empty());
        assert_eq!(chunks(&mut reader, 1).await, 1);
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
}

/// A peer with the defaults of h2 0.4.17. It does not read the first stream, and answers each chunk
/// of the second one.
async fn strict_peer() -> (TunnelStream, TunnelStream) {
    let authority = authority("td");
    let server = credentials(&identity(&authority, SERVER));
    let client = credentials(&identity(&authority, CLIENT)).fixed();
    let connector = Connector::new(client, ClientSettings::default());
    let (near, far) = duplex(64 << 10);
    tokio::spawn(async move {
        let (io, _) = server.server().accept(Box::new(far)).await.unwrap();
        let mut builder = h2::server::Builder::new();
        let handshake = builder.data_frame_budget(25_600).handshake::<_, Bytes>(io);
        let mut connection = handshake.await.unwrap();
        let (stalled, mut stalled_answer) = connection.accept().await.unwrap().unwrap();
        let _open = stalled_answer.send_response(Response::new(()), false).unwrap();
        let (echoed, mut answer) = connection.accept().await.unwrap().unwrap();
        let mut echo = answer.send_response(Response::new(()), false).unwrap();
        let mut body = echoed.into_body();
        tokio::spawn(async move {
            while let Some(Ok(chunk)) = body.data().await {
                body.flow_control().release_capacity(chunk.len()).unwrap();
                echo.send_data(chunk, false).unwrap();
            }
        });
        while let Some(Ok(_)) = connection.accept().await {}
        drop(stalled);
    });
    let tunnel = connector.open(near, ADDRESS, &[id(SERVER)], HOUR).await.unwrap();
    let stalled = tunnel.connect(request(), HOUR).await.unwrap();
    (stalled, tunnel.connect(request(), HOUR).await.unwrap())
}

#[tokio::test(start_paused = true)]
async fn stalled_reader_of_small_writes_does_not_affect_other_streams() {
    for pause in [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(3)] {
        let (stalled, neighbour) = strict_peer().await;
        let (_stalled_reader, mut stalled) = stalled.split();
        let (mut reader, mut writer) = neighbour.split();
        let mut longest = Duration::ZERO;
        for _ in 0..1000 {
            write_byte(&mut stalled, pause).await;
            let asked = Instant::now();
            let exchange = async {
                write_byte(&mut writer, Duration::ZERO).await;
                let flush = poll_fn(|cx| writer.poll_flush(cx));
                let (flushed, read) = tokio::join!(flush, reader.read());
                flushed.unwrap();
                assert_eq!(read.unwrap().unwrap(), "x");
            };
            exchange.await;
            longest = longest.max(asked.elapsed());
        }
        assert!(longest <= FIRST_PAUSE, "answered frames are not paced: {longest:?}");
    }
}
