//! Tests of aborts of a half-closed connection: they are detected although no direction reads the
//! ended side.

use super::testing::{End, FlowKind, Scene};
use crate::error::ProxyError;

#[tokio::test]
async fn abort_of_ended_client_is_detected_without_a_write() {
    for way in FlowKind::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.client.finish().await;
        assert_eq!(scene.server.read().await, (vec![], End::Fin), "{way:?}");
        scene.client.abort();
        assert_eq!(scene.server.end_of_writing().await, End::Reset, "{way:?}");
        way.assert_client_aborted(scene.ended().await.0);
    }
}

#[tokio::test]
async fn abort_of_ended_server_is_detected_without_a_write() {
    for way in FlowKind::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.server.finish().await;
        assert_eq!(scene.client.read().await, (vec![], End::Fin), "{way:?}");
        scene.server.abort();
        assert_eq!(scene.client.end_of_writing().await, End::Reset, "{way:?}");
        way.assert_server_aborted(scene.ended().await.0);
    }
}

#[tokio::test]
async fn abort_of_side_that_still_sends_is_detected() {
    for way in FlowKind::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.client.finish().await;
        assert_eq!(scene.server.read().await, (vec![], End::Fin), "{way:?}");
        scene.server.abort();
        assert_eq!(scene.client.read().await, (vec![], End::Reset), "{way:?}");
        way.assert_server_aborted(scene.ended().await.0);
    }
}

#[tokio::test]
async fn lost_tunnel_is_detected_after_end_stream_of_either_side() {
    for way in [FlowKind::IntoTunnel, FlowKind::OutOfTunnel] {
        for client_ends in [true, false] {
            let mut scene = Scene::new(way).await;
            scene.exchange().await;
            let (one, other) = scene.sides(client_ends);
            one.finish().await;
            assert_eq!(other.read().await, (vec![], End::Fin), "{way:?}");
            scene.lose_tunnel().await;
            let socket =
                if way == FlowKind::IntoTunnel { &mut scene.client } else { &mut scene.server };
            assert_eq!(socket.end_of_writing().await, End::Reset, "{way:?}, {client_ends}");
            assert!(matches!(scene.ended().await.0, Err(ProxyError::Tunnel(_))), "{way:?}");
        }
    }
}

#[tokio::test]
async fn abort_is_detected_by_idle_spliced_direction() {
    let mut scene = Scene::new(FlowKind::Plain).await;
    scene.client.finish().await;
    assert_eq!(scene.server.read().await, (vec![], End::Fin));
    scene.bulk_to_client().await;
    assert_eq!(super::super::splice::members(), 1, "it is spliced");
    scene.client.abort();
    assert_eq!(scene.server.end_of_writing().await, End::Reset);
    FlowKind::Plain.assert_client_aborted(scene.ended().await.0);
    assert_eq!(super::super::splice::members(), 0);
}
