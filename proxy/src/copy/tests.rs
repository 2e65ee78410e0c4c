//! Flows between real connections, and through tunnels in memory: every end, every abort, and what they hold.

mod bulk;
mod deadlines;
mod half_open;
mod pieces;
mod testing;

use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::pin;
use std::task::Poll;

use tokio::io::AsyncWriteExt as _;
use underpass_interception::reset_on_close;

use self::testing::{End, Scene, Side, Way};
use crate::error::ProxyError;

#[tokio::test]
async fn what_is_sent_before_a_fin_arrives_and_answers_come_after_it() {
    for way in Way::ALL {
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
async fn a_server_may_end_first() {
    for way in Way::ALL {
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
async fn an_abort_of_either_side_is_one_of_the_other() {
    for way in Way::ALL {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.client.abort();
        assert_eq!(scene.server.read().await, (vec![], End::Reset), "{way:?}: the client's");
        way.assert_clients(scene.ended().await.0);
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.server.abort();
        assert_eq!(scene.client.read().await, (vec![], End::Reset), "{way:?}: the server's");
        way.assert_servers(scene.ended().await.0);
    }
}

#[tokio::test]
async fn a_lost_tunnel_is_an_abort() {
    for way in [Way::IntoTunnel, Way::OutOfTunnel] {
        let mut scene = Scene::new(way).await;
        scene.exchange().await;
        scene.lose_tunnel().await;
        let side = if way == Way::IntoTunnel { &mut scene.client } else { &mut scene.server };
        assert_eq!(side.read().await, (vec![], End::Reset), "{way:?}");
        assert!(matches!(scene.ended().await.0, Err(ProxyError::Tunnel(_))), "{way:?}");
    }
}

#[tokio::test]
async fn what_arrived_before_a_reset_is_delivered_first() {
    let (ours, theirs) = testing::pair().await;
    assert_eq!(theirs.try_write(b"last words").unwrap(), 10);
    ours.readable().await.unwrap();
    reset_on_close(&theirs);
    drop(theirs);
    let mut scene = Scene::plain(ours).await;
    assert_eq!(scene.server.read().await, (b"last words".to_vec(), End::Reset));
    Way::Plain.assert_clients(scene.ended().await.0);
}

#[tokio::test]
async fn an_end_that_is_known_in_time_goes_with_the_last_bytes() {
    let mut scene = Scene::new(Way::IntoTunnel).await;
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

#[tokio::test]
async fn a_connection_that_only_waits_is_told_broken_by_a_reset_and_not_by_a_fin() {
    let (ours, mut theirs) = testing::pair().await;
    theirs.shutdown().await.unwrap();
    ours.readable().await.unwrap();
    let mut waiting = pin!(super::broken(&ours));
    let pending = poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx).is_pending())).await;
    assert!(pending, "a FIN is no reset");
    reset_on_close(&theirs);
    drop(theirs);
    let error = waiting.await;
    assert_eq!(error.kind(), ErrorKind::BrokenPipe, "what Linux says after a FIN");
}
