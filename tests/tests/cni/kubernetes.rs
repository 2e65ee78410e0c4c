//! Tests of the daemon with facts from a scripted API server of Kubernetes.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::timeout;
use underpass::spawn::SpawnError;
use underpass_tests::{Family, Pki, Pod, Proxy, ScriptedSuccessor, Suite, error_of, tool, until};

use crate::api_server::{ApiServer, PORT, TOKEN};
use crate::scene::{Scene, has_rules};

const MODE: &str = "istio.io/dataplane-mode";

pub(crate) fn add_to(suite: &mut Suite) {
    suite.test("labels at the API server enrol and remove a pod while it runs", labels);
    suite.test("an addition waits for its pod at the API server, and fails closed", late_facts);
    suite.test(
        "facts stay while the API server is unavailable, and are updated afterwards",
        outages,
    );
    suite.test(
        "a pod that becomes exempt at the end of a hot restart does not delay it",
        late_exempt,
    );
    suite.test("a dead connection to the API server is detected within 45 s", dead_connection);
    suite.test("an unusable kubeconfig file fails the start with a hint", unusable_files);
    suite.test("a refused credential and an unknown CA are logged with a hint", refused_access);
    suite.test("pods are enrolled after a restart while the API server is unreachable", restarted);
    suite.test("a pod that the runtime did not add makes the node unready", unadded);
}

struct Cluster {
    scene: Scene,
    api: ApiServer,
    daemon: Proxy,
}

impl Cluster {
    /// A daemon whose API server has both pods.
    async fn new(more: &str) -> Self {
        let scene = Scene::new().await;
        let api = ApiServer::start(&scene.node, &scene.pki);
        for name in ["a", "b"] {
            api.pod(name, |_| {});
        }
        let daemon = scene.daemon(&format!("{} {more}", api.settings())).await;
        Self { scene, api, daemon }
    }

    async fn rules_are(&self, pod: &Pod, expected: bool) {
        let what = format!("the rules of {} are there: {expected}", pod.name());
        until(&what, async || has_rules(pod).await == expected).await;
    }

    async fn is_ready_with(&self, status: u16, text: &str) {
        until(&format!("readiness says {text:?}"), async || {
            let (found, body) = self.scene.readiness().await;
            found == status && body.contains(text)
        })
        .await;
    }
}

/// Sets a label of a pod.
fn mode(mode: &'static str) -> impl FnOnce(&mut Value) {
    move |pod| pod["metadata"]["labels"][MODE] = json!(mode)
}

async fn labels() {
    let Cluster { scene, api, .. } = &mut Cluster::new("").await;
    api.pod("b", mode("none"));
    scene.succeeds("ADD", &scene.a, json!({})).await;
    until("the label of b is known", async || {
        scene.succeeds("ADD", &scene.b, json!({})).await;
        !has_rules(&scene.b).await
    })
    .await;
    assert!(scene.pods().await.contains("default/b uid-b exempt"), "{}", scene.pods().await);
    scene.succeeds("CHECK", &scene.b, json!({})).await;
    api.pod("b", |_| {});
    until("b is enrolled", async || scene.pods().await.contains("default/b uid-b serving")).await;
    scene.exchanged(Family::V4).await;
    // The label of the namespace applies to pods without such a label.
    api.pod("a", mode("ambient"));
    api.namespace("default", json!({MODE: "none"}));
    until("b is exempt", async || !has_rules(&scene.b).await).await;
    // The two changes arrive in any order: if the namespace's came first, a was exempt meanwhile.
    until("a is enrolled", async || {
        scene.pods().await.contains("default/a uid-a serving") && has_rules(&scene.a).await
    })
    .await;
    api.namespace("default", json!({}));
    until("b is enrolled", async || scene.pods().await.contains("default/b uid-b serving")).await;
    scene.exchanged(Family::V6).await;
    // An annotation changes the rules of a served pod.
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    api.pod("b", |pod| pod["metadata"]["annotations"][key] = json!("2222"));
    until("the rules exclude the port", async || {
        let rules = tool(&scene.b, "nft", &["list", "ruleset"]).await;
        rules.out.contains("2222")
    })
    .await;
}

