//! Tests of flows between TCP connections, and through tunnels in memory: ends, aborts and memory
//! use.

mod blocked;
mod bulk;
mod deadlines;
mod half_open;
mod pieces;
mod readiness;
mod testing;

use underpass_interception::reset_on_close;

use self::testing::{End, FlowKind, Scene, Side};
use super::{Relay, Tcp, Tunnelled};
use crate::error::ProxyError;

#[tokio::test]
async fn fin_arrives_after_all_data_and_allows_an_answer() {
    for way in FlowKind::ALL {
        let mut scene = Scene::new(way).await;
        scene.client.send(b"question").await;
        scene.client.finish().await;
        assert_eq!(scene.server.read().await, (b"question".to_vec(), End::Fin), "{way:?}");
        scene.server.send(b"answer").await;
        assert_eq!(scene.client.receive(6).await, b"answer", "{way:?}");
        scene.server.send(b", more").await;
        scene.server.finish().await;
        assert_eq!(scene.client.read().await, (b", more".to_vec(), End::Fin), "{way:?}");
        let (outcome, counts) = scene.ended().await;
        assert!(outcome.is_ok(), "{way:?}: {outcome:?}");
        assert_eq!(counts, 8 + 12, "{way:?}");
    }
}

#[tokio::test]
async fn client_data_arrives_after_end_of_server() {
    for way in FlowKind::ALL {
        let mut scene = Scene::new(way).await;
        scene.server.send(b"banner").await;
        scene.server.finish().await;
        assert_eq!(scene.client.read().await, (b"banner".to_vec(), End::Fin), "{way:?}");
        scene.client.send(b"goodbye").await;
        scene.client.finish().await;
        assert_eq!(scene.server.read().await, (b"goodbye".to_vec(), End::Fin), "{way:?}");
        assert!(scene.ended().await.0.is_ok(), "{way:?}");
    }
}

#[tokio::test]
async fn abort_of_one_side_aborts_other_side() {
    for way in FlowKind::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.client.abort();
        assert_eq!(scene.server.read().await, (vec![], End::Reset), "{way:?}: the client's");
        way.assert_client_aborted(scene.ended().await.0);
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.server.abort();
        assert_eq!(scene.client.read().await, (vec![], End::Reset), "{way:?}: the server's");
        way.assert_server_aborted(scene.ended().await.0);
    }
}

#[tokio::test]
async fn lost_tunnel_resets_socket() {
    for way in [FlowKind::IntoTunnel, FlowKind::OutOfTunnel] {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.lose_tunnel().await;
        let side = if way == FlowKind::IntoTunnel { &mut scene.client } else { &mut scene.server };
        assert_eq!(side.read().await, (vec![], End::Reset), "{way:?}");
        assert!(matches!(scene.ended().await.0, Err(ProxyError::Tunnel(_))), "{way:?}");
    }
}

#[tokio::test]
async fn data_before_reset_is_delivered() {
    let (ours, theirs) = testing::pair().await;
    assert_eq!(theirs.try_write(b"last words").unwrap(), 10);
    ours.readable().await.unwrap();
    reset_on_close(&theirs);
    drop(theirs);
    let mut scene = Scene::plain(ours).await;
    assert_eq!(scene.server.read().await, (b"last words".to_vec(), End::Reset));
    FlowKind::Plain.assert_client_aborted(scene.ended().await.0);
}

#[tokio::test]
async fn known_fin_is_sent_with_last_data() {
    let mut scene = Scene::new(FlowKind::IntoTunnel).await;
    scene.exchange().await;
    scene.client.send(b"last words").await;
    scene.client.finish().await;
    assert_eq!(scene.server.receive(10).await, b"last words");
    let Side::Stream(reader, _) = &scene.server else { panic!("no tunnel") };
    assert!(reader.is_at_end(), "the end has a frame of its own");
    assert_eq!(scene.server.read().await, (vec![], End::Fin));
    scene.server.finish().await;
    assert_eq!(scene.client.read().await, (vec![], End::Fin));
    scene.ended().await.0.unwrap();
}

/// A relay is most of an idle connection's memory (docs/architecture.md).
#[test]
fn relay_stays_within_384_bytes() {
    let plain = size_of::<Relay<'_, Tcp<'_>, Tcp<'_>>>();
    let tunnelled = size_of::<Relay<'_, Tcp<'_>, Tunnelled>>();
    assert!(plain <= 384 && tunnelled <= 384, "{plain} and {tunnelled} bytes");
}
