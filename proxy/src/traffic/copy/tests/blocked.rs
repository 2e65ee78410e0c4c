//! Tests of ends and aborts that arrive while the direction that would read them is blocked in
//! writing.
//!
//! The clock is paused, so a connection that misses its event fails the test at once.

use std::time::Duration;

use tokio::time::timeout;

use super::super::splice;
use super::testing::{End, FlowKind, Scene, Side};
use crate::error::ProxyError;

/// The side that sends until it is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sender {
    Client,
    Server,
}

impl Sender {
    const BOTH: [Self; 2] = [Self::Client, Self::Server];

    /// The sending and the reading side.
    fn sides(self, scene: &mut Scene) -> (&mut Side, &mut Side) {
        scene.sides(self == Self::Client)
    }
}

/// A flow in which one side has sent until it is blocked, because the other side does not read.
async fn blocked(way: FlowKind, sender: Sender) -> Scene {
    let mut scene = Scene::new(way).await;
    scene.exchange().await;
    sender.sides(&mut scene).0.send_until_it_blocks().await;
    scene
}

/// Asserts that the flow resets the reading side after an abort by `sender`.
async fn assert_aborted(mut scene: Scene, way: FlowKind, sender: Sender) {
    let buffers = scene.buffers.clone();
    let reader = sender.sides(&mut scene).1;
    let end = timeout(Duration::from_secs(60), reader.end_of_writing()).await;
    assert_eq!(end, Ok(End::Reset), "{way:?}, {sender:?}");
    let outcome = scene.ended().await.0;
    match sender {
        Sender::Client => way.assert_client_aborted(outcome),
        Sender::Server => way.assert_server_aborted(outcome),
    }
    assert_eq!(buffers.used(), 0, "{way:?}, {sender:?}");
}

#[tokio::test(start_paused = true)]
async fn abort_of_source_resets_destination_that_does_not_read() {
    for way in FlowKind::ALL {
        for sender in Sender::BOTH {
            let mut scene = blocked(way, sender).await;
            sender.sides(&mut scene).0.abort();
            assert_aborted(scene, way, sender).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn abort_after_fin_of_source_resets_destination_that_does_not_read() {
    for way in FlowKind::ALL {
        for sender in Sender::BOTH {
            let mut scene = blocked(way, sender).await;
            let source = sender.sides(&mut scene).0;
            source.finish().await;
            tokio::task::yield_now().await;
            source.abort();
            assert_aborted(scene, way, sender).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn abort_of_source_resets_destination_of_full_pipe() {
    for sender in Sender::BOTH {
        let mut scene = Scene::new(FlowKind::Plain).await;
        let data = vec![b'b'; 8 << 20];
        let (source, destination) = sender.sides(&mut scene);
        let ((), received) = tokio::join!(source.send(&data), destination.receive(data.len()));
        assert!(received == data);
        source.send_until_it_blocks().await;
        assert_eq!(splice::members(), 1, "the direction is spliced");
        source.abort();
        assert_aborted(scene, FlowKind::Plain, sender).await;
        assert_eq!((splice::members(), splice::spare()), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn lost_tunnel_resets_socket_that_does_not_read() {
    for (way, sender) in
        [(FlowKind::IntoTunnel, Sender::Server), (FlowKind::OutOfTunnel, Sender::Client)]
    {
        let mut scene = blocked(way, sender).await;
        scene.lose_tunnel().await;
        let reader = sender.sides(&mut scene).1;
        let end = timeout(Duration::from_secs(60), reader.end_of_writing()).await;
        assert_eq!(end, Ok(End::Reset), "{way:?}");
        assert!(matches!(scene.ended().await.0, Err(ProxyError::Tunnel(_))), "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn fin_of_source_is_delivered_after_all_data_once_destination_reads() {
    for way in FlowKind::ALL {
        for sender in Sender::BOTH {
            let mut scene = Scene::new(way).await;
            let (source, destination) = sender.sides(&mut scene);
            let sent = source.send_until_it_blocks().await;
            source.finish().await;
            let (received, end) = destination.read().await;
            assert_eq!((received.len(), end), (sent, End::Fin), "{way:?}, {sender:?}");
            destination.send(b"answer").await;
            destination.finish().await;
            assert_eq!(source.read().await, (b"answer".to_vec(), End::Fin), "{way:?}");
            assert!(scene.ended().await.0.is_ok(), "{way:?}");
        }
    }
}
