//! Tests of a node daemon whose limit of open files is too low for its pods.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use underpass_tests::{
    APP, Family, Mesh, Pki, Pod, Settings, Suite, World, exchange, http_get, until,
};

/// The limit of open files, enough for about four pods.
const FILES: usize = 200;
/// The names of the pods, which are wired in pairs.
const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

pub(crate) fn add_tests(suite: &mut Suite) {
    for broker in ["auto", "off"] {
        let name = format!(
            "pods beyond the limit of open files are refused, and the others are served (privileges.broker: {broker})"
        );
        suite.test(&name, async move || too_many_pods(broker).await);
    }
}

async fn too_many_pods(broker: &str) {
    let mut world = World::new();
    let node = world.pod("node").await;
    let mut pods = Vec::new();
    for [one, other] in NAMES.as_chunks::<2>().0 {
        let (mut one, mut other) = (world.pod(one).await, world.pod(other).await);
        world.wire(&mut one, &mut other).await;
        pods.extend([one, other]);
    }
    let (folder, pki) = (world.folder().join("pods"), Pki::new(world.folder()));
    fs::create_dir(&folder).expect("a folder");
    pods[..2].iter().for_each(|pod| pod.write_facts(&folder, ""));
    let mesh = pods.iter().fold(Mesh::default(), Mesh::hbone).write(&node, "mesh");
    let settings = Settings::node("node", &format!("directory: {folder:?}"));
    let identity = format!("identity: {{local_ca: {:?}}}", pki.dir());
    let settings = settings.section(&identity).mesh(&mesh).set("proxy.mtls=strict");
    let settings = settings.set(&format!("privileges.broker={broker}"));
    let script = format!("ulimit -n {FILES}\nexec \"$UNDERPASS\" \"$@\"");
    let mut daemon = node.try_proxy_through(&script, &settings).await.expect("the daemon starts");
    for pod in ["default/a", "default/b"] {
        daemon.line(&["pod enrolled", pod]).await;
    }
    pods[2..].iter().for_each(|pod| pod.write_facts(&folder, ""));
    let refusal = format!("the limit of {FILES} open files is too low for another pod");
    daemon.line(&["cannot enrol the pod", &refusal, "LimitNOFILE"]).await;
    let mut serving = Vec::new();
    until("each pod is served or refused", async || {
        let status = get(&node, "/healthz/pods").await;
        let served = status.lines().filter(|line| line.ends_with(" serving"));
        serving = served.filter_map(name).map(str::to_owned).collect();
        let refused = status.lines().filter(|line| line.contains(&refusal)).count();
        serving.len() + refused == NAMES.len()
    })
    .await;
    assert!((3..NAMES.len()).contains(&serving.len()), "{serving:?}");
    assert!(get(&node, "/healthz/ready").await.contains("ready"));
    exchanged(&pods).await;
    // A removed pod makes room for another one.
    let gone = serving.pop().expect("a pod");
    fs::remove_file(folder.join(format!("{gone}.yaml"))).expect("removed");
    daemon.line(&["pod removed", &format!("uid={gone}")]).await;
    let is_refused =
        |pod: &&Pod| pod.name() != gone && !serving.iter().any(|one| one == pod.name());
    for refused in pods.iter().filter(is_refused) {
        // The next attempt is due at once.
        refused.write_facts(&folder, "labels: {changed: \"true\"}\n");
    }
    until("another pod is served", async || {
        let status = get(&node, "/healthz/pods").await;
        status.lines().filter(|line| line.ends_with(" serving")).count() == serving.len() + 1
    })
    .await;
    exchanged(&pods).await;
    assert!(daemon.stop().await.success(), "{}", daemon.log());
}

/// The name of the pod of a status line.
fn name(line: &str) -> Option<&str> {
    line.split_whitespace().next()?.strip_prefix("default/")
}

async fn get(node: &Pod, path: &str) -> String {
    http_get(node, SocketAddr::from((Ipv4Addr::LOCALHOST, 15021)), path).await.1
}

/// Sends bytes from `a` to `b` and back.
async fn exchanged(pods: &[Pod]) {
    let app = pods[1].listen(APP);
    let (mut client, mut server, _) = pods[0].meet(&app, pods[1].at(Family::V4, APP)).await;
    exchange(&mut client, &mut server).await;
}
