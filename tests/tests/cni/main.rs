//! Tests of `underpass cni`, the real binary as a CNI plugin, against `underpass node`.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod api_server;
mod kubernetes;
mod scene;

use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use underpass_tests::{Family, Mesh, Suite, tool, until};

use crate::scene::{Scene, has_rules, previous_result};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both("an added pod is served with its own identity until it is deleted", lifecycle);
    suite.test("an addition fails closed while the daemon is down or lacks a fact", failures);
    suite.test("a daemon that was killed serves its pods again", restart);
    suite.test("additions and deletions succeed during hot restarts", hot_restart);
    suite.test("garbage collection removes pods that the runtime does not name", collection);
    suite.test("the daemon installs the plugin and repairs its entry", upkeep);
    suite.test("a pod with IPv6 alone is served", ipv6_alone);
    suite.test("CHECK fails once a listener of the pod is closed", closed_listener);
    suite.test("an addition waits for the loopback interface of the pod", late_loopback);
    kubernetes::add_to(&mut suite);
    suite.run()
}

async fn lifecycle(family: Family) {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon("interception.on_exit=remove").await;
    scene.succeeds("STATUS", &scene.a, json!({})).await;
    for pod in [&scene.a, &scene.b, &scene.b] {
        let result = scene.succeeds("ADD", pod, json!({})).await;
        assert_eq!(
            serde_json::from_str::<Value>(&result).expect("a result")["cniVersion"],
            "1.1.0"
        );
        assert!(has_rules(pod).await, "the rules exist once ADD returns");
    }
    // Strict mTLS: only a tunnel with the identity of `a` passes.
    scene.exchanged(family).await;
    let access = daemon.line(&["access: ", "sa/a"]).await;
    assert!(access.contains("sa/b"), "{access}");
    scene.succeeds("CHECK", &scene.a, json!({})).await;
    for _ in 0..2 {
        scene.succeeds("DEL", &scene.a, json!({"prevResult": null})).await;
    }
    assert!(!has_rules(&scene.a).await, "DEL removes the rules");
    assert_eq!(scene.fails("CHECK", &scene.a, json!({})).await.0, 3);
    scene.succeeds("CHECK", &scene.b, json!({})).await;
}

async fn failures() {
    let scene = Scene::new().await;
    let (code, text) = scene.fails("ADD", &scene.a, json!({})).await;
    assert_eq!(code, 11);
    assert!(
        text.contains("cannot be reached") && text.contains("start `underpass node`"),
        "{text}"
    );
    assert_eq!(scene.fails("STATUS", &scene.a, json!({})).await.0, 50);
    scene.succeeds("DEL", &scene.a, json!({})).await;
    let _daemon = scene.daemon("").await;
    let unknown = scene.world.pod("unknown").await;
    let addresses = json!({"prevResult": {"ips": [{"address": "192.0.2.1/24"}]}});
    let (code, text) = scene.fails("ADD", &unknown, addresses.clone()).await;
    assert_eq!(code, 11);
    assert!(text.contains("the mesh has no workload default/unknown"), "{text}");
    let (code, text) = scene.fails("ADD", &scene.a, addresses).await;
    assert_eq!(code, 11);
    assert!(text.contains("but the pod has 192.0.2.1"), "{text}");
    assert!(!has_rules(&scene.a).await, "a refused addition changes nothing");
    // The namespace is the node's own.
    let (code, _) = scene
        .fails("ADD", &scene.node, json!({"prevResult": {"ips": [{"address": "192.0.2.1/24"}]}}))
        .await;
    assert_eq!(code, 101);
}

async fn restart() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon("").await;
    for pod in [&scene.a, &scene.b] {
        scene.succeeds("ADD", pod, json!({})).await;
    }
    daemon.signal(Signal::SIGKILL);
    daemon.ended_by_itself().await;
    assert_eq!(scene.fails("ADD", &scene.a, json!({})).await.0, 11);
    assert!(has_rules(&scene.a).await, "the pods stay closed");
    let mut daemon = scene.daemon("").await;
    for pod in ["default/a", "default/b"] {
        daemon.line(&["pod enrolled", pod]).await;
    }
    scene.exchanged(Family::V4).await;
    scene.succeeds("CHECK", &scene.a, json!({})).await;
}

async fn hot_restart() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon("").await;
    scene.succeeds("ADD", &scene.a, json!({})).await;
    let stop = AtomicBool::new(false);
    let calls = async {
        let mut calls = 0;
        while !stop.load(Relaxed) {
            scene.succeeds("ADD", &scene.b, json!({})).await;
            scene.succeeds("CHECK", &scene.a, json!({})).await;
            scene.succeeds("CHECK", &scene.b, json!({})).await;
            scene.succeeds("DEL", &scene.b, json!({})).await;
            calls += 4;
        }
        calls
    };
    let restarts = async {
        for _ in 0..3 {
            let new = scene.node.proxy(&scene.settings().take_over()).await;
            daemon.line(&["another process has taken over"]).await;
            assert!(daemon.ended().await.success(), "{}", daemon.log());
            daemon = new;
        }
        stop.store(true, Relaxed);
    };
    let (calls, ()) = tokio::join!(calls, restarts);
    assert!(calls >= 4 && has_rules(&scene.a).await && !has_rules(&scene.b).await);
    scene.succeeds("ADD", &scene.b, json!({})).await;
    scene.exchanged(Family::V4).await;
    assert_eq!(daemon.count(&["pod enrolled", "default/a"]), 1, "{}", daemon.log());
    // The last process owns the socket, and removes it at its end.
    assert!(daemon.stop().await.success(), "{}", daemon.log());
    assert!(!scene.socket().exists());
}