async fn late_facts() {
    let cluster = Cluster::new("").await;
    let Cluster { scene, api, .. } = &cluster;
    let late = scene.world.pod("late").await;
    let result = json!({"prevResult": {"ips": [{"address": "192.0.2.1/24"}]}});
    let (added, ()) = tokio::join!(scene.fails("ADD", &late, result.clone()), async {
        cluster.is_ready_with(200, "ready").await;
        api.pod("late", |pod| pod["metadata"]["name"] = json!("other"));
    });
    assert_eq!(added.0, 11);
    assert!(
        added.1.contains("is default/other at the API server, but default/late"),
        "{}",
        added.1
    );
    api.delete_pod("late");
    api.pod("late", |pod| pod["spec"]["hostNetwork"] = json!(true));
    until("the pod uses the network of the host", async || {
        let (code, text) = scene.fails("ADD", &late, result.clone()).await;
        code == 11 && text.contains("hostNetwork")
    })
    .await;
    assert!(!has_rules(&late).await);
    api.pod("a", |_| {});
    scene.succeeds("ADD", &scene.a, json!({})).await;
    cluster.rules_are(&scene.a, true).await;
}

async fn outages() {
    let mut cluster = Cluster::new("").await;
    {
        let Cluster { scene, api, .. } = &cluster;
        scene.succeeds("ADD", &scene.a, json!({})).await;
        api.refuse(Some((403, "pods is forbidden: User \"x\" cannot list")));
        cluster.is_ready_with(200, "cannot list").await;
        // The known facts suffice.
        scene.succeeds("ADD", &scene.b, json!({})).await;
        scene.exchanged(Family::V4).await;
    }
    let denied = ["the API server denies the request", "list and watch pods and namespaces"];
    cluster.daemon.line(&denied).await;
    let Cluster { scene, api, .. } = &cluster;
    // The change was missed without a watch, and the server has forgotten the version.
    api.pod("b", mode("none"));
    api.forget();
    let (lists, _) = api.counts();
    api.refuse(None);
    cluster.rules_are(&scene.b, false).await;
    until("pods and namespaces are listed again", async || api.counts().0 >= lists + 2).await;
    cluster.is_ready_with(200, "ready").await;
    // Watches continue from a bookmark, without another list.
    until("bookmarks arrive", async || {
        api.pod("b", |_| {});
        api.counts().1 > 2
    })
    .await;
    cluster.rules_are(&scene.b, true).await;
    let (lists, _) = api.counts();
    api.disconnect();
    api.pod("b", mode("none"));
    cluster.rules_are(&scene.b, false).await;
    assert_eq!(api.counts().0, lists, "the pods are not listed again");
}

/// The old process has paused its source by then: only the new one may apply the change.
async fn late_exempt() {
    let scene = Scene::new().await;
    let api = ApiServer::start(&scene.node, &scene.pki);
    for name in ["a", "b"] {
        api.pod(name, |_| {});
    }
    let socket = scene.world.folder().join("take-over.sock");
    let more = format!("{} take_over.socket={}", api.settings(), socket.display());
    let mut daemon = scene.daemon(&more).await;
    for pod in [&scene.a, &scene.b] {
        scene.succeeds("ADD", pod, json!({})).await;
    }
    let successor = ScriptedSuccessor::connect(&socket).await;
    for (request, answer) in
        [("next", "pod "), ("next", "pod "), ("next", "end"), ("source", "source"), ("next", "end")]
    {
        let answered = successor.ask(request).await;
        assert!(answered.starts_with(answer), "{request}: {answered}");
    }
    let (_, bookmarks) = api.counts();
    api.pod("b", mode("none"));
    until("the daemon has got the change", async || api.counts().1 > bookmarks).await;
    for request in ["accept", "ready"] {
        assert_eq!(successor.ask(request).await, "ok");
    }
    daemon.line(&["another process has taken over"]).await;
    assert!(daemon.ended().await.success(), "{}", daemon.log());
    for pod in [&scene.a, &scene.b] {
        assert!(has_rules(pod).await, "the rules belong to the other process");
    }
}

/// Keepalive probes without an answer detect the dead connection after 33 s. Without probes, the
/// daemon would wait for the end of the watch, 240 s.
async fn dead_connection() {
    let cluster = Cluster::new("").await;
    let Cluster { scene, api, .. } = &cluster;
    scene.succeeds("ADD", &scene.b, json!({})).await;
    let rules = format!(
        "add table inet lost; add chain inet lost in {{ type filter hook input priority 0; }}; \
         add rule inet lost in tcp dport {PORT} drop; add rule inet lost in tcp sport {PORT} drop"
    );
    tool(&scene.node, "nft", &[&rules]).await.ok();
    api.pod("b", mode("none"));
    let detected = async { while !scene.readiness().await.1.contains("do not arrive") {} };
    timeout(Duration::from_secs(45), detected).await.expect("the connection is known to be dead");
    assert!(has_rules(&scene.b).await, "the last facts stay in use");
    tool(&scene.node, "nft", &["delete table inet lost"]).await.ok();
    let applied = async { while has_rules(&scene.b).await {} };
    timeout(Duration::from_secs(12), applied).await.expect("the change has arrived");
    cluster.is_ready_with(200, "ready").await;
}

