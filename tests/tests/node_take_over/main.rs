//! Hot restart of `underpass node`: the pods move to the new process one by one, no connection
//! fails, and either process may be killed on the way.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod inputs;
mod killed;
mod load;
mod scene;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use underpass::spawn::SpawnError;
use underpass_tests::{APP, Family, ScriptedSuccessor, Server, Settings, Suite, tool, until};

use crate::inputs::{control_plane, silent_control_plane, spire};
use crate::killed::{Victim, new_is_killed, new_is_stopped_before_last_answer, old_is_killed};
use crate::load::{changed_mode, under_load};
use crate::scene::{Mode, Scene};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("three hot restarts under load fail no connection", || under_load(Mode::Broker));
    suite.test("three hot restarts of one process under load fail no connection", || {
        under_load(Mode::OneProcess)
    });
    suite.test("hot restart turns the broker off and on", changed_mode);
    for (mode, name) in [(Mode::Broker, "with the broker"), (Mode::OneProcess, "in one process")] {
        let test = format!("the new process follows the control plane, {name}");
        suite.test(&test, move || control_plane(mode));
        let test = format!("the new process gets its certificates from the SPIRE agent, {name}");
        suite.test(&test, move || spire(mode));
    }
    suite.test("new process without a mesh leaves every pod to the old one", silent_control_plane);
    suite.test("new process that ends half-way leaves every pod to the old one", new_ends);
    suite.test("killed old process leaves every pod to the new one", || {
        old_is_killed(Mode::OneProcess, Victim::Old)
    });
    suite.test("killed old broker leaves every pod to the new processes", || {
        old_is_killed(Mode::Broker, Victim::Old)
    });
    suite.test("killed old proxy process leaves every pod to the new processes", || {
        old_is_killed(Mode::Broker, Victim::ProxyOfOld)
    });
    suite.test("killed new broker leaves every pod to the old processes", || {
        new_is_killed(Victim::New)
    });
    suite.test("killed new proxy process leaves every pod to the old processes", || {
        new_is_killed(Victim::ProxyOfNew)
    });
    suite.test(
        "new process that is stopped waits for the last answer of the old one",
        new_is_stopped_before_last_answer,
    );
    suite.test("old process restores rules that a failed hot restart changed", restored_rules);
    suite.test("processes with another source or command are refused", refusals);
    suite.test("file that changes or is removed meanwhile is followed", changed_files);
    suite.test("rules of the node move too, and readiness is never lost", || {
        host_rules(Mode::Broker)
    });
    suite.test("rules of the node of one process move too", || host_rules(Mode::OneProcess));
    suite.run()
}

/// Connects to the running process as the new one would, up to the end of `requests`.
async fn converse(scene: &Scene, requests: &[&str]) -> ScriptedSuccessor {
    let successor = ScriptedSuccessor::connect(&scene.socket()).await;
    for request in requests {
        let answer = successor.ask(request).await;
        assert!(!answer.starts_with("refused"), "{request}: {answer}");
    }
    successor
}

async fn new_ends() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(Mode::Broker).await;
    let _echo = Server::echo(&scene.b, APP);
    let all =
        ["next", "next", "next", "rules uid-b", "accept uid-b", "served uid-b", "source", "next"];
    for count in [1, 3, 4, 5, 7, 8] {
        let failed = ["take-over by another process failed", "the connection was closed before"];
        let before = daemon.count(&failed);
        let requests = all.get(..count).expect("a part");
        let conversation = converse(&scene, requests).await;
        // While no process accepts for a pod, a connection to it waits for the old process.
        tokio::join!(scene.echoed(), async { drop(conversation) });
        daemon.more_than(before, &failed).await;
        scene.serves(&["a", "b"]).await;
    }
    // An unknown message ends the attempt.
    let conversation = converse(&scene, &["next"]).await;
    conversation.send("accept uid-x y").await;
    daemon.line(&["take-over by another process failed", "instead of"]).await;
    scene.echoed().await;
    let _new = scene.start_successor(&mut daemon, Mode::Broker).await;
    scene.serves(&["a", "b"]).await;
    scene.echoed().await;
    assert!(daemon.ended().await.success(), "{}", daemon.log());
}

