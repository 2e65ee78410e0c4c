//! Tests of idle and half-close deadlines, on a paused clock.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use underpass_interception::KEEPALIVE_PROBES;
use underpass_interception::testing::{Keepalive, keepalive};

use super::testing::{End, FlowKind, Scene};
use crate::error::ProxyError;

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn idle_connection_is_reset_after_deadline() {
    for way in FlowKind::ALL {
        let mut scene = Scene::with(way, |deadlines| deadlines.idle = Some(MINUTE)).await;
        scene.exchange().await;
        let began = Instant::now();
        assert_eq!(scene.client.read().await, (vec![], End::Reset), "{way:?}");
        assert_eq!(scene.server.read().await, (vec![], End::Reset), "{way:?}");
        assert!((MINUTE..=MINUTE * 5 / 4).contains(&began.elapsed()), "{:?}", began.elapsed());
        let (outcome, _) = scene.ended().await;
        assert!(matches!(outcome, Err(ProxyError::IdleTimeout { after: MINUTE })), "{outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn byte_in_either_direction_restarts_deadline() {
    for way in FlowKind::ALL {
        let mut scene = Scene::with(way, |deadlines| deadlines.idle = Some(MINUTE)).await;
        for turn in 0..10 {
            sleep(MINUTE * 9 / 10).await;
            let (one, other) = scene.sides(turn % 2 == 0);
            one.send(b"x").await;
            assert_eq!(other.receive(1).await, b"x", "{way:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn half_closed_connection_is_reset_after_deadline_without_data() {
    for way in FlowKind::ALL {
        let mut scene = Scene::with(way, |deadlines| deadlines.half_close = Some(MINUTE)).await;
        sleep(MINUTE * 10).await;
        scene.client.finish().await;
        assert_eq!(scene.server.read().await, (vec![], End::Fin));
        for _ in 0..10 {
            sleep(MINUTE * 9 / 10).await;
            scene.server.send(b"x").await;
            assert_eq!(scene.client.receive(1).await, b"x", "{way:?}");
        }
        let began = Instant::now();
        assert_eq!(scene.client.read().await, (vec![], End::Reset), "{way:?}");
        assert!((MINUTE..=MINUTE * 5 / 4).contains(&began.elapsed()), "{:?}", began.elapsed());
        let (outcome, _) = scene.ended().await;
        let expected = matches!(outcome, Err(ProxyError::HalfCloseTimeout { after: MINUTE }));
        assert!(expected, "{outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn shorter_deadline_applies_to_half_closed_connection() {
    let mut scene = Scene::with(FlowKind::Plain, |deadlines| {
        deadlines.idle = Some(MINUTE);
        deadlines.half_close = Some(MINUTE * 60);
    })
    .await;
    scene.client.finish().await;
    let (outcome, _) = scene.ended().await;
    assert!(matches!(outcome, Err(ProxyError::IdleTimeout { after: MINUTE })), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn blocked_connection_is_reset_after_idle_deadline() {
    for way in FlowKind::ALL {
        let mut scene = Scene::with(way, |deadlines| deadlines.idle = Some(MINUTE)).await;
        scene.client.send_until_it_blocks().await;
        let (outcome, _) = scene.ended().await;
        assert!(matches!(outcome, Err(ProxyError::IdleTimeout { .. })), "{way:?}: {outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn connection_without_deadlines_stays_open_for_days() {
    for way in FlowKind::ALL {
        let mut scene = Scene::new(way).await;
        sleep(MINUTE * 60 * 24 * 3).await;
        scene.exchange().await;
        scene.client.finish().await;
        sleep(MINUTE * 60 * 24 * 3).await;
        scene.server.send(b"late").await;
        assert_eq!(scene.client.receive(4).await, b"late", "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn half_closed_connection_is_probed_before_conntrack_timeout() {
    let (ours, theirs) = super::testing::pair().await;
    let watched = ours.into_std().unwrap();
    let copy = watched.try_clone().unwrap();
    let mut scene = Scene::plain(tokio::net::TcpStream::from_std(watched).unwrap()).await;
    scene.server.finish().await;
    sleep(Duration::from_secs(9)).await;
    let (first, every) = (Duration::from_secs(20), Duration::from_secs(10));
    let halved = Some(Keepalive { first, every, probes: KEEPALIVE_PROBES });
    assert_ne!(keepalive(&copy).unwrap(), halved, "keepalive is not shortened yet");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(keepalive(&copy).unwrap(), halved);
    drop(theirs);
}