async fn unusable_files() {
    let scene = Scene::new().await;
    let api = ApiServer::start(&scene.node, &scene.pki);
    for (settings, error, hint) in [
        ("node.kubeconfig=/no/file".to_owned(), "/no/file: cannot be read", "node.kubeconfig"),
        (
            api.changed_settings("current-context: c", "current-context: other"),
            "contexts: has no item with the name \"other\"",
            "it has \"c\"",
        ),
    ] {
        let started = scene.node.try_proxy(&scene.settings().set(&settings)).await;
        let Err(SpawnError::Ended { status, log }) = started else { panic!("it started") };
        assert_eq!(status.code(), Some(2), "{log}");
        let shown = error_of(&log);
        assert!(shown.contains(error) && shown.contains(hint), "{shown}");
    }
}

async fn refused_access() {
    let scene = Scene::new().await;
    let api = ApiServer::start(&scene.node, &scene.pki);
    let folder = scene.world.folder().join("other");
    fs::create_dir(&folder).expect("a folder");
    let (roots, other) = (scene.pki.roots().to_owned(), Pki::new(&folder));
    let [roots, other] = [&*roots, other.roots()].map(|roots| format!("{roots:?}"));
    for (from, to, error, hint) in [
        (TOKEN, "expired", "the API server does not accept the credential", "has expired"),
        (&*roots, &*other, "TLS 1.3 failed: invalid peer certificate", "certificate-authority"),
    ] {
        let mut daemon = scene.daemon(&api.changed_settings(from, to)).await;
        daemon.line(&["cannot watch the API server", error, hint]).await;
        until("readiness names the error", async || {
            let (status, text) = scene.readiness().await;
            status == 503 && text.contains(error)
        })
        .await;
        assert!(daemon.stop().await.success(), "{}", daemon.log());
    }
}

async fn restarted() {
    let mut cluster = Cluster::new("").await;
    {
        let Cluster { scene, .. } = &cluster;
        for pod in [&scene.a, &scene.b] {
            scene.succeeds("ADD", pod, json!({})).await;
        }
        scene.exchanged(Family::V4).await;
    }
    cluster.daemon.signal(Signal::SIGKILL);
    cluster.daemon.ended_by_itself().await;
    let Cluster { scene, api, .. } = &cluster;
    api.refuse(Some((503, "etcdserver: no leader")));
    let more = api.settings();
    let daemon = scene.daemon(&more).await;
    until("both pods are served", async || {
        let pods = scene.pods().await;
        ["default/a uid-a serving", "default/b uid-b serving"].iter().all(|pod| pods.contains(pod))
    })
    .await;
    scene.exchanged(Family::V4).await;
    cluster.is_ready_with(503, "the API server has not sent").await;
    assert!(daemon.count(&["enrolling a pod with stored facts"]) >= 2, "{}", daemon.log());
    // Changes are applied once it answers.
    api.pod("b", mode("none"));
    api.refuse(None);
    cluster.rules_are(&scene.b, false).await;
    cluster.is_ready_with(200, "ready").await;
}

async fn unadded() {
    let cluster = Cluster::new("").await;
    let Cluster { scene, api, .. } = &cluster;
    let running = |pod: &mut Value| {
        pod["status"] = json!({
            "podIPs": [{"ip": "10.9.0.1"}], "containerStatuses": [{"state": {"running": {}}}],
        });
    };
    scene.succeeds("ADD", &scene.a, json!({})).await;
    for name in ["a", "b", "host"] {
        api.pod(name, |pod| {
            running(pod);
            pod["spec"]["hostNetwork"] = json!(name == "host");
        });
    }
    let text = "the runtime did not call the CNI plugin: default/b\n";
    cluster.is_ready_with(503, text).await;
    let pods = scene.pods().await;
    assert!(pods.contains("default/b uid-b failed: the runtime did not call"), "{pods}");
    let metrics = scene.metrics().await;
    assert!(metrics.contains("\nunderpass_pods_without_plugin 1\n"), "{metrics}");
    assert!(metrics.contains("\nunderpass_kubernetes_connected 1\n"), "{metrics}");
    // Other pods can still be added.
    scene.succeeds("STATUS", &scene.a, json!({})).await;
    scene.succeeds("ADD", &scene.b, json!({})).await;
    cluster.is_ready_with(200, "ready").await;
    scene.exchanged(Family::V4).await;
    scene.succeeds("DEL", &scene.b, json!({})).await;
    cluster.is_ready_with(503, "default/b").await;
    api.delete_pod("b");
    cluster.is_ready_with(200, "ready").await;
    assert!(!scene.pods().await.contains("uid-b"), "{}", scene.pods().await);
}