async fn refusals() {
    let scene = Scene::new().await;
    let _daemon = scene.daemon(Mode::Broker).await;
    let _echo = Server::echo(&scene.b, APP);
    let mut refused = vec![
        scene
            .settings(Mode::Broker)
            .set(&format!("node.pods.directory={}", scene.world.folder().display())),
        scene.settings(Mode::Broker).set("proxy.outbound_port=15011"),
    ];
    let socket = scene.socket();
    refused.push(Settings::new("node").set(&format!("take_over.socket={}", socket.display())));
    for settings in refused {
        match scene.node.try_proxy(&settings.take_over()).await {
            Err(SpawnError::Ended { status, log }) => {
                assert_eq!(status.code(), Some(1), "{log}");
                let source = format!("node with directory {}", scene.folder().display());
                for part in ["refused the take-over: the role differs", source.as_str()] {
                    assert!(log.contains(part), "{part} is missing:\n{log}");
                }
            }
            other => unreachable!("the process did not exit: {other:?}"),
        }
    }
    scene.echoed().await;
}

async fn changed_files() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon(Mode::Broker).await;
    // The source of the running process is paused meanwhile.
    let conversation = converse(&scene, &["next", "next", "next", "source"]).await;
    scene.add(&scene.b, "annotations: {traffic.sidecar.istio.io/excludeInboundPorts: \"9999\"}");
    fs::remove_file(scene.folder().join("a.yaml")).expect("a file");
    drop(conversation);
    daemon.line(&["pod removed", "uid-a"]).await;
    let mut new = scene.start_successor(&mut daemon, Mode::Broker).await;
    scene.serves(&["b"]).await;
    scene.add(&scene.a, "");
    new.line(&["pod enrolled", "default/a"]).await;
    let rules = tool(&scene.b, "nft", &["list", "ruleset"]).await.ok();
    assert!(rules.contains("9999"), "{rules}");
    scene.serves(&["a", "b"]).await;
}

async fn restored_rules() {
    let scene = Scene::new().await;
    for repair in [false, true] {
        let settings = scene.settings(Mode::Broker).set(&format!("interception.repair={repair}"));
        let mut daemon = scene.node.proxy(&settings).await;
        scene.serves(&["a", "b"]).await;
        let rules = scene.b.traces().await;
        let conversation = converse(&scene, &["next", "next", "rules uid-a", "rules uid-b"]).await;
        tool(&scene.b, "nft", &["flush", "ruleset"]).await.ok();
        drop(conversation);
        until("the rules are back", async || scene.b.traces().await == rules).await;
        assert!(daemon.stop().await.success(), "{}", daemon.log());
    }
}

async fn host_rules(mode: Mode) {
    let scene = Scene::new().await;
    let settings = scene.settings(mode).set("node.probes=translate");
    let mut daemon = scene.node.proxy(&settings).await;
    scene.serves(&["a", "b"]).await;
    let scene = Arc::new(scene);
    let (stop, probed_scene) = (Arc::new(AtomicBool::new(false)), scene.clone());
    let stopped = stop.clone();
    let probes = tokio::spawn(async move {
        let mut probes = 0;
        while !stopped.load(Relaxed) {
            let (status, text) = probed_scene.get("/healthz/ready").await;
            assert_eq!(status, 200, "{text}");
            probes += 1;
        }
        probes
    });
    for _ in 0..2 {
        let new = scene.node.proxy(&settings.clone().take_over()).await;
        daemon.line(&["another process has taken over"]).await;
        assert!(daemon.ended().await.success(), "{}", daemon.log());
        daemon = new;
        let table = tool(&scene.node, "nft", &["list", "table", "inet", "underpass_host"]).await;
        let table = table.ok();
        assert!(table.contains(&scene.a.ip(Family::V4).to_string()), "{table}");
        let repaired = ["another program changed the rules for kubelet probes"];
        assert_eq!(daemon.count(&repaired), 0, "{}", daemon.log());
    }
    let without = scene.settings(mode).set("node.probes=off").take_over();
    let _new = scene.node.proxy(&without).await;
    assert!(daemon.ended().await.success(), "{}", daemon.log());
    let table = tool(&scene.node, "nft", &["list", "table", "inet", "underpass_host"]).await;
    assert!(!table.status.success(), "{}", table.out);
    stop.store(true, Relaxed);
    assert!(probes.await.expect("readiness is never lost") > 0);
    assert!(Path::new(&scene.socket()).exists(), "the socket belongs to the last process");
}
