//! End-to-end tests of the DNS proxy with the resolvers of applications (dig, glibc, Python) and
//! dnsmasq as the pod's server.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod node;
mod on_demand;
mod restart;
mod scene;

use std::process::ExitCode;

use underpass_tests::{Family, Suite};

use scene::{DnsScene, SERVICE, VIP};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test_both("ambient: the mesh answers its names, the pod's server the others", |family| {
        both_sources("ambient", family)
    });
    suite.test_both_with_users(
        "sidecar: the mesh answers its names, the pod's server the others",
        |family| both_sources("sidecar", family),
    );
    suite.test("glibc and Python find names by the search path", resolvers);
    suite.test("answers of every size arrive over UDP and TCP", sizes);
    suite.test("a query without an answer is logged with its name, and counted", failures);
    suite.test("a local resolver is not captured", local_resolver);
    restart::add_tests(&mut suite);
    node::add_tests(&mut suite);
    on_demand::add_tests(&mut suite);
    suite.run()
}

async fn both_sources(profile: &str, family: Family) {
    let (scene, mut proxy) = DnsScene::start(&format!("interception.profile={profile}")).await;
    for protocol in ["+notcp", "+tcp"] {
        for (name, kind, expected) in [
            (SERVICE, "A", VIP),
            ("web", "A", VIP),
            (SERVICE, "AAAA", "fd99::1"),
            ("other.example", "A", "192.0.2.7"),
            ("other.example", "AAAA", "2001:db8::7"),
        ] {
            let found = scene.dig(family, &["+short", protocol, name, kind]).await;
            assert_eq!(found.trim(), expected, "{protocol} {name} {kind}");
        }
        let missing = scene.dig(family, &[protocol, "missing.example"]).await;
        assert!(missing.contains("status: NXDOMAIN"), "{missing}");
    }
    assert!(proxy.stop().await.success(), "{}", proxy.log());
}

async fn resolvers() {
    let (scene, _proxy) = DnsScene::start("interception.profile=ambient").await;
    for name in ["web", "web.default", SERVICE] {
        let found = scene.with_resolv_conf(&["getent", "ahostsv4", name]).await;
        assert!(found.starts_with(VIP), "{name}: {found}");
    }
    let found = scene.with_resolv_conf(&["getent", "ahosts", "other.example"]).await;
    assert!(found.contains("192.0.2.7") && found.contains("2001:db8::7"), "{found}");
    let script = "import socket, sys\n\
                  for name in sys.argv[1:]:\n    print(socket.getaddrinfo(name, 80)[0][4][0])";
    let found = scene.with_resolv_conf(&["python3", "-c", script, "web", "four.example"]).await;
    assert!(found.ends_with("192.0.2.4\n"), "{found}");
}

async fn sizes() {
    let (scene, _proxy) = DnsScene::start("interception.profile=ambient").await;
    for (name, count) in [("n10.example", 10), ("n100.example", 100), ("n3000.example", 3000)] {
        for options in [&["+tcp"][..], &[], &["+noedns"]] {
            let arguments = [&["+short", name], options].concat();
            let found = scene.dig(Family::V4, &arguments).await;
            assert_eq!(found.lines().count(), count, "{name} {options:?}");
        }
    }
    for (options, size) in [(&["+noedns"][..], 512), (&["+bufsize=1232"], 1232)] {
        let arguments = [&["+ignore", "n100.example"], options].concat();
        let message = scene.dig(Family::V4, &arguments).await;
        assert!(message.contains("flags: qr tc"), "{options:?}: {message}");
        let received = message.lines().find_map(|line| line.strip_prefix(";; MSG SIZE  rcvd: "));
        let received: usize = received.expect("a size").parse().expect("a number");
        assert!(received <= size, "{received} > {size}");
    }
}

async fn failures() {
    let (scene, mut proxy) = DnsScene::start("interception.profile=ambient").await;
    scene.write_resolv_conf("nameserver 192.0.2.1\noptions timeout:1 attempts:1\n");
    let found = scene.until_dig("SERVFAIL", &["+tries=1", "+timeout=5", "lost.example"]).await;
    assert!(found.contains("status: SERVFAIL"), "{found}");
    let line = proxy.line(&["a DNS query failed", "lost.example"]).await;
    assert!(line.contains("from 192.0.2.1") && line.contains("hint"), "{line}");
    scene.dig(Family::V4, &[SERVICE]).await;
    let metrics = scene.client.metrics().await;
    let sum = |name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels).unwrap_or_default();
    assert!(sum("underpass_dns_answers_total", &[("source", "none")]) >= 1.0);
    assert!(sum("underpass_dns_answers_total", &[("source", "mesh"), ("code", "NOERROR")]) >= 1.0);
    assert!(sum("istio_dns_upstream_failures_total", &[("request_query_type", "A")]) >= 1.0);
    assert!(sum("istio_dns_requests_total", &[("request_protocol", "udp")]) >= 2.0);
}

/// A resolver on the loopback interface answers applications itself. Its queries are captured.
async fn local_resolver() {
    let (scene, _proxy) = DnsScene::start("interception.profile=ambient").await;
    let server = format!("--server={}", scene.server.ip(Family::V4));
    let _local = scene.dnsmasq_in(&scene.client, &["--listen-address=127.0.0.1", &server]).await;
    for (name, expected) in [(SERVICE, VIP), ("other.example", "192.0.2.7")] {
        let arguments = ["@127.0.0.1", "+short", name, "A"];
        let found = underpass_tests::tool(&scene.client, "dig", &arguments).await.ok();
        assert_eq!(found.trim(), expected, "{name}");
    }
}