async fn collection() {
    let scene = Scene::new().await;
    let mut daemon = scene.daemon("").await;
    for pod in [&scene.a, &scene.b] {
        scene.succeeds("ADD", pod, json!({})).await;
    }
    let valid = json!([{"containerID": "container-a", "ifname": "eth0"}]);
    scene.succeeds("GC", &scene.a, json!({"cni.dev/valid-attachments": valid})).await;
    daemon.line(&["pod removed", "uid-b"]).await;
    scene.succeeds("CHECK", &scene.a, json!({})).await;
    assert_eq!(scene.fails("CHECK", &scene.b, json!({})).await.0, 3);
}

async fn upkeep() {
    const LIST: &str = r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;
    let scene = Scene::new().await;
    let (net, bin) = (scene.world.folder().join("net.d"), scene.world.folder().join("bin"));
    for folder in [&net, &bin] {
        fs::create_dir(folder).expect("a folder");
    }
    let folders = format!(
        "node.cni_install.net_dir={} node.cni_install.bin_dir={}",
        net.display(),
        bin.display()
    );
    let _daemon = scene.daemon(&folders).await;
    let (code, text) = scene.fails("STATUS", &scene.a, json!({})).await;
    assert_eq!(code, 50);
    assert!(text.contains("no network configuration yet"), "{text}");
    let list = net.join("10-n.conflist");
    for _ in 0..2 {
        fs::write(&list, LIST).expect("a file");
        until("the entry is added", async || {
            fs::read_to_string(&list).expect("a list").contains("underpass-cni")
        })
        .await;
    }
    // The installed plugin is selected by its name alone.
    let plugin = bin.join("underpass-cni").display().to_string();
    let script = format!("echo '{{}}' | CNI_COMMAND=VERSION exec {plugin}");
    let printed = tool(&scene.node, "sh", &["-c", &script]).await;
    assert!(printed.ok().contains("supportedVersions"));
    let [net, bin] = [net, bin].map(|folder| folder.display().to_string());
    let uninstall = ["cni", "uninstall", "--net-dir", &net, "--bin-dir", &bin, "--dry-run"];
    assert!(scene.node.underpass(&uninstall).await.ok().contains("would remove"));
}

async fn ipv6_alone() {
    let scene = Scene::new().await;
    let mut mesh = Mesh::default();
    for pod in [&scene.a, &scene.b] {
        tool(pod, "ip", &["-4", "address", "flush", "dev", "eth0"]).await.ok();
        mesh = mesh.workload(pod.name(), &[pod.ip(Family::V6)], "HBONE");
    }
    let mut daemon = scene.daemon_in(mesh, "").await;
    for pod in [&scene.a, &scene.b] {
        let previous = previous_result(pod, &[pod.ip(Family::V6)]);
        let result = scene.succeeds("ADD", pod, json!({"prevResult": previous})).await;
        assert!(!result.contains("10."), "{result}");
    }
    scene.exchanged(Family::V6).await;
    daemon.line(&["access: ", "sa/a", "sa/b"]).await;
    let previous = previous_result(&scene.a, &scene.a.ips());
    scene.succeeds("CHECK", &scene.a, json!({"prevResult": previous})).await;
}

async fn closed_listener() {
    let scene = Scene::new().await;
    let _daemon = scene.daemon("").await;
    scene.succeeds("ADD", &scene.a, json!({})).await;
    scene.succeeds("CHECK", &scene.a, json!({})).await;
    tool(&scene.a, "ss", &["-K", "state", "listening", "sport", "=", ":15008"]).await.ok();
    let (code, text) = scene.fails("CHECK", &scene.a, json!({})).await;
    assert_eq!(code, 100);
    assert!(text.contains("the listener for tunnels (proxy.hbone_port) is closed"), "{text}");
}

/// containerd enables the loopback interface while it calls the plugin.
async fn late_loopback() {
    let scene = Scene::new().await;
    let _daemon = scene.daemon("").await;
    let loopback = async |state| {
        let printed = tool(&scene.a, "ip", &["link", "set", "lo", state]).await;
        assert!(printed.status.success(), "{printed:?}");
    };
    loopback("down").await;
    let enabled = async {
        until("the daemon has bound its listeners", async || {
            tool(&scene.a, "ss", &["-Hltn", "sport", "=", ":15008"]).await.out.contains("15008")
        })
        .await;
        loopback("up").await;
    };
    tokio::join!(scene.succeeds("ADD", &scene.a, json!({})), enabled);
    assert!(has_rules(&scene.a).await);
}
