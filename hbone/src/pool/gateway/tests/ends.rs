//! Tests of the end, the abort and the back-pressure of streams through a gateway.

use bytes::Bytes;
use h2::Reason;
use tokio::runtime::Handle as Runtime;

use super::*;
use crate::tunnel::settings::Http2Settings;
use crate::tunnel::stream::TunnelReader;

async fn drain(reader: &mut TunnelReader) -> Result<usize, HboneError> {
    let mut total = 0;
    while let Some(chunk) = reader.read().await? {
        total += chunk.len();
    }
    Ok(total)
}

#[tokio::test(start_paused = true)]
async fn directions_end_independently_and_leave_no_state() {
    let tasks = || Runtime::current().metrics().num_alive_tasks();
    let mut scene = Scene::new();
    let (near, far, ..) = scene.stream().await;
    drop((near, far));
    assert!(scene.is_quiet().await);
    sleep(SECOND).await;
    let before = tasks();
    scene.copied.recv().await.unwrap().unwrap();
    for client_first in [true, false] {
        let (near, far, ..) = scene.stream().await;
        let (first, second) = if client_first { (near, far) } else { (far, near) };
        let (mut first_reader, mut first_writer) = first.split();
        let (mut second_reader, mut second_writer) = second.split();
        first_writer.write(Bytes::from_static(b"request")).await.unwrap();
        first_writer.finish().unwrap();
        assert_eq!(drain(&mut second_reader).await.unwrap(), 7);
        sleep(SECOND).await;
        second_writer.write(Bytes::from_static(b"late answer")).await.unwrap();
        second_writer.finish().unwrap();
        assert_eq!(drain(&mut first_reader).await.unwrap(), 11);
        drop((first_reader, first_writer, second_reader, second_writer));
        scene.copied.recv().await.unwrap().expect("the gateway sees an end, and no abort");
        assert!(scene.is_quiet().await);
        sleep(SECOND).await;
        assert_eq!(tasks(), before);
    }
}

#[tokio::test(start_paused = true)]
async fn data_before_end_arrives_without_waiting_reader() {
    let mut scene = Scene::new();
    let (near, far, ..) = scene.stream().await;
    let (mut near_reader, mut near_writer) = near.split();
    let (mut far_reader, mut far_writer) = far.split();
    far_writer.finish().unwrap();
    assert_eq!(drain(&mut near_reader).await.unwrap(), 0);
    near_writer.write(vec![7; 3 << 20].into()).await.unwrap();
    near_writer.finish().unwrap();
    drop((near_reader, near_writer));
    sleep(SECOND).await;
    assert_eq!(drain(&mut far_reader).await.unwrap(), 3 << 20);
    drop((far_reader, far_writer));
    scene.copied.recv().await.unwrap().unwrap();
    assert!(scene.is_quiet().await);
}

#[tokio::test(start_paused = true)]
async fn abort_is_reported_at_the_other_end() {
    let mut scene = Scene::new();
    for client_aborts in [true, false] {
        let (near, far, ..) = scene.stream().await;
        let (aborting, other) = if client_aborts { (near, far) } else { (far, near) };
        let (_reader, mut writer) = aborting.split();
        let (mut reader, _writer) = other.split();
        writer.write(Bytes::from_static(b"part")).await.unwrap();
        assert_eq!(reader.read().await.unwrap().unwrap(), "part");
        drop((_reader, writer));
        let HboneError::Reset { reason } = reader.read().await.unwrap_err() else {
            panic!("an abort must be a reset")
        };
        assert_eq!(reason, Reason::CONNECT_ERROR);
        drop((reader, _writer));
        assert!(scene.is_quiet().await);
    }
}

