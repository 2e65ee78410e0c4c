//! Tests of policies: allowed and denied connections, and the effect of changes on open ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, interval};
use underpass_tests::{
    APP, End, Family, Listener, Mesh, Scene, Server, Suite, exchange, read_to_end, until, within,
};

use crate::{change, from, from_client, proxies, usual, with_server};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test_both("only an allowed client is accepted, others get RST", allowed);
    suite.test_both("a denied client is refused even if another policy allows it", denied);
    suite.test("a plaintext connection has no principal", plaintext);
    suite.test("a dry run has no effect and logs its decision", dry_run);
    suite.test("attaching a policy terminates only the connections that it denies", attach);
    suite.test(
        "changing an attached policy terminates denied connections, removing it allows new ones",
        change_and_remove,
    );
    suite.test("an unrelated change of the mesh terminates no connection", unrelated_change);
    suite.test("the last of several rapid changes of the mesh is applied", last_change_applies);
    suite.test(
        "bytes that are sent after a denying policy is in force do not arrive",
        rapid_policy_changes,
    );
}

const ANY_PEER: &str = "[[[]]]";

fn deny_client(scene: &Scene) -> Mesh {
    usual(scene).policy("no-client", "Deny", &from_client())
}

async fn allowed(family: Family) {
    let (scene, mut client, mut server) =
        proxies(|scene| usual(scene).policy("only-client", "Allow", &from_client())).await;
    let app = scene.server.listen(APP);
    let (mut one, mut other, _) = scene.client.meet(&app, scene.app(family)).await;
    exchange(&mut one, &mut other).await;
    drop((one, other));
    let others = usual(&scene).policy("only-others", "Allow", &from("others"));
    change(&scene, &others, &mut [&mut client, &mut server]).await;
    scene.client.dial_and_see_reset(scene.app(family)).await;
    assert!(!app.is_reached(), "the application was reached");
    server
        .line(&["connection failed", "reason=\"policy_denied\"", "none allowed", "sa/client"])
        .await;
    client.line(&["connection failed", "401"]).await;
}

async fn denied(family: Family) {
    let (scene, _client, mut server) =
        proxies(|scene| deny_client(scene).policy("allow-all", "Allow", ANY_PEER)).await;
    let app = scene.server.listen(APP);
    scene.client.dial_and_see_reset(scene.app(family)).await;
    assert!(!app.is_reached(), "the application was reached");
    server.line(&["connection failed", "reason=\"policy_denied\"", "default/no-client"]).await;
}

async fn plaintext() {
    let scene = Scene::new().await;
    scene.set_mesh(&usual(&scene).policy(
        "no-strangers",
        "Deny",
        "[[[{notPrincipals: [{presence: true}]}]]]",
    ));
    let mut server = scene.server.proxy(&scene.server_settings()).await;
    let app = scene.server.listen(APP);
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    assert!(!app.is_reached(), "the application was reached");
    let denied = ["connection failed", "reason=\"policy_denied\"", "default/no-strangers"];
    server.line(&[&denied[..], &["interception.inbound.exclude_ports"]].concat()).await;
}

async fn dry_run() {
    let (scene, _client, mut server) = proxies(|scene| deny_client(scene).dry_run()).await;
    let app = scene.server.listen(APP);
    let (mut one, mut other, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut one, &mut other).await;
    server.line(&["policy", "default/no-client", "sa/client"]).await;
}

/// A connection through both proxies, after an exchange of bytes.
async fn open(scene: &Scene, app: &Listener) -> (tokio::net::TcpStream, tokio::net::TcpStream) {
    let (mut one, mut other, _) = scene.client.meet(app, scene.app(Family::V4)).await;
    exchange(&mut one, &mut other).await;
    (one, other)
}

async fn attach() {
    let selected = |more: &str| {
        let more = more.to_owned();
        move |scene: &Scene| {
            with_server(scene, &more).selector_policy("no-client", "Deny", &from_client())
        }
    };
    let (scene, mut client, mut server) = proxies(selected("")).await;
    let app = scene.server.listen(APP);
    let (mut one, mut other) = open(&scene, &app).await;
    let attached = selected(", authorizationPolicies: [default/no-client]")(&scene);
    change(&scene, &attached, &mut [&mut server, &mut client]).await;
    assert_eq!(read_to_end(&mut one).await.1, End::Reset);
    assert_eq!(read_to_end(&mut other).await.1, End::Reset);
    server.line(&["connection failed", "reason=\"no_longer_allowed\"", "default/no-client"]).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
}

async fn change_and_remove() {
    let (scene, mut client, mut server) =
        proxies(|scene| usual(scene).policy("policy", "Allow", &from_client())).await;
    let app = scene.server.listen(APP);
    let (mut one, _other) = open(&scene, &app).await;
    let both = &mut [&mut client, &mut server];
    change(&scene, &usual(&scene).policy("policy", "Allow", &from("others")), both).await;
    assert_eq!(read_to_end(&mut one).await.1, End::Reset);
    change(&scene, &usual(&scene), both).await;
    open(&scene, &app).await;
}

