//! Tests of forwarded queries with scripted servers and paused time.

use std::panic::AssertUnwindSafe;

use futures_util::future::join_all;
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::time::advance;

use super::*;
use crate::dns::cache::{MAX_STALE, RECHECK};
use crate::dns::message::testing::{edns, query, record, response};
use crate::dns::message::{Layout, RecordType, TC};
use crate::dns::service::tests::{A, ANSWERS, FAST, Scene};
use crate::dns::upstream::tests::Script;

const HTTPS: u16 = 65;

#[tokio::test(start_paused = true)]
async fn other_names_are_forwarded_and_stored() {
    let scene = Scene::new(ANSWERS);
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 60, 1));
    advance(Duration::from_secs(20)).await;
    assert_eq!(scene.ask("OTHER.example", A).await, ("NOERROR", 1, 40, 1));
    advance(Duration::from_secs(40)).await;
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 60, 2));
}

#[tokio::test(start_paused = true)]
async fn forwarded_response_is_that_of_the_server() {
    let scene = Scene::new(ANSWERS);
    let asked = query("Other.Example", RecordType::A, &[&edns(1232, true, &[0, 8, 0, 1, 9])]);
    let records = [record(1, 60, &[10, 0, 0, 1])];
    assert_eq!(scene.send(&asked).await, response(&asked, 0, [&records, &[], &[]]));
    scene.send(&asked).await;
    assert_eq!(scene.servers.asked(), 2, "an unknown option: not stored");
}

#[tokio::test(start_paused = true)]
async fn name_of_mesh_exists_for_every_type() {
    let missing = Script::Answers(ResponseCode::NAME_ERROR, FAST);
    let scene = Scene::new(missing);
    assert_eq!(scene.ask("api.example", HTTPS).await, ("NOERROR", 0, 0, 1));
    assert_eq!(scene.ask("api.example", HTTPS).await, ("NOERROR", 0, 0, 1), "stored");
    assert_eq!(scene.ask("no.example", HTTPS).await, ("NXDOMAIN", 0, 0, 2));
    advance(Duration::from_secs(9)).await;
    assert_eq!(scene.ask("no.example", HTTPS).await, ("NXDOMAIN", 0, 0, 3), "the SOA's 9 s");
}

#[tokio::test(start_paused = true)]
async fn equal_queries_wait_for_one_answer() {
    let scene = Scene::new(ANSWERS);
    let asked = join_all((0..100).map(|_| scene.ask("other.example", A))).await;
    assert!(asked.iter().all(|answer| *answer == ("NOERROR", 1, 60, 1)), "{asked:?}");
    assert!(scene.forwarder().running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn query_that_panicked_is_asked_again() {
    let scene = Scene::new(Script::Panics);
    AssertUnwindSafe(scene.ask("other.example", A)).catch_unwind().await.unwrap_err();
    scene.script(ANSWERS);
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 60, 2));
}

#[tokio::test(start_paused = true)]
async fn stale_response_is_used_while_servers_fail() {
    let scene = Scene::new(ANSWERS);
    scene.ask("other.example", A).await;
    advance(Duration::from_secs(60)).await;
    scene.script(Script::Answers(ResponseCode::SERVER_FAILURE, FAST));
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 30, 3), "two attempts");
    scene.script(Script::Refuses);
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 30, 5));
    scene.script(Script::Drops);
    advance(RECHECK).await;
    for expected in [STALE_WAIT, Duration::ZERO] {
        let began = Instant::now();
        assert_eq!(scene.ask("other.example", A).await.0, "NOERROR");
        assert_eq!(began.elapsed(), expected, "only the first client waits");
    }
    advance(MAX_STALE).await;
    assert_eq!(scene.ask("other.example", A).await.0, "SERVFAIL");
}

#[tokio::test(start_paused = true)]
async fn servers_are_asked_while_a_stale_response_is_used_at_once() {
    let scene = Scene::new(ANSWERS);
    scene.ask("other.example", A).await;
    advance(Duration::from_secs(60)).await;
    scene.script(Script::Refuses);
    assert_eq!(scene.ask("other.example", A).await.2, 30);
    scene.script(ANSWERS);
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 30, 4));
    tokio::time::sleep(2 * FAST).await;
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 60, 4));
}

