//! End-to-end tests of `underpass doctor`: it names the cause of each broken situation, and finds
//! no failure in a sound one.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod certificates;
mod report;
mod situations;
mod sources;

use std::fs;
use std::process::ExitCode;

use serde_json::Value;
use underpass_tests::{Pki, Pod, Scene, Settings, Suite};

use crate::report::Findings;

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("a sound scene has no failure", sound_scene_has_no_failure);
    suite.test("the host is checked without settings before the installation", host_is_checked);
    suite.test("text names hint, command and section of each failure", text_has_remedies);
    situations::add_tests(&mut suite);
    certificates::add_tests(&mut suite);
    sources::add_tests(&mut suite);
    suite.run()
}

/// Another authority of the same trust domain.
fn other_authority(scene: &Scene) -> Pki {
    let folder = scene.world.folder().join("other");
    fs::create_dir_all(&folder).expect("a folder");
    Pki::new(&folder)
}

/// Settings without DNS servers, because a pod reaches none.
fn without_dns(pod: &Pod, settings: Settings) -> Settings {
    let file = pod.folder().join("no-servers.conf");
    fs::write(&file, "options timeout:1\n").expect("written");
    settings.set(&format!("dns.resolv_conf={}", file.display())).set("timeouts.connect=500ms")
}

/// The findings of the doctor in a pod, with these settings.
async fn doctor(pod: &Pod, settings: &Settings) -> Findings {
    let arguments = settings.arguments(pod);
    let fixed = ["doctor", "-o", "json"];
    let arguments: Vec<_> = fixed.into_iter().chain(arguments.iter().map(String::as_str)).collect();
    Findings::of(pod.underpass(&arguments).await)
}

/// The findings of the doctor in a pod, with the settings of the proxy that runs there.
async fn doctor_of_proxy(pod: &Pod) -> Findings {
    Findings::of(pod.underpass(&["doctor", "-o", "json"]).await)
}

async fn sound_scene_has_no_failure() {
    let scene = Scene::new().await;
    let client = without_dns(&scene.client, scene.client_settings());
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let _client = scene.client.proxy(&client).await;
    for findings in [doctor(&scene.client, &client).await, doctor_of_proxy(&scene.client).await] {
        assert_eq!(findings.failures(), [""; 0], "{findings:?}");
        for (id, part) in [
            ("kernel-rules", "the kernel accepts all"),
            ("certificate", "spiffe://cluster.local/ns/default/sa/client, valid for another"),
            ("rules-installed", "and intact"),
            ("rules-self-test", "caught"),
            ("peers-connect", "tunnels to all 1 peers can be opened"),
            ("proxy-ready", "is ready"),
            ("version-running", "runs this program"),
        ] {
            findings.assert(id, "ok", part);
        }
    }
    assert_eq!(scene.client.underpass(&["doctor", "--quiet"]).await.status.code(), Some(0));
}

async fn host_is_checked() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let before = pod.traces().await;
    let findings = Findings::of(pod.underpass(&["doctor", "--pre", "-o", "json"]).await);
    findings.assert("kernel-rules", "ok", "the kernel accepts all");
    findings.assert("capabilities-start", "ok", "NET_ADMIN");
    assert!(findings.find("configuration").is_none() && findings.find("certificate").is_none());
    assert_eq!(pod.traces().await, before, "the doctor changes nothing");
    // Without settings and without a proxy, the result is the same.
    let printed = pod.underpass(&["doctor", "-o", "json"]).await;
    assert!(printed.err.contains("only the host is checked"), "{}", printed.err);
    assert_eq!(Findings::of(printed).ids(), findings.ids());
}

async fn text_has_remedies() {
    let scene = Scene::new().await;
    let settings = without_dns(&scene.client, scene.client_settings());
    let arguments = settings.arguments(&scene.client);
    let arguments = ["doctor"].into_iter().chain(arguments.iter().map(String::as_str));
    let (out, err) = scene.client.underpass(&arguments.collect::<Vec<_>>()).await.exited(1);
    assert_eq!(err, "error: failed checks: 1\n", "{out}");
    let failure = out.split("  failure  ").nth(1).expect("a failure");
    for part in [
        "peers-connect",
        "no tunnel to 1 of 1 peers: default/server at",
        ": connect: ",
        "hint: check that the peer's proxy runs",
        "run: nc -zvw3 ",
        "see docs/troubleshooting.md#peers-connect",
    ] {
        assert!(failure.contains(part), "{part:?} is not in\n{failure}");
    }
    assert!(!out.contains('\u{1b}'), "a pipe has no colours: {out}");
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
