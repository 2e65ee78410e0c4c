//! End-to-end tests of the web page, in a browser without a screen.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use underpass_tests::{Family, Pod, Scene, Suite};

const CHROMIUM: &str = "chromium";
/// A browser needs some seconds to start, more on a busy machine.
const BROWSER_TIMEOUT: Duration = Duration::from_secs(45);
const ADDRESS: &str = "127.0.0.1:15000";

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_with_program(
        "the page shows traffic, rules, tunnels and certificates",
        CHROMIUM,
        healthy,
    );
    suite.test_with_program(
        "the page shows a failed connection with its reason and hint",
        CHROMIUM,
        failed,
    );
    suite.run()
}

/// The document after the scripts have run. The clock of the page is fast, and stops during
/// requests.
async fn page(pod: &Pod) -> String {
    let folder = pod.folder();
    let (profile, document) = (folder.join("profile"), folder.join("document.html"));
    let browse = format!(
        "exec chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage \
         --user-data-dir={profile:?} --virtual-time-budget=20000 --dump-dom \
         http://{ADDRESS}/ > {document:?} 2> {:?}",
        folder.join("browser.log")
    );
    let mut browser = pod.background(Path::new("sh"), &["-c", &browse]);
    assert!(browser.ends_within(BROWSER_TIMEOUT).await, "the browser does not end");
    fs::read_to_string(&document).expect("the browser has written the document")
}

fn assert_shows(document: &str, texts: &[&str]) {
    for text in texts {
        assert!(document.contains(text), "the page does not show {text}: {document}");
    }
    assert!(document.contains("role=\"alert\" hidden"), "an error is shown: {document}");
}

async fn healthy() {
    let scene = Scene::new().await;
    let client = scene.client_settings().set(&format!("admin.address={ADDRESS}"));
    let server = scene.server_settings();
    let (_client, _server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    let _connection = scene.connected(Family::V4).await;
    let document = page(&scene.client).await;
    let identity = scene.pki.id("client").to_string();
    assert_shows(
        &document,
        &[
            "Healthy",
            "default/client to default/server: 1 connection, 1 open, mutual TLS",
            "capture-outbound",
            "The rules are intact",
            &identity,
            "valid",
            ":15008",
        ],
    );
}

async fn failed() {
    let (scene, _proxy) = Scene::with_plain_client(&[&format!("admin.address={ADDRESS}")]).await;
    // Nothing listens on the port.
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    let document = page(&scene.client).await;
    let hint = "check that the destination listens on this port";
    assert_shows(&document, &["failed", "Connection refused", hint, "denied or failed"]);
}
