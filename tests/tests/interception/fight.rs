//! Tests of a fight: another program removes the rules repeatedly. Repairs continue, and no
//! plaintext leaves.

use std::path::Path;

use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt as _;
use underpass_tests::{
    APP, Background, CLIENT, Family, Pod, Proxy, Scene, Server, Settings, Suite, tool, until,
};

use crate::{AMBIENT, OSM, Profile, SIDECAR, readiness};

const FIGHT: &[&str] = &["ERROR", "another program changes the rules repeatedly"];
const REPAIRS: &str = "underpass_rules_repairs_total";
const INTACT: &str = "underpass_rules_intact";
/// A port that the client's settings exclude from capture.
const EXCLUDED: u16 = 9999;

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in [AMBIENT, SIDECAR, OSM] {
        profile.test(
            suite,
            "no plaintext leaves while another program removes the rules",
            async move || {
                no_plaintext_leaves(profile).await;
            },
        );
    }
    suite.test(
        "a proxy that is stopped during a fight leaves the rules without a blackhole",
        stopped_during_fight,
    );
    suite.test("a start removes the blackhole of a killed proxy", start_removes_blackhole);
    suite.test(
        "`rules remove` removes the blackhole of a killed proxy",
        rules_remove_removes_blackhole,
    );
}

fn settings(scene: &Scene, profile: Profile) -> Settings {
    let excluded = format!("interception.outbound.exclude_ports={EXCLUDED}");
    profile.of(scene.client_settings()).set(&excluded)
}

/// Whether the blackhole is installed in both families; false if in neither.
async fn is_blocked(pod: &Pod) -> bool {
    let mut blocked = Vec::new();
    for family in ["-4", "-6"] {
        blocked.push(tool(pod, "ip", &[family, "rule"]).await.ok().contains("blackhole"));
    }
    blocked == [true, true]
}

/// Removes the rules until the proxy reports a fight.
async fn begin_fight(pod: &Pod, proxy: &mut Proxy) {
    while proxy.count(FIGHT) == 0 {
        let reported = proxy.count(&["another program "]);
        tool(pod, "nft", &["flush", "ruleset"]).await.ok();
        proxy.more_than(reported, &["another program "]).await;
    }
}

/// Removes the rules in an endless loop.
fn keep_fighting(pod: &Pod) -> Background {
    let script = "while nft flush ruleset; do :; done";
    pod.background(Path::new("/bin/sh"), &["-c", script])
}

async fn no_plaintext_leaves(profile: Profile) {
    let scene = Scene::new().await;
    // Uncaptured plaintext connections reach this server.
    let sink = Server::echo(&scene.server, APP);
    let excluded = Server::echo(&scene.server, EXCLUDED);
    let settings = settings(&scene, profile);
    let mut proxy = scene.client.proxy(&settings).await;
    begin_fight(&scene.client, &mut proxy).await;
    assert!(is_blocked(&scene.client).await, "{}", proxy.log());
    let other_program = keep_fighting(&scene.client);
    let repairs = scene.client.metrics().await.sum(REPAIRS, &[]).expect("a count");
    let mut attempts = 0;
    // Wait until the rules were repaired several more times.
    until("the rules are repaired again and again", async || {
        for family in Family::BOTH {
            for _ in 0..20 {
                attempts += 1;
                if let Ok(mut stream) = scene.client.dial(scene.app(family)).await {
                    stream.write_all(b"in the clear").await.ok();
                }
            }
            let exempt = scene.client.dial(scene.server.at(family, EXCLUDED)).await;
            exempt.expect("the excluded port is not blocked");
        }
        scene.client.metrics().await.sum(REPAIRS, &[]) > Some(repairs + 5.0)
    })
    .await;
    assert_eq!(sink.peers(), vec![], "of {attempts} connections");
    assert!(!excluded.peers().is_empty());
    let (status, why) = readiness(&scene.client).await;
    assert_eq!((status, why.as_str()), (503, "not ready: another program changes the rules\n"));
    assert_eq!(scene.client.metrics().await.sum(INTACT, &[]), Some(0.0));
    assert!(is_blocked(&scene.client).await);

    other_program.signal(Signal::SIGKILL);
    other_program.ended().await;
    until("the proxy is ready again", async || readiness(&scene.client).await.0 == 200).await;
    assert!(!is_blocked(&scene.client).await);
    assert_eq!(scene.client.metrics().await.sum(INTACT, &[]), Some(1.0));
    scene.client.rules("verify", &settings).await.ok();
    assert_eq!(proxy.count(FIGHT), 1, "{}", proxy.log());
    drop(sink);
    let _server = scene.server.proxy(&profile.of(scene.server_settings())).await;
    for family in Family::BOTH {
        scene.connected(family).await;
    }
}

async fn stopped_during_fight() {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    begin_fight(&scene.client, &mut proxy).await;
    assert_eq!(proxy.stop().await.code(), Some(0));
    assert!(!is_blocked(&scene.client).await);
    scene.client.rules("verify", &scene.client_settings()).await.ok();
}

async fn start_removes_blackhole() {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&scene.client_settings()).await;
    begin_fight(&scene.client, &mut proxy).await;
    proxy.signal(Signal::SIGKILL);
    proxy.ended().await;
    assert!(is_blocked(&scene.client).await);
    let _proxy = scene.client.proxy(&scene.client_settings()).await;
    assert!(!is_blocked(&scene.client).await);
}

async fn rules_remove_removes_blackhole() {
    let scene = Scene::new().await;
    let before = scene.client.traces().await;
    let mut proxy = scene.client.proxy(&Settings::new(CLIENT)).await;
    begin_fight(&scene.client, &mut proxy).await;
    proxy.signal(Signal::SIGKILL);
    proxy.ended().await;
    scene.client.underpass(&["rules", "remove"]).await.ok();
    assert_eq!(scene.client.traces().await, before);
}