#[tokio::test(start_paused = true)]
async fn response_that_cannot_be_stored_is_only_for_the_client_that_asked() {
    let scene = Scene::new(Script::AnswersUnusually(FAST));
    let asked = ["other.example", "OTHER.Example"];
    let asked = asked.map(|name| query(name, RecordType::A, &[&edns(1232, false, &[])]));
    let responses = join_all(asked.iter().map(|message| scene.send(message))).await;
    for (asked, response) in asked.iter().zip(&responses) {
        assert_eq!(message::code(response), ResponseCode::NO_ERROR);
        let end = Layout::read(response).unwrap().question;
        assert_eq!(response[12..end], asked[12..end], "the name as this client wrote it");
    }
    assert_eq!(scene.servers.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn slow_answer_is_stored_although_the_client_got_a_stale_one() {
    let scene = Scene::new(ANSWERS);
    scene.ask("other.example", A).await;
    advance(Duration::from_secs(60)).await;
    scene.script(Script::Answers(ResponseCode::NO_ERROR, Duration::from_secs(3)));
    assert_eq!(scene.ask("other.example", A).await.2, 30);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(scene.ask("other.example", A).await, ("NOERROR", 1, 60, 2));
}

#[tokio::test(start_paused = true)]
async fn failure_without_stored_response_is_servfail() {
    for (script, resolv_conf) in [
        (Script::Drops, "nameserver 10.0.0.1"),
        (Script::Refuses, "nameserver 10.0.0.1"),
        (ANSWERS, ""),
    ] {
        let scene = Scene::with(script, None, resolv_conf);
        assert_eq!(scene.ask("other.example", A).await.0, "SERVFAIL");
    }
}

#[tokio::test(start_paused = true)]
async fn queries_to_servers_are_limited() {
    let scene = Scene::with(ANSWERS, Some(100), "nameserver 10.0.0.1");
    let names: Vec<_> = (0..50).map(|n| format!("n{n}.example")).collect();
    let codes = join_all(names.iter().map(|name| scene.ask(name, A))).await;
    let failed = codes.iter().filter(|answer| answer.0 == "SERVFAIL").count();
    assert_eq!((failed, scene.servers.asked()), (40, 10), "a tenth at once");
    assert_eq!(scene.ask("web", A).await.0, "NOERROR", "the mesh is not limited");
    advance(Duration::from_secs(1)).await;
    assert_eq!(scene.ask("n49.example", A).await.0, "NOERROR");
}

#[tokio::test(start_paused = true)]
async fn number_of_waiting_queries_is_limited() {
    let scene = Scene::new(Script::Drops);
    let asked: Vec<_> = (0..=MAX_OUTSTANDING)
        .map(|n| query(&format!("n{n}.example"), RecordType::A, &[]))
        .map(|message| match scene.service.serve(&message, Transport::Udp) {
            Reply::Later(response) => response.now_or_never(),
            Reply::Now(_) | Reply::Nothing => panic!("no server can have answered"),
        })
        .collect();
    assert_eq!(scene.servers.asked(), MAX_OUTSTANDING);
    assert!(asked[..MAX_OUTSTANDING].iter().all(Option::is_none));
    assert!(
        asked[MAX_OUTSTANDING]
            .as_ref()
            .is_some_and(|message| { message::code(message) == ResponseCode::SERVER_FAILURE })
    );
}

#[tokio::test(start_paused = true)]
async fn number_of_equal_queries_that_wait_is_limited() {
    let scene = Scene::new(Script::Drops);
    let message = query("other.example", RecordType::A, &[]);
    let mut waiting: Vec<_> =
        (0..MAX_WAITING).map(|_| scene.service.serve(&message, Transport::Udp)).collect();
    assert!(waiting.iter().all(|reply| matches!(reply, Reply::Later(_))));
    let Reply::Now(refused) = scene.service.serve(&message, Transport::Udp) else {
        panic!("too many queries wait");
    };
    assert_eq!(message::code(&refused), ResponseCode::SERVER_FAILURE);
    waiting.pop();
    assert!(matches!(scene.service.serve(&message, Transport::Udp), Reply::Later(_)));
}

#[tokio::test(start_paused = true)]
async fn use_vc_asks_servers_over_tcp() {
    let scene = Scene::with(ANSWERS, None, "nameserver 10.0.0.1\noptions use-vc");
    let response = scene.send(&query("other.example", RecordType::A, &[])).await;
    assert_eq!(message::flags(&response) & TC, 0);
    assert_eq!(scene.servers.asked.lock().unwrap()[0].1, Transport::Tcp);
}

#[tokio::test(start_paused = true)]
async fn failure_of_servers_is_counted_once_and_a_limit_is_none() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let failures = || {
        let text = recorder.handle().render();
        let mut lines = text.lines();
        let line = lines.find(|line| line.starts_with("istio_dns_upstream_failures_total{"));
        line.and_then(|line| line.rsplit(' ').next()).map_or(0, |count| count.parse().unwrap())
    };
    let scene = Scene::new(ANSWERS);
    scene.ask("other.example", A).await;
    advance(Duration::from_secs(60)).await;
    scene.script(Script::Answers(ResponseCode::SERVER_FAILURE, FAST));
    let asked = join_all((0..10).map(|_| scene.ask("other.example", A))).await;
    assert!(asked.iter().all(|answer| answer.0 == "NOERROR"), "stale responses");
    assert_eq!(failures(), 1);
    drop(scene);
    let scene = Scene::with(ANSWERS, Some(10), "nameserver 10.0.0.1");
    assert_eq!(scene.ask("one.example", A).await.0, "NOERROR");
    assert_eq!(scene.ask("two.example", A).await.0, "SERVFAIL");
    assert_eq!(failures(), 1, "no server was asked");
}
