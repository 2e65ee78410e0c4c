//! Tests of connections to the proxy's own ports from every possible client. None may loop, hang or
//! reach an internal service.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use underpass_tests::{Family, Pod, Proxy, Scene, Suite, tool, until, within};

use crate::{PROFILES, Profile};

use Expected::{Http, Nothing};

/// The expected result of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expected {
    /// A refusal, or an end without data other than TLS records.
    Nothing,
    /// An HTTP response: metrics and readiness are public.
    Http,
}

/// The ports of the proxy with the expected result of a call, as in ztunnel's test
/// `malicious_calls_inpod`, except that metrics and readiness are in the pod and public here.
const TABLE: [(u16, Expected); 7] = [
    // Listeners: outbound, inbound, HBONE.
    (15001, Nothing),
    (15006, Nothing),
    (15008, Nothing),
    // Listeners: metrics, readiness.
    (15020, Http),
    (15021, Http),
    // Ports of ztunnel's DNS and administration, unused here.
    (15053, Nothing),
    (15000, Nothing),
];

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in PROFILES {
        for empty in [false, true] {
            let mesh = if empty { "a mesh without the pod" } else { "its mesh" };
            let name =
                format!("connections to the proxy's own ports reach nothing internal, with {mesh}");
            profile.test(suite, &name, async move || call_every_port(profile, empty).await);
        }
    }
}

async fn call_every_port(profile: Profile, empty: bool) {
    let scene = Scene::new().await;
    let of = |settings| {
        let settings = profile.of(settings).set("timeouts.pool_idle=100ms");
        if empty {
            settings.set(&format!("mesh.file={}", scene.empty_mesh().display()))
        } else {
            settings
        }
    };
    // The kernel (6.18, even without rules) does not deliver the RST of a closed port from the
    // pod's own IPv6 address to ::1, from which OSM's proxy connects.
    let settings = of(scene.server_settings()).set("timeouts.connect=300ms");
    let mut server = scene.server.proxy(&settings).await;
    // Descriptors that the first round opens and keeps, such as the watch of the rules, are no
    // leak. A leak shows in the second round.
    let mut open = usize::MAX;
    for _ in 0..2 {
        every_port(&scene.server, &[scene.server.ips(), loopbacks()].concat()).await;
        // First with a proxy in the client's pod, then without.
        let client = scene.client.proxy(&of(scene.client_settings())).await;
        every_port(&scene.client, &scene.server.ips()).await;
        drop(client);
        scene.client.underpass(&["rules", "remove"]).await.ok();
        every_port(&scene.client, &scene.server.ips()).await;
        until("no connection is left", async || !has_connections(&scene.server).await).await;
        until("all descriptors are closed again", async || descriptors(&server) <= open).await;
        open = descriptors(&server);
    }
    let lines = server.access_lines(0).await;
    // Two rounds, four callers, and two lines for a connection of the proxy to itself.
    assert!(lines.len() <= 2 * 4 * 2 * TABLE.len() * 2, "a call loops: {}", lines.len());
    assert!(server.stop().await.success(), "the proxy did not stop:\n{}", server.log());
}

async fn has_connections(pod: &Pod) -> bool {
    let states = ["exclude", "listening", "exclude", "time-wait"];
    let arguments = [&["--tcp", "--numeric", "--no-header"][..], &states].concat();
    !tool(pod, "ss", &arguments).await.ok().is_empty()
}

fn loopbacks() -> Vec<IpAddr> {
    Family::BOTH.map(Family::loopback).to_vec()
}

async fn every_port(from: &Pod, addresses: &[IpAddr]) {
    for ip in addresses {
        for (port, gets) in TABLE {
            let to = SocketAddr::new(*ip, port);
            assert_eq!(call(from, to).await, gets, "{} calls {to}", from.name());
        }
    }
}

async fn call(pod: &Pod, to: SocketAddr) -> Expected {
    let Ok(mut stream) = pod.dial(to).await else { return Nothing };
    let path = if to.port() == 15020 { "metrics" } else { "healthz/ready" };
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n");
    let mut answer = Vec::new();
    let exchange = async {
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_end(&mut answer).await
    };
    // Any end is allowed, also a RST. The received bytes show the result.
    within(&format!("an end of a call of {to}"), exchange).await.ok();
    if answer.starts_with(b"HTTP/1.1 200 ") {
        return Http;
    }
    /// RFC 8446 section 5.1: the content type of an alert.
    const ALERT: u8 = 21;
    assert!(answer.first().is_none_or(|first| *first == ALERT), "{to} answered {answer:?}");
    Nothing
}

fn descriptors(proxy: &Proxy) -> usize {
    let folder = PathBuf::from(format!("/proc/{}/fd", proxy.pid()));
    std::fs::read_dir(folder).expect("it runs").count()
}