async fn unrelated_change() {
    let (scene, mut client, mut server) =
        proxies(|scene| usual(scene).policy("policy", "Allow", &from_client())).await;
    let app = scene.server.listen(APP);
    let (mut one, mut other) = open(&scene, &app).await;
    let both = &mut [&mut client, &mut server];
    let elsewhere = usual(&scene)
        .policy("policy", "Allow", &from_client())
        .selector_policy("not-here", "Deny", ANY_PEER)
        .workload("another", &["10.99.0.1".parse().expect("an address")], "HBONE");
    change(&scene, &elsewhere, both).await;
    exchange(&mut one, &mut other).await;
    // Another policy than before allows the connection.
    change(&scene, &usual(&scene).policy("other", "Allow", ANY_PEER), both).await;
    exchange(&mut one, &mut other).await;
}

/// Changes the file twice as fast as it is read: intermediate states may be skipped, but the last
/// one must be applied.
async fn last_change_applies() {
    let (scene, _client, mut server) = proxies(usual).await;
    let app = scene.server.listen(APP);
    let mut ticks = interval(Duration::from_millis(50));
    for _ in 0..10 {
        ticks.tick().await;
        scene.set_mesh(&deny_client(&scene));
        ticks.tick().await;
        scene.set_mesh(&usual(&scene));
    }
    let last = usual(&scene).workload("last", &["10.99.0.1".parse().expect("an address")], "TCP");
    scene.set_mesh(&last);
    // The logged change may be an intermediate one. Only the last mesh has three workloads.
    for pod in [&scene.client, &scene.server] {
        let size = async || pod.metrics().await.sum("underpass_mesh_size", &[("kind", "workload")]);
        until("the last mesh is in force", async || size().await == Some(3.0)).await;
    }
    let (mut one, _other) = open(&scene, &app).await;
    change(&scene, &deny_client(&scene), &mut [&mut server]).await;
    assert_eq!(read_to_end(&mut one).await.1, End::Reset);
}

/// The first byte from the application.
const FIRST_BYTE: u8 = b'o';

/// The number of the policy's current state. In odd states, the policy denies.
#[derive(Debug, Default)]
struct Clock(AtomicU64);

async fn rapid_policy_changes() {
    const SENDERS: usize = 16;
    let (scene, _client, mut server) = proxies(usual).await;
    let scene = Arc::new(scene);
    let clock = Arc::new(Clock::default());
    let (carried, forbidden) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let counts = (carried.clone(), forbidden.clone());
    let _app = Server::start(&scene.server, APP, move |mut stream, _| {
        let (carried, forbidden) = counts.clone();
        async move {
            stream.write_u8(FIRST_BYTE).await?;
            loop {
                let sent_at = stream.read_u64().await?;
                let count = if sent_at % 2 == 1 { &forbidden } else { &carried };
                count.fetch_add(1, SeqCst);
            }
        }
    });
    let senders: Vec<_> =
        (0..SENDERS).map(|_| tokio::spawn(send(scene.clone(), clock.clone()))).collect();
    for round in 0..12 {
        let before = carried.load(SeqCst);
        let flowing = async || carried.load(SeqCst) > before + 100;
        until("bytes flow while they are allowed", flowing).await;
        change(&scene, &deny_client(&scene), &mut [&mut server]).await;
        clock.0.fetch_add(1, SeqCst);
        // Long enough for several attempts of every sender.
        let tried = server.count(&["connection failed", "policy_denied"]);
        server.more_than(tried + SENDERS, &["connection failed", "policy_denied"]).await;
        assert_eq!(forbidden.load(SeqCst), 0, "round {round}");
        clock.0.fetch_add(1, SeqCst);
        change(&scene, &usual(&scene), &mut [&mut server]).await;
    }
    senders.iter().for_each(tokio::task::JoinHandle::abort);
    assert_eq!(forbidden.load(SeqCst), 0);
}

/// Connects repeatedly, and sends the clock's value once the connection is open end to end. Data
/// sent earlier would wait for the decision, and could arrive under another policy.
async fn send(scene: Arc<Scene>, clock: Arc<Clock>) {
    let to = scene.app(Family::V4);
    loop {
        let Ok(mut stream) = scene.client.dial(to).await else { continue };
        if within("the connection is opened or denied", stream.read_u8()).await.is_err() {
            continue;
        }
        let began = Instant::now();
        let mut sent = Ok(());
        while sent.is_ok() && began.elapsed() < Duration::from_secs(1) {
            let now = clock.0.load(SeqCst);
            sent = within("bytes are sent", stream.write_u64(now)).await;
            tokio::task::yield_now().await;
        }
    }
}
