//! Tests of a pod that calls itself: by its address, by loopback, and by a service whose only
//! endpoint is the pod (hairpin).

use std::net::SocketAddr;

use underpass_tests::{APP, Family, Mesh, Pod, Proxy, Scene, Suite, exchange, read_to_end};

use crate::{PROFILES, Profile};

const SERVICE: &str =
    "name: web, hostname: web.example, vips: [\"/10.96.0.1\", \"/fd96::1\"], ports: {80: 8080}";
const ENDPOINT: &str = ", services: {default/web.example: {80: 8080}}";

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in PROFILES {
        for protocol in ["HBONE", "TCP"] {
            profile.test(
                suite,
                &format!("a pod with protocol {protocol} reaches itself by each of its addresses"),
                async move || reaches_itself(profile, protocol).await,
            );
        }
    }
}

async fn reaches_itself(profile: Profile, protocol: &str) {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let mesh = Mesh::default().workload_with(pod.name(), &pod.ips(), protocol, ENDPOINT);
    scene.set_mesh(&mesh.service(SERVICE));
    let mut proxy = pod.proxy(&profile.of(scene.client_settings())).await;
    let app = pod.listen(APP);
    for family in Family::BOTH {
        let service = if family == Family::V4 { "10.96.0.1:80" } else { "[fd96::1]:80" };
        let service: SocketAddr = service.parse().expect("an address");
        for to in [pod.at(family, APP), SocketAddr::new(family.loopback(), APP), service] {
            let (mut client, mut server, peer) = pod.meet(&app, to).await;
            exchange(&mut client, &mut server).await;
            assert_eq!(
                client.peer_addr().expect("an address"),
                to,
                "the server that the client sees"
            );
            assert!(is_own(pod, family, peer), "the application sees {peer} when {to} is called");
            drop(client);
            read_to_end(&mut server).await;
        }
    }
    proxy.stop().await;
    let lines = proxy.access_lines(2).await;
    // Each call has at most one outbound and one inbound line.
    assert!(lines.len() <= 2 * 2 * 3, "a call loops: {lines:#?}");
    assert_eq!(failed_connections(&proxy), 0, "{}", proxy.log());
}

fn failed_connections(proxy: &Proxy) -> usize {
    proxy.count(&["connection failed"])
}

/// Whether the address is the pod's, or one from which its proxy connects.
fn is_own(pod: &Pod, family: Family, peer: SocketAddr) -> bool {
    let last_hops = ["127.0.0.1", "127.0.0.6", "::1", "::6"];
    peer.ip() == pod.ip(family)
        || (peer.is_ipv6() == (family == Family::V6)
            && last_hops.contains(&&*peer.ip().to_string()))
}
