//! End-to-end tests of `underpass status` and `underpass connections`.
#![expect(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::process::ExitCode;

use serde_json::Value;
use underpass_tests::{
    APP, Family, Mesh, Pki, Pod, Proxy, Scene, Settings, Suite, World, exchange, finish, tool,
    until,
};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("status of a healthy proxy names identity, rules, mesh, tunnels", healthy);
    suite.test("problems are named with a hint, and the exit code is 3", problems);
    suite.test("a control plane that does not answer is named while it is awaited", control_plane);
    suite.test("open and ended connections are listed with bytes and times", listed);
    suite.test("a denied connection is listed with its policy and a hint", denied);
    suite.test("failures are counted by reason, and filters select connections", failures);
    suite.test("a followed list shows connections when they open and when they end", followed);
    suite.test("status lists a DNS name that failed to resolve", failed_name);
    suite.test("status of a node lists its pods, and one pod alone", node);
    suite.test("without a proxy both commands name the remedy", no_proxy);
    suite.run()
}

/// The status as JSON, with this exit code.
async fn status(pod: &Pod, exit_code: i32) -> Value {
    let (printed, _) = pod.underpass(&["status", "-o", "json"]).await.exited(exit_code);
    serde_json::from_str(&printed).expect("JSON")
}

/// The connections that match the options.
async fn connections(pod: &Pod, options: &[&str]) -> Vec<Value> {
    let arguments = [&["connections", "-o", "json"], options].concat();
    let printed = pod.underpass(&arguments).await.ok();
    printed.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// A value of a JSON document by the path of its keys.
fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or_else(|| panic!("{value} has no {pointer}"))
}

/// Whether the list has an object with these fields.
fn has(list: &Value, fields: &[(&str, Value)]) -> bool {
    let matches = |one: &Value| fields.iter().all(|(key, value)| one.get(key) == Some(value));
    list.as_array().expect("a list").iter().any(matches)
}

