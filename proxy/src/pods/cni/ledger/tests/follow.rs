//! Tests of pods that the runtime's results show without an addition.

use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::advance;

use super::*;

/// Stores the result of an addition to another network.
fn store_result(folder: &Folder, container: &str, name: &str, namespace_path: &str) {
    fs::create_dir_all(folder.path("results")).unwrap();
    let arguments = [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", name]];
    let result = serde_json::json!({
        "kind": "cniCacheV1", "containerId": container, "netns": namespace_path,
        "cniArgs": arguments,
    });
    fs::write(folder.path("results").join(container), result.to_string()).unwrap();
}

/// The report of the pod `shop/web` without an addition.
fn not_added() -> String {
    format!("shop/web web-1 failed: {}\n", EnrolError::NotAdded)
}

#[tokio::test(start_paused = true)]
async fn sandbox_without_addition_is_failed_until_it_is_added() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    store_result(&folder, "web-1", "web", &namespace_path("uts"));
    store_result(&folder, "gone-1", "gone", &folder.path("gone").display().to_string());
    let _following = daemon.follow();
    let reported = async |expected: &str| {
        for _ in 0..60 {
            if report(&daemon.ledger.registry) == expected {
                return;
            }
            advance(Duration::from_secs(1)).await;
        }
        panic!("{} instead of {expected}", report(&daemon.ledger.registry));
    };
    reported(&not_added()).await;
    let pod = PodReference::new("shop", "web", "web-1").unwrap();
    let web = AttachedPod { pod, ..attached("web", &["10.0.0.1"]) };
    daemon.add(&web, "uts").await.unwrap();
    reported("shop/web web-1 serving\n").await;
}

#[tokio::test(start_paused = true)]
async fn constant_changes_do_not_delay_reading_results() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder);
    let _following = daemon.follow();
    yield_now().await;
    store_result(&folder, "web-1", "web", &namespace_path("uts"));
    // The interval, the grace of a pod, and some steps.
    for _ in 0..160 {
        daemon.ledger.changed.notify_one();
        // The follower runs after a step and finds the change before its timer fires.
        advance(Duration::from_millis(100)).await;
    }
    assert_eq!(report(&daemon.ledger.registry), not_added());
}