#[tokio::test(start_paused = true)]
async fn gateway_failure_aborts_both_ends() {
    let mut scene = Scene::new();
    let (near, far, ..) = scene.stream().await;
    let (mut near_reader, mut near_writer) = near.split();
    let (mut far_reader, _far_writer) = far.split();
    scene.servers.serving.lock().unwrap().take().unwrap().abort();
    let cut = near_reader.read().await.unwrap_err();
    assert!(matches!(cut, HboneError::Lost { .. }), "{cut:?}");
    assert!(near_writer.write("x".into()).await.is_err());
    let lost = timeout(SECOND, far_reader.read()).await.unwrap().unwrap_err();
    assert!(matches!(lost, HboneError::Lost { .. }), "{lost:?}");
    assert!(scene.copied.recv().await.unwrap().is_err());
}

#[tokio::test]
async fn bulk_data_arrives_unchanged_in_both_directions() {
    const LENGTH: usize = 50 << 20;
    let mut scene = Scene::new();
    let (near, far, ..) = scene.stream().await;
    let data: Bytes = (0..=250).cycle().take(LENGTH).collect();
    let echo = tokio::spawn(async move {
        let (mut reader, mut writer) = far.split();
        while let Some(chunk) = reader.read().await.unwrap() {
            writer.write(chunk).await.unwrap();
        }
        writer.finish().unwrap();
    });
    let (mut reader, mut writer) = near.split();
    let sent = data.clone();
    let send = async {
        for piece in sent.chunks(100_001) {
            writer.write(sent.slice_ref(piece)).await.unwrap();
        }
        writer.finish().unwrap();
    };
    let receive = async {
        let mut received = 0;
        while let Some(chunk) = reader.read().await.unwrap() {
            assert!(data[received..].starts_with(&chunk));
            received += chunk.len();
        }
        received
    };
    let ((), received) = tokio::join!(send, receive);
    assert_eq!(received, LENGTH);
    echo.await.unwrap();
    drop((reader, writer));
    scene.copied.recv().await.unwrap().unwrap();
    assert!(scene.is_quiet().await);
}

#[tokio::test(start_paused = true)]
async fn backend_that_does_not_read_blocks_only_its_own_stream() {
    let http2 = Http2Settings { stream_window: 100_000, ..Http2Settings::default() };
    let server = ServerSettings { http2, ..ServerSettings::default() };
    let mut scene = Scene::with(ClientSettings::default(), server);
    let (near, far, ..) = scene.stream().await;
    let (_near_reader, mut writer) = near.split();
    let mut sent = 0;
    let piece = Bytes::from_static(&[0; 1000]);
    while timeout(SECOND, writer.write(piece.clone())).await.is_ok() {
        sent += piece.len();
    }
    assert_eq!(sent, 100_000, "the window of the inner stream, and no more");
    let (other, other_far, ..) = scene.stream().await;
    let (_other_reader, mut other_writer) = other.split();
    let (mut other_reader, _other_far_writer) = other_far.split();
    other_writer.write("hello".into()).await.unwrap();
    assert_eq!(other_reader.read().await.unwrap().unwrap(), "hello");
    // The writer reports an abort even if the stream is not being read.
    drop((_near_reader, writer));
    let (_reader, mut far_writer) = far.split();
    let aborted = timeout(SECOND, far_writer.closed()).await.unwrap();
    assert!(matches!(aborted, HboneError::Reset { .. }), "{aborted:?}");
}

#[tokio::test(start_paused = true)]
async fn gateway_that_never_ends_stream_times_out() {
    let mut scene = Scene::new();
    scene.set_behaviour(GatewayBehaviour::NeverEnds);
    let (near, far, ..) = scene.stream().await;
    let [(near_reader, mut near_writer), (far_reader, mut far_writer)] =
        [near, far].map(TunnelStream::split);
    near_writer.finish().unwrap();
    far_writer.finish().unwrap();
    drop((near_reader, near_writer, far_reader, far_writer));
    sleep(SECOND).await;
    assert_eq!(scene.pool.statistics().streams, 1, "it is not removed yet");
    sleep(31 * SECOND).await;
    assert_eq!(scene.pool.statistics().streams, 0);
}
