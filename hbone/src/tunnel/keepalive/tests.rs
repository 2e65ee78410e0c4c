//! Tests of silent and slow peers, in paused time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::HeaderMap;
use tokio::io::duplex;
use tokio::time::{Instant, sleep, timeout};

use crate::error::HboneError;
use crate::testing::{HOUR, Mesh, SECOND, Served, StepwiseIo, request};
use crate::tunnel::settings::{ClientSettings, ServerSettings};
use crate::tunnel::stream::TunnelStream;

/// Opens a stream on a connection whose client or server can stop receiving.
async fn stream_with_stopped_side(
    client_stops: bool,
) -> (
    TunnelStream,
    TunnelStream,
    crate::tunnel::client::Tunnel,
    Served,
    Arc<std::sync::atomic::AtomicBool>,
) {
    let (near, far) = duplex(64 << 10);
    let (near, far) = (StepwiseIo::new(near, 64 << 10), StepwiseIo::new(far, 64 << 10));
    let stopped = if client_stops { near.stopped.clone() } else { far.stopped.clone() };
    let (mut client, mut server) = (ClientSettings::default(), ServerSettings::default());
    // The side that stops receiving must not time out first.
    let stopped_side = if client_stops { &mut client.keepalive } else { &mut server.keepalive };
    stopped_side.ping_after = HOUR;
    let (tunnel, server) = Mesh::with(client, server).tunnel_over(near, far).await;
    let mut served = Served::new(server);
    let (near, far) = tokio::join!(tunnel.connect(request(), SECOND), async {
        served.next().await.accept(HeaderMap::new()).unwrap()
    });
    (near.unwrap(), far, tunnel, served, stopped)
}

#[tokio::test(start_paused = true)]
async fn silent_peer_is_detected_by_client_and_server() {
    for client_stops in [true, false] {
        let (near, far, _tunnel, _served, stopped) = stream_with_stopped_side(client_stops).await;
        let start = Instant::now();
        stopped.store(true, Ordering::Relaxed);
        let running = if client_stops { far } else { near };
        let (mut reader, mut writer) = running.split();
        // With a timeout, a missing detection fails the test instead of blocking it.
        let error = timeout(60 * SECOND, reader.read()).await.unwrap().unwrap_err();
        assert!(matches!(error, HboneError::Unresponsive { .. }), "{error:?}");
        assert!(matches!(writer.closed().await, HboneError::Unresponsive { .. }));
        let silence = start.elapsed();
        assert!(silence >= 29 * SECOND && silence <= 32 * SECOND, "{silence:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn quiet_stream_to_live_peer_stays_open() {
    let (near, far, tunnel, _served) = Mesh::new().stream().await;
    sleep(HOUR).await;
    assert!(!tunnel.is_closed());
    let (_reader, mut writer) = near.split();
    let (mut reader, _writer) = far.split();
    writer.write(Bytes::from_static(b"good morning")).await.unwrap();
    assert_eq!(reader.read().await.unwrap().unwrap(), "good morning");
}

#[tokio::test(start_paused = true)]
async fn tunnel_without_streams_sends_no_ping() {
    // The server's task does not run, so it would not answer a PING.
    let (tunnel, _server) = Mesh::new().tunnel().await;
    sleep(HOUR).await;
    assert!(!tunnel.is_closed());
}
