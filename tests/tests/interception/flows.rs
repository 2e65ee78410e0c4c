//! Tests of connections with the sidecar and OSM profiles, and with every backend.

use std::net::SocketAddr;

use underpass_tests::{APP, Family, HBONE, Mesh, Scene, Suite, exchange, http_get};

use crate::{OSM, PROFILES, Profile, SIDECAR, plain, with_proxies};

const BACKENDS: [&str; 3] = ["nftables", "iptables", "iptables-legacy"];

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in [SIDECAR, OSM] {
        for family in Family::BOTH {
            let name = format!(
                "through the tunnel, the application sees the profile's source address ({family})"
            );
            profile.test(suite, &name, async move || through_the_tunnel(profile, family).await);
            let name =
                format!("a pod that calls itself through its proxy is reached once ({family})");
            profile.test(suite, &name, async move || self_call(profile, family).await);
        }
    }
    suite.test_both_with_users(
        "sidecar: metrics and readiness are never captured",
        metrics_are_not_captured,
    );
    for profile in PROFILES {
        for family in Family::BOTH {
            let name = format!("policies do not apply to the proxy's own services ({family})");
            profile.test(suite, &name, async move || own_services(profile, family).await);
        }
    }
    for backend in BACKENDS {
        for profile in PROFILES {
            let name = format!("with {backend}, plaintext is captured outbound and inbound");
            let body = async move || plaintext(profile, backend).await;
            profile.test(suite, &name, body);
        }
    }
}

async fn through_the_tunnel(profile: Profile, family: Family) {
    let (scene, mut client_proxy, mut server_proxy) = with_proxies(profile).await;
    let app = scene.server.listen(APP);
    let to = scene.app(family);
    let before = (scene.client.counters(), scene.server.counters());
    let (mut client, mut server, peer) = scene.client.meet(&app, to).await;
    exchange(&mut client, &mut server).await;
    assert_eq!(peer.ip(), profile.peer(family, scene.client.ip(family)));
    assert_eq!(client.peer_addr().expect("an address"), to, "the server that the client sees");
    let out = scene.client.connections_since(&before.0);
    let redirected = out.iter().find(|(rule, _)| rule == "redirect-outbound");
    assert_eq!(redirected.map(|(_, count)| *count), Some(1), "{out:?}");
    let arrived = scene.server.connections_since(&before.1);
    assert!(arrived.contains(&("hbone-in".to_owned(), 1)), "{arrived:?}");
    drop((client, server));
    let tunnel = SocketAddr::new(to.ip(), HBONE);
    client_proxy
        .line(&[
            "connection complete",
            &format!("dst.addr={tunnel}"),
            &format!("dst.hbone_addr={to}"),
        ])
        .await;
    let source = scene.pki.id("client").to_string();
    server_proxy.line(&["connection complete", "direction=\"inbound\"", &source]).await;
}

/// With strict mTLS and a policy that allows a single identity, metrics and readiness respond in
/// plaintext only at their configured addresses.
async fn own_services(profile: Profile, family: Family) {
    let scene = Scene::new().await;
    let allow = "[[[{principals: [{exact: cluster.local/ns/default/sa/absent}]}]]]";
    let mesh = Mesh::default().hbone(&scene.client).hbone(&scene.server);
    scene.set_mesh(&mesh.policy("only-absent", "Allow", allow));
    let settings = profile.of(scene.server_settings()).set("proxy.mtls=strict");
    let moved =
        settings.clone().set("metrics.address=[::]:9415").set("readiness.address=[::]:9416");
    for (settings, [metrics, readiness]) in [(settings, [15020, 15021]), (moved, [9415, 9416])] {
        let mut proxy = scene.server.proxy(&settings).await;
        for (port, path) in [(metrics, "/metrics"), (readiness, "/healthz/ready")] {
            let (status, text) = http_get(&scene.client, scene.server.at(family, port), path).await;
            assert_eq!(status, 200, "{port}: {text}");
        }
        scene.client.dial_and_see_reset(scene.app(family)).await;
        proxy.stop().await;
    }
}

/// The proxy connects in plaintext to its own pod on behalf of the application. Capturing that as
/// outbound would loop. The sidecar profile captures it as inbound; OSM exempts all connections of
/// the proxy.
async fn self_call(profile: Profile, family: Family) {
    let scene = Scene::new().await;
    let mesh = Mesh::default().tcp(&scene.client).write(&scene.client, "own-mesh");
    let mut settings =
        profile.of(scene.client_settings()).set(&format!("mesh.file={}", mesh.display()));
    if profile.name == SIDECAR.name {
        // Loopback must be included; otherwise the application's calls to its own pod are direct.
        let include = "127.0.0.0/8,10.0.0.0/8,::1/128,fd00::/8";
        settings = settings.set(&format!("interception.outbound.include_cidrs={include}"));
    }
    let mut proxy = scene.client.proxy(&settings).await;
    let app = scene.client.listen(APP);
    let before = scene.client.counters();
    let own = scene.client.at(family, APP);
    let (mut client, mut server, peer) = scene.client.meet(&app, own).await;
    exchange(&mut client, &mut server).await;
    let matched = scene.client.connections_since(&before);
    drop((client, server));
    let (lines, self_call) = match profile.name {
        "sidecar" => (2, Some((family.rule("2-self-call"), 1))),
        _ => (1, None),
    };
    let expected = match self_call {
        Some(_) => profile.peer(family, own.ip()),
        // OSM's proxy connects as to other pods.
        None => own.ip(),
    };
    assert_eq!(peer.ip(), expected);
    assert!(self_call.is_none_or(|rule| matched.contains(&rule)), "{matched:?}");
    proxy.access_lines(lines).await;
    proxy.stop().await;
    assert_eq!(proxy.access_lines(lines).await.len(), lines, "{}", proxy.log());
}

async fn metrics_are_not_captured(family: Family) {
    let scene = Scene::new().await;
    let mut proxy = scene.server.proxy(&SIDECAR.of(scene.server_settings())).await;
    for (port, path) in [(15020, "/metrics"), (15021, "/healthz/ready")] {
        let before = scene.server.counters();
        let (status, _) = http_get(&scene.client, scene.server.at(family, port), path).await;
        assert_eq!(status, 200);
        let matched = scene.server.connections_since(&before);
        assert_eq!(matched, [(format!("never-{port}"), 1)]);
    }
    proxy.stop().await;
    assert!(
        !proxy.log().contains(" access: "),
        "the proxy handled the connection:\n{}",
        proxy.log()
    );
}

async fn plaintext(profile: Profile, backend: &str) {
    let scene = Scene::new().await;
    let mesh = format!("mesh.file={}", scene.empty_mesh().display());
    let backend = format!("interception.backend={backend}");
    let client = plain(&scene, profile).set(&backend);
    let server = profile.of(scene.server_settings()).set(&backend).set(&mesh);
    let (mut client_proxy, mut server_proxy) =
        tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    let app = scene.server.listen(APP);
    for family in Family::BOTH {
        let to = scene.app(family);
        let (mut client, mut server, peer) = scene.client.meet(&app, to).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), profile.peer(family, scene.client.ip(family)));
        drop((client, server));
        let destination = format!("dst.addr={to}");
        client_proxy.line(&["complete", "direction=\"outbound\"", &destination]).await;
        server_proxy.line(&["complete", "direction=\"inbound\"", &destination]).await;
    }
    for (pod, settings) in [(&scene.client, &client), (&scene.server, &server)] {
        pod.rules("verify", settings).await.ok();
    }
}
