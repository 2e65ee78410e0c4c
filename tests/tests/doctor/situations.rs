//! Broken situations of the host, the rules, the network and the control plane.

use std::fs;

use underpass_tests::{CLIENT, Family, Scene, ScriptedControlPlane, Settings, Suite, tool, until};

use crate::{doctor, doctor_of_proxy, other_authority, without_dns};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("a firewall on the peer's HBONE port is named", firewall_is_named);
    suite.test("flushed rules are named", flushed_rules_are_named);
    suite.test("a rule that sets the proxy's mark is named", foreign_rule_is_named);
    suite.test("a control plane that does not listen is named", absent_control_plane_is_named);
    suite.test("a control plane with other roots is named", untrusted_control_plane_is_named);
    suite.test("a name server that does not answer is named", silent_name_server_is_named);
    suite.test("a proxy that runs another program is named", stale_program_is_named);
    suite.test("failed connections of the proxy are counted", failed_connections_are_counted);
    suite.test("mistakes of the settings and the mesh file are named", mistakes_are_named);
    suite.test_with_users("the peers are reached past the rules of the sidecar profile", sidecar);
}

async fn nft(scene: &Scene, command: &str) {
    tool(&scene.server, "nft", &[command]).await.ok();
}

async fn firewall_is_named() {
    let scene = Scene::new().await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    nft(
        &scene,
        "table inet firewall {\nchain in {\ntype filter hook input priority -400\ntcp dport 15008 drop\n}\n}",
    )
    .await;
    let settings = without_dns(&scene.client, scene.client_settings());
    let findings = doctor(&scene.client, &settings).await;
    assert_eq!(findings.failures(), ["peers-connect"], "{findings:?}");
    findings.assert("peers-connect", "failure", "connect_timeout: no answer from");
    findings.assert("peers-connect", "failure", "no firewall drops packets to its HBONE port");
}

async fn flushed_rules_are_named() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = without_dns(pod, scene.client_settings()).set("interception.repair=false");
    let _proxy = pod.proxy(&settings).await;
    tool(pod, "nft", &["flush", "ruleset"]).await.ok();
    let findings = doctor_of_proxy(pod).await;
    findings.assert("rules-installed", "failure", "not those of the running proxy");
    findings.assert("rules-installed", "failure", "enter-mangle-output");
}

async fn foreign_rule_is_named() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = without_dns(pod, scene.client_settings());
    let _proxy = pod.proxy(&settings).await;
    let rule = "table inet other {\nchain theirs {\ntype route hook output priority -200\nmeta mark set 0x539\n}\n}";
    tool(pod, "nft", &[rule]).await.ok();
    let failed = async || {
        let findings = doctor_of_proxy(pod).await;
        findings.assert("rules-foreign", "failure", "table inet other, chain theirs");
        findings.failures().contains(&"rules-self-test")
    };
    until("the self-test of the proxy has failed", failed).await;
    let findings = doctor_of_proxy(pod).await;
    findings.assert("proxy-ready", "failure", "the self-test of the rules failed");
}

async fn absent_control_plane_is_named() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let roots = scene.pki.roots().display().to_string();
    let address = scene.server.at(Family::V4, 15012);
    let settings = Settings::new(CLIENT)
        .identity(&scene.client_files)
        .section(&format!("mesh: {{xds: {{address: \"https://{address}\", roots: {roots:?}}}}}"));
    let findings = doctor(pod, &without_dns(pod, settings)).await;
    assert_eq!(findings.failures(), ["control-plane"], "{findings:?}");
    findings.assert("control-plane", "failure", "check that the control plane runs");
}

async fn untrusted_control_plane_is_named() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let other = other_authority(&scene);
    let plane = ScriptedControlPlane::start(&scene.server, 15012, &scene.pki);
    let settings = Settings::new(CLIENT).identity(&scene.client_files).section(&plane.settings());
    let settings = settings.set(&format!("mesh.xds.roots={}", other.roots().display()));
    let findings = doctor(pod, &without_dns(pod, settings)).await;
    findings.assert("control-plane", "failure", "mesh.xds.roots contains the root");
}

async fn silent_name_server_is_named() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let file = pod.folder().join("silent.conf");
    let server = scene.server.at(Family::V4, 53).ip();
    fs::write(&file, format!("nameserver {server}\n")).expect("written");
    // The server's pod drops the queries.
    nft(
        &scene,
        "table inet firewall {\nchain in {\ntype filter hook input priority 0\nudp dport 53 drop\n}\n}",
    )
    .await;
    let settings = without_dns(pod, scene.client_settings());
    let settings = settings.set(&format!("dns.resolv_conf={}", file.display()));
    let findings = doctor(pod, &settings).await;
    findings.assert("dns-servers", "warning", &server.to_string());
    // The proxy answers the workload's queries with the help of the server.
    let findings = doctor(pod, &settings.set("interception.dns=capture")).await;
    findings.assert("dns-servers", "failure", &server.to_string());
}

async fn stale_program_is_named() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = without_dns(pod, scene.client_settings());
    // Another program file, as if it had been replaced since the start of the proxy.
    let script = "copy=\"${0%/*}/stale\"\ncat \"$UNDERPASS\" >\"$copy\"\necho >>\"$copy\"\nchmod 755 \"$copy\"\nexec \"$copy\" \"$@\"";
    let _proxy = pod.try_proxy_through(script, &settings).await.expect("the proxy starts");
    let findings = doctor_of_proxy(pod).await;
    findings.assert("version-running", "warning", "runs another program than this one");
}

async fn failed_connections_are_counted() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let settings = without_dns(pod, scene.client_settings());
    let mut proxy = pod.proxy(&settings).await;
    // There is no proxy in the server's pod.
    pod.dial(scene.app(Family::V4)).await.ok();
    proxy.access_lines(1).await;
    let findings = doctor_of_proxy(pod).await;
    findings.assert("proxy-failures", "warning", "most of them by connect");
    findings.assert("peers-connect", "failure", ": connect: ");
}

async fn mistakes_are_named() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let mesh = pod.folder().join("broken.yaml");
    fs::write(&mesh, "workloads: [{name: a, workloadIps: [nowhere]}]\n").expect("written");
    let settings = without_dns(pod, scene.client_settings());
    let settings = settings.set("proxy.workers=none").set(&format!("mesh.file={}", mesh.display()));
    let findings = doctor(pod, &settings).await;
    for part in ["proxy.workers", "workloads[0].workloadIps[0]"] {
        findings.assert("configuration", "failure", part);
    }
}

async fn sidecar() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let profile = |settings: Settings| settings.set("interception.profile=sidecar");
    let settings = profile(without_dns(pod, scene.client_settings()));
    let _server = scene.server.proxy(&profile(scene.server_settings())).await;
    pod.rules("install", &settings).await.ok();
    // No proxy runs in the pod: a captured connection would be refused.
    let findings = doctor(pod, &settings).await;
    assert_eq!(findings.failures(), [""; 0], "{findings:?}");
    findings.assert("peers-connect", "ok", "tunnels to all 1 peers");
}
