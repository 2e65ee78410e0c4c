//! Tests of names that the control plane looks up on demand.

use std::net::IpAddr;

use underpass_config::{DeltaRequest, Resource, ResourceType};
use underpass_tests::{
    CLIENT, Family, Scene, ScriptedControlPlane, Settings, Suite, field, resource, response,
};

use crate::scene::{DnsScene, SERVICE, VIP};

/// istiod's port.
const PORT: u16 = 15012;
/// The address of `*.wild.example`.
const WILD: &str = "10.99.0.2";

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("names are looked up on demand, although none is subscribed", names);
}

async fn names() {
    let scene = Scene::new().await;
    let mut plane = ScriptedControlPlane::start(&scene.server, PORT, &scene.pki);
    plane.set_first(&[response(ResourceType::Authorization, Vec::new(), &[])]);
    let settings = Settings::new(CLIENT).identity(&scene.client_files);
    let settings = settings.section(&plane.settings()).set("mesh.xds.on_demand=true");
    let (scene, mut proxy) = DnsScene::with(scene, settings).await;
    tokio::select! {
        () = answer(&mut plane) => {}
        () = ask(&scene) => {}
    }
    // The control plane does not answer any more. Names that are known stay known.
    let found = scene.dig(Family::V4, &["+tries=1", "unanswered.example"]).await;
    assert!(found.contains("status: SERVFAIL"), "{found}");
    proxy.line(&["a DNS query failed", "unanswered.example", "reason=\"lookup\""]).await;
    let found = scene.dig(Family::V4, &["+short", SERVICE]).await;
    assert_eq!(found.trim(), VIP);
}

async fn ask(scene: &DnsScene) {
    for (name, kind, expected) in [
        ("web", "A", VIP),
        (SERVICE, "A", VIP),
        ("web.default", "AAAA", "fd99::1"),
        ("a.wild.example", "A", WILD),
        ("other.example", "A", "192.0.2.7"),
    ] {
        for protocol in ["+notcp", "+tcp"] {
            let found = scene.dig(Family::V4, &["+short", protocol, name, kind]).await;
            assert_eq!(found.trim(), expected, "{protocol} {name} {kind}");
        }
    }
    let missing = scene.dig(Family::V4, &["missing.example"]).await;
    assert!(missing.contains("status: NXDOMAIN"), "{missing}");
    // The resolver of glibc asks with each domain of the search path.
    for (name, expected) in [("web.default", VIP), ("four.example", "192.0.2.4")] {
        let found = scene.with_resolv_conf(&["getent", "ahostsv4", name]).await;
        assert!(found.starts_with(expected), "{name}: {found}");
    }
}

/// Answers every lookup: the mesh has two services, and no other name.
async fn answer(plane: &mut ScriptedControlPlane) {
    let services = [service(SERVICE, &[VIP, "fd99::1"]), service("*.wild.example", &[WILD])];
    loop {
        let DeltaRequest { type_url, resource_names_subscribe: asked, .. } = plane.request().await;
        if type_url != ResourceType::Address.url() {
            continue;
        }
        let is_service = |name: &str| services.iter().any(|service| service.name == name);
        let known = services.iter().filter(|service| asked.contains(&service.name)).cloned();
        let absent = asked.iter().map(String::as_str).filter(|name| !is_service(name));
        let absent: Vec<_> = absent.filter(|name| *name != "*").collect();
        let known: Vec<_> = known.collect();
        if !known.is_empty() || !absent.is_empty() {
            plane.send(&response(ResourceType::Address, known, &absent));
        }
    }
}

/// A service of the namespace `default`.
fn service(hostname: &str, vips: &[&str]) -> Resource {
    let address = |vip: &&str| match vip.parse().expect("an address") {
        IpAddr::V4(ip) => field(4, field(2, ip.octets())),
        IpAddr::V6(ip) => field(4, field(2, ip.octets())),
    };
    let addresses: Vec<_> = vips.iter().flat_map(address).collect();
    let service = [field(1, "web"), field(2, "default"), field(3, hostname), addresses];
    let name = format!("default/{hostname}");
    resource(ResourceType::Address, &name, field(2, service.concat()))
}
