//! One side has ended, and then something breaks: nobody reads the side that ended, and it is noticed all the same.

use super::testing::{End, Scene, Way};
use crate::error::ProxyError;

#[tokio::test]
async fn a_client_that_ended_may_still_abort_while_nothing_is_written_to_it() {
    for way in Way::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.client.finish().await;
        assert_eq!(scene.server.read().await, (vec![], End::Fin), "{way:?}");
        scene.client.abort();
        assert_eq!(scene.server.end_of_writing().await, End::Reset, "{way:?}");
        way.assert_clients(scene.ended().await.0);
    }
}

#[tokio::test]
async fn a_server_that_ended_may_still_abort_while_nothing_is_written_to_it() {
    for way in Way::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.server.finish().await;
        assert_eq!(scene.client.read().await, (vec![], End::Fin), "{way:?}");
        scene.server.abort();
        assert_eq!(scene.client.end_of_writing().await, End::Reset, "{way:?}");
        way.assert_servers(scene.ended().await.0);
    }
}

#[tokio::test]
async fn the_side_that_still_sends_may_abort() {
    for way in Way::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.client.finish().await;
        assert_eq!(scene.server.read().await, (vec![], End::Fin), "{way:?}");
        scene.server.abort();
        assert_eq!(scene.client.read().await, (vec![], End::Reset), "{way:?}");
        way.assert_servers(scene.ended().await.0);
    }
}

#[tokio::test]
async fn a_tunnel_may_be_lost_after_its_end_stream_or_after_ours() {
    for way in [Way::IntoTunnel, Way::OutOfTunnel] {
        for client_ends in [true, false] {
            let mut scene = Scene::new(way).await;
            scene.exchange().await;
            let (one, other) = scene.sides(client_ends);
            one.finish().await;
            assert_eq!(other.read().await, (vec![], End::Fin), "{way:?}");
            scene.lose_tunnel().await;
            let socket = if way == Way::IntoTunnel { &mut scene.client } else { &mut scene.server };
            assert_eq!(socket.end_of_writing().await, End::Reset, "{way:?}, {client_ends}");
            assert!(matches!(scene.ended().await.0, Err(ProxyError::Tunnel(_))), "{way:?}");
        }
    }
}

#[tokio::test]
async fn an_abort_is_noticed_by_a_spliced_direction_that_rests() {
    let mut scene = Scene::new(Way::Plain).await;
    scene.client.finish().await;
    assert_eq!(scene.server.read().await, (vec![], End::Fin));
    scene.bulk_to_client().await;
    assert_eq!(super::super::splice::members(), 1, "it is spliced");
    scene.client.abort();
    assert_eq!(scene.server.end_of_writing().await, End::Reset);
    Way::Plain.assert_clients(scene.ended().await.0);
    assert_eq!(super::super::splice::members(), 0);
}