async fn healthy() {
    let (scene, _client_proxy, _server_proxy) = Scene::with_proxies().await;
    let (mut client, mut server) = scene.connected(Family::V4).await;
    let of_client = status(&scene.client, 0).await;
    assert_eq!(at(&of_client, "/healthy"), true, "{of_client}");
    assert_eq!(at(&of_client, "/name"), "default/client");
    assert_eq!(at(&of_client, "/readiness"), "ready");
    assert_eq!(at(&of_client, "/identities/0/spiffe_id"), &*scene.pki.id("client").to_string());
    assert_eq!(at(&of_client, "/identities/0/state"), "valid");
    assert!(at(&of_client, "/identities/0/expires_in_seconds").as_i64() > Some(60), "{of_client}");
    assert_eq!(at(&of_client, "/rules/state"), "verified");
    assert_eq!(at(&of_client, "/rules/self_test"), "passed");
    assert_eq!(at(&of_client, "/mesh/workloads"), 2);
    assert_eq!(at(&of_client, "/connections/outbound_hbone"), 1);
    assert_eq!(at(&of_client, "/connections/oldest/0/destination/workload"), "server");
    let peer = at(&of_client, "/tunnels/outbound/0");
    assert_eq!(at(peer, "/streams"), 1, "{of_client}");
    assert_eq!(at(peer, "/identities/0"), &*scene.pki.id("server").to_string());

    let of_server = status(&scene.server, 0).await;
    assert_eq!(at(&of_server, "/connections/inbound_hbone"), 1, "{of_server}");
    let peer = at(&of_server, "/tunnels/inbound/0");
    assert_eq!(at(peer, "/identity"), &*scene.pki.id("client").to_string());
    assert_eq!(at(peer, "/tunnels"), 1);

    let text = scene.client.underpass(&["status"]).await.ok();
    for part in [
        "default/client: healthy\n",
        "ambient: verified, self-test passed",
        "outbound: 1 HBONE, 0 TCP; inbound: 0 HBONE, 0 TCP;",
        "1 to 1 peer, 0 of 0 peers",
        "Oldest connections\n",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert!(!text.contains('\u{1b}'), "no colours without a terminal");
    exchange(&mut client, &mut server).await;
}

async fn problems() {
    let (scene, _proxy) = Scene::with_plain_client(&[]).await;
    status(&scene.client, 0).await;
    fs::write(scene.empty_mesh(), "workloads: 5\n").expect("a file");
    until("the broken mesh file is reported", async || {
        !scene.client.underpass(&["status"]).await.status.success()
    })
    .await;
    let (text, error) = scene.client.underpass(&["status"]).await.exited(3);
    assert!(text.contains("default/client: 1 problem"), "{text}");
    assert!(text.contains("! mesh: the last change of the mesh file is not in use:"), "{text}");
    assert!(error.contains("the proxy is not healthy"), "{error}");
    assert!(has(at(&status(&scene.client, 3).await, "/problems"), &[("part", "mesh".into())]));
    fs::write(scene.empty_mesh(), "workloads: []\n").expect("a file");
    until("the corrected mesh file is reported", async || {
        scene.client.underpass(&["status"]).await.status.success()
    })
    .await;
}

async fn control_plane() {
    let scene = Scene::new().await;
    let settings = Settings::new("client").identity(&scene.client_files);
    let roots = scene.pki.roots();
    let settings = settings
        .section(&format!("mesh: {{xds: {{address: 'https://127.0.0.1:1', roots: {roots:?}}}}}"));
    let arguments = settings.arguments(&scene.client);
    let arguments: Vec<_> =
        ["run"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
    let _proxy = scene.client.background(underpass_tests::binary(), &arguments);
    let mut text = String::new();
    until("status names the control plane", async || {
        text = scene.client.underpass(&["status"]).await.out;
        text.contains("no stream to the control plane")
    })
    .await;
    assert!(text.contains("waiting for the control plane (mesh.xds)"), "{text}");
    assert!(text.contains("Connection refused"), "{text}");
}

async fn listed() {
    let (scene, mut client_proxy, _server_proxy) = Scene::with_proxies().await;
    let (mut client, mut server) = scene.connected(Family::V4).await;
    let open = connections(&scene.client, &["--state", "open"]).await;
    let [open] = open.as_slice() else { panic!("{open:?}") };
    for (pointer, expected) in [
        ("/verdict", Value::from("allowed")),
        ("/pod", "default/client".into()),
        ("/direction", "outbound".into()),
        ("/protocol", "hbone".into()),
        ("/bytes_received", 7.into()),
        ("/bytes_sent", 6.into()),
        ("/source/workload", "client".into()),
        ("/destination/workload", "server".into()),
        ("/destination/address", scene.app(Family::V4).to_string().into()),
        ("/destination/identity", scene.pki.id("server").to_string().into()),
    ] {
        assert_eq!(at(open, pointer), &expected, "{open}");
    }
    let (first_byte, duration) = (at(open, "/first_byte_ms"), at(open, "/duration_ms"));
    assert!(first_byte.as_f64() > Some(0.0) && duration.as_f64() >= first_byte.as_f64(), "{open}");
    finish(&mut client, &mut server).await;
    client_proxy.access_lines(1).await;
    let all = connections(&scene.client, &[]).await;
    let [closed] = all.as_slice() else { panic!("{all:?}") };
    assert_eq!(at(closed, "/state"), "closed");
    assert_eq!((closed.get("reason"), closed.get("error")), (None, None), "{closed}");
    assert!(closed.get("ended").is_some(), "{closed}");
    let text = scene.client.underpass(&["connections"]).await.ok();
    assert!(text.contains("allowed outbound hbone default/client -> default/server:"), "{text}");
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("7 B from the client, 6 B to it"), "{text}");
}

async fn denied() {
    let scene = Scene::new().await;
    let client = scene.pki.id("client").to_string();
    let from_client =
        format!("[[[{{principals: [{{exact: {}}}]}}]]]", client.replace("spiffe://", ""));
    let mesh = Mesh::default().hbone(&scene.client).hbone(&scene.server);
    scene.set_mesh(&mesh.policy("no-client", "Deny", &from_client));
    let (of_client, of_server) = (scene.client_settings(), scene.server_settings());
    let mut client_proxy = scene.client.proxy(&of_client).await;
    let mut server_proxy = scene.server.proxy(&of_server).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    server_proxy.access_lines(1).await;
    let denied = connections(&scene.server, &["--verdict", "denied"]).await;
    let [denied] = denied.as_slice() else { panic!("{denied:?}") };
    for (pointer, expected) in [
        ("/policy", "default/no-client"),
        ("/state", "failed"),
        ("/reason", "policy_denied"),
        ("/source/identity", &*client),
    ] {
        assert_eq!(at(denied, pointer), expected, "{denied}");
    }
    assert!(at(denied, "/hint").as_str().is_some(), "{denied}");
    client_proxy.access_lines(1).await;
    let refused = connections(&scene.client, &["--verdict", "denied"]).await;
    assert_eq!(refused.len(), 1, "the client's proxy lists the peer's refusal");
}

async fn failures() {
    let (scene, mut client_proxy, _server_proxy) = Scene::with_proxies().await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    client_proxy.access_lines(2).await;
    let of_server = status(&scene.server, 0).await;
    let failure = at(&of_server, "/failures/connections/0");
    assert_eq!((at(failure, "/reason"), at(failure, "/count")), (&"connect".into(), &2.into()));
    assert!(at(failure, "/last/hint").as_str().is_some(), "{failure}");
    let text = scene.server.underpass(&["status"]).await.ok();
    assert!(text.contains("Failures in the last 5 minutes\n       2 connect\n"), "{text}");
    let port = scene.app(Family::V4).port().to_string();
    for (options, expected) in [
        (&["--reason", "connect"][..], 2),
        (&["--reason", "policy_denied"], 0),
        (&["--from", "default/client", "--port", &port], 2),
        (&["--from", "default/server"], 0),
        (&["--verdict", "failed", "--last", "1"], 1),
        (&["--verdict", "allowed"], 0),
        (&["--protocol", "hbone", "--direction", "inbound", "--since", "5m"], 2),
        (&["--pod", "default/server"], 2),
        (&["--pod", "default/client"], 0),
    ] {
        assert_eq!(connections(&scene.server, options).await.len(), expected, "{options:?}");
    }
    scene.server.underpass(&["connections", "--verdict", "no"]).await.exited(2);
}

async fn followed() {
    let (scene, mut proxy) = Scene::with_plain_client(&[]).await;
    let app = scene.server.listen(APP);
    let namespace = scene.client.namespace().id().inode();
    let socket = format!("/run/underpass/admin-{namespace}.sock");
    let follow = scene.client.background(
        underpass_tests::binary(),
        &["connections", "--follow", "-o", "json", "--last", "0", "--socket", &socket],
    );
    let mut follow = follow.lines();
    // Until the command follows, its connections are missing.
    let opened = async || {
        let (client, server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
        (client, server)
    };
    let (mut client, mut server) = opened().await;
    let line = loop {
        tokio::select! {
            line = follow.next() => break line,
            () = async { drop(opened().await); } => {}
        }
    };
    let first: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(at(&first, "/pod"), "default/client", "{first}");
    exchange(&mut client, &mut server).await;
    let from = client.local_addr().expect("an address");
    finish(&mut client, &mut server).await;
    proxy.line(&["connection complete"]).await;
    let ended = loop {
        let line: Value = serde_json::from_str(&follow.next().await).expect("JSON");
        let is_same = at(&line, "/source/address") == &*from.to_string();
        if is_same && at(&line, "/state") == "closed" {
            break line;
        }
    };
    assert_eq!(at(&ended, "/bytes_received"), 7, "{ended}");
}

async fn failed_name() {
    let scene = Scene::new().await;
    let resolv_conf = scene.client.folder().join("resolv.conf");
    fs::write(&resolv_conf, "# no server\n").expect("a file");
    let settings = scene.client_settings().set("interception.dns=capture");
    let settings = settings.set(&format!("dns.resolv_conf={}", resolv_conf.display()));
    let _proxy = scene.client.proxy(&settings).await;
    let server = format!("@{}", scene.server.ip(Family::V4));
    tool(&scene.client, "dig", &[&server, "+tries=1", "missing.example"]).await.ok();
    let status = status(&scene.client, 0).await;
    let failure = at(&status, "/failures/dns/0");
    for (pointer, expected) in [
        ("/name", "missing.example"),
        ("/type", "A"),
        ("/pod", "default/client"),
        ("/reason", "upstream"),
        ("/error", "the pod has no DNS server"),
    ] {
        assert_eq!(at(failure, pointer), expected, "{failure}");
    }
    let text = scene.client.underpass(&["status"]).await.ok();
    assert!(text.contains("missing.example A, pod default/client"), "{text}");
}

async fn node() {
    let mut world = World::new();
    let (mut node, mut a) = (world.pod("node").await, world.pod("a").await);
    world.wire(&mut node, &mut a).await;
    let (pki, folder) = (Pki::new(world.folder()), world.folder().join("pods"));
    fs::create_dir_all(&folder).expect("a folder");
    a.write_facts(&folder, "");
    let second = a.facts("").replace("name: a", "name: b").replace("uid: a", "uid: b");
    fs::write(folder.join("b.yaml"), second).expect("a file");
    let mesh = Mesh::default().hbone(&a).write(&node, "mesh");
    let identity = format!("identity: {{local_ca: {:?}}}", pki.dir());
    let settings = Settings::node("node", &format!("directory: {folder:?}"));
    let settings = settings.section(&identity).mesh(&mesh);
    let mut daemon: Proxy = node.proxy(&settings).await;
    daemon.line(&["pod enrolled", "default/a"]).await;
    let mut all = Value::Null;
    until("the second pod of the namespace is refused", async || {
        all = status(&node, 3).await;
        has(at(&all, "/pods"), &[("pod", "default/b".into()), ("state", "failed".into())])
    })
    .await;
    assert_eq!((at(&all, "/command"), at(&all, "/name")), (&"node".into(), &"node".into()));
    assert!(has(at(&all, "/pods"), &[("pod", "default/a".into()), ("state", "serving".into())]));
    assert!(has(at(&all, "/problems"), &[("part", "pod".into()), ("pod", "default/b".into())]));
    let identity = pki.id("a").to_string();
    assert!(has(at(&all, "/identities"), &[("spiffe_id", (&*identity).into())]), "{all}");

    let of_pod = async |pod: &str, code| {
        node.underpass(&["status", "--pod", pod, "-o", "json"]).await.exited(code)
    };
    let (one, _) = of_pod("default/a", 0).await;
    let one: Value = serde_json::from_str(&one).expect("JSON");
    assert_eq!(at(&one, "/pods").as_array().map(Vec::len), Some(1), "{one}");
    let (_, error) = of_pod("default/c", 1).await;
    assert!(error.contains("no pod default/c is known to this proxy"), "{error}");
    let text = node.underpass(&["status"]).await.exited(3).0;
    assert!(text.contains("Pods          1 served of 2"), "{text}");
}

async fn no_proxy() {
    let scene = Scene::new().await;
    for command in ["status", "connections"] {
        let (_, error) = scene.client.underpass(&[command]).await.exited(1);
        assert!(error.contains("error: no proxy listens at"), "{error}");
        assert!(error.contains("hint: start the proxy"), "{error}");
    }
}
