//! End-to-end tests of readiness, metrics with ztunnel's names and labels, and the access log.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;

use underpass_tests::{
    APP, Family, Mesh, Metrics, Proxy, Scene, Server, Suite, checker, exchange, finish, http_get,
    tool, until,
};

const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const FAILED: &str = "istio_tcp_connections_failed_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const SENT: &str = "istio_tcp_sent_bytes_total";
const OPEN: &str = "istio_tcp_sockets_open";

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test("the endpoints answer known requests and reject others", endpoints);
    suite.test_both("both proxies count a tunnelled connection with both identities", tunnelled);
    suite.test("a plaintext connection is counted without identities", plain);
    suite.test("a failed connection is counted with its reason", failed);
    suite.test_both(
        "a peer at a neighbour's address is not attributed to the neighbour",
        other_address,
    );
    suite.test_both("the workload of a plaintext client is logged as claimed", plaintext_client);
    suite.test("connections beyond the limit of label sets are counted as overflow", overflow);
    suite.test("idle label sets are removed, and later count from zero", idle_label_sets);
    suite.test("omitted labels are absent from the metrics", omitted_labels);
    suite.test("promtool accepts the metrics of a proxy", checked_by_promtool);
    suite.test("durations, handshakes and the use of the pool are measured", durations);
    suite.test("OpenMetrics has exemplars with the trace id of the access log", open_metrics);
    suite.test("bytes are counted while a connection is open", counted_while_open);
    suite.test("a connection is logged in one line with ztunnel's names", logged_in_one_line);
    suite.test("every JSON log line is an object with the field names of the plain format", json);
    suite.test("access=off disables the access log", access_log_off);
    suite.test(
        "log lines lost because of a stalled reader are counted and reported",
        stalled_log_reader,
    );
    suite.run()
}

/// Opens, uses and ends a connection: 7 bytes to the server, 6 bytes back.
async fn connection(scene: &Scene, family: Family) -> SocketAddr {
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(family)).await;
    let from = client.local_addr().expect("an address");
    exchange(&mut client, &mut server).await;
    finish(&mut client, &mut server).await;
    from
}

async fn plain_scene() -> (Scene, Proxy) {
    let scene = Scene::new().await;
    let mesh = scene.empty_mesh();
    let settings = scene.client_settings().set(&format!("mesh.file={}", mesh.display()));
    let proxy = scene.client.proxy(&settings).await;
    (scene, proxy)
}

async fn endpoints() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for ip in loopback {
        for (port, path, status) in [
            (15021, "/healthz/ready", 200),
            (15021, "/metrics", 404),
            (15021, "/", 404),
            (15020, "/metrics", 200),
            (15020, "/stats/prometheus", 200),
            (15020, "/healthz/ready", 404),
        ] {
            let at = SocketAddr::new(ip, port);
            assert_eq!(http_get(&scene.client, at, path).await.0, status, "{at}{path}");
        }
    }
    let post = "-s -o /dev/null -w %{http_code} -X POST http://127.0.0.1:15020/metrics";
    let post: Vec<_> = post.split(' ').collect();
    assert_eq!(tool(&scene.client, "curl", &post).await.ok(), "405");
    let metrics = scene.client.metrics().await;
    assert_eq!(metrics.sum("istio_build", &[("component", "ztunnel")]), Some(1.0));
    assert_eq!(metrics.sum("underpass_build_info", &[]), Some(1.0));
}

fn assert_counted(metrics: &Metrics, labels: &[(&str, &str)]) {
    for (name, expected) in [(OPENED, 1.0), (CLOSED, 1.0), (RECEIVED, 7.0), (SENT, 6.0)] {
        assert_eq!(
            metrics.sum(name, labels),
            Some(expected),
            "{name} {labels:?}\n{}",
            metrics.text()
        );
        assert_eq!(metrics.sum(name, &[]), Some(expected), "{name} of all\n{}", metrics.text());
    }
    assert_eq!(metrics.sum(FAILED, &[]), None, "{}", metrics.text());
    assert_eq!(metrics.sum(OPEN, &[]), Some(0.0), "{}", metrics.text());
}

async fn tunnelled(family: Family) {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    connection(&scene, family).await;
    let (source, destination) =
        (scene.pki.id("client").to_string(), scene.pki.id("server").to_string());
    for (pod, proxy, reporter) in [
        (&scene.client, &mut client_proxy, "source"),
        (&scene.server, &mut server_proxy, "destination"),
    ] {
        proxy.access_lines(1).await;
        let labels = [
            ("reporter", reporter),
            ("request_protocol", "tcp"),
            ("response_flags", "-"),
            ("connection_security_policy", "mutual_tls"),
            ("source_principal", &source),
            ("source_workload", "client"),
            ("source_workload_namespace", "default"),
            ("source_canonical_service", "client"),
            ("source_canonical_revision", "latest"),
            ("source_app", "client"),
            ("source_cluster", "Kubernetes"),
            ("destination_principal", &destination),
            ("destination_workload", "server"),
            ("destination_workload_namespace", "default"),
            ("destination_canonical_service", "server"),
            ("destination_service", "unknown"),
        ];
        assert_counted(&pod.metrics().await, &labels);
    }
}

async fn plain() {
    let (scene, mut proxy) = plain_scene().await;
    connection(&scene, Family::V4).await;
    proxy.access_lines(1).await;
    let labels = [
        ("reporter", "source"),
        ("response_flags", "-"),
        ("connection_security_policy", "unknown"),
        ("source_principal", "unknown"),
        ("destination_principal", "unknown"),
        ("destination_workload", "unknown"),
    ];
    assert_counted(&scene.client.metrics().await, &labels);
}

async fn failed() {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    scene.client.dial_and_see_reset(scene.app(Family::V4)).await;
    for (pod, proxy, reporter) in [
        (&scene.client, &mut client_proxy, "source"),
        (&scene.server, &mut server_proxy, "destination"),
    ] {
        proxy.access_lines(1).await;
        let metrics = pod.metrics().await;
        let labels = [("reporter", reporter), ("response_flags", "CONNECT")];
        assert_eq!(metrics.sum(FAILED, &labels), Some(1.0), "{}", metrics.text());
        assert_eq!(metrics.sum(OPENED, &[]), None, "{}", metrics.text());
    }
}

/// Asserts that the server's proxy logs the source's workload `client` as claimed, not as proven.
async fn assert_claimed(scene: &Scene, proxy: &mut Proxy, identity: Option<String>) {
    let line = proxy.line(&["direction=\"inbound\"", "connection complete"]).await;
    assert!(line.contains(" src.claimed.workload=\"client\" "), "{line}");
    assert!(line.contains(" src.claimed.namespace=\"default\" "), "{line}");
    for proven in [" src.workload=", " src.namespace=", " src.cluster=", "neighbour"] {
        assert!(!line.contains(proven), "{proven}: {line}");
    }
    let quoted = identity.as_ref().map(|identity| format!(" src.identity=\"{identity}\" "));
    match &quoted {
        Some(quoted) => assert!(line.contains(quoted), "{line}"),
        None => assert!(!line.contains(" src.identity="), "{line}"),
    }
    let principal = identity.as_deref().unwrap_or("unknown");
    let labels = [
        ("reporter", "destination"),
        ("source_principal", principal),
        ("source_workload", "unknown"),
        ("source_workload_namespace", "unknown"),
        ("source_app", "unknown"),
        ("destination_workload", "server"),
    ];
    assert_counted(&scene.server.metrics().await, &labels);
}

async fn other_address(family: Family) {
    let scene = Scene::new().await;
    let mesh = Mesh::default().workload("neighbour", &scene.client.ips(), "HBONE");
    let at_server = mesh.hbone(&scene.server).write(&scene.client, "at-server");
    let server = scene.server_settings().set(&format!("mesh.file={}", at_server.display()));
    let _client_proxy = scene.client.proxy(&scene.client_settings()).await;
    let mut server_proxy = scene.server.proxy(&server).await;
    connection(&scene, family).await;
    let identity = scene.pki.id("client").to_string();
    assert_claimed(&scene, &mut server_proxy, Some(identity)).await;
}

async fn plaintext_client(family: Family) {
    let scene = Scene::new().await;
    let mut server_proxy = scene.server.proxy(&scene.server_settings()).await;
    connection(&scene, family).await;
    assert_claimed(&scene, &mut server_proxy, None).await;
}

async fn overflow() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("metrics.label_sets=1");
    let mut proxy = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    connection(&scene, Family::V4).await;
    // The port has no listener, so the connection has no proven destination.
    scene.client.dial_and_see_reset(scene.server.at(Family::V4, APP + 1)).await;
    proxy.access_lines(2).await;
    let metrics = scene.client.metrics().await;
    let own = [("source_workload", "client"), ("destination_workload", "server")];
    assert_eq!(metrics.sum(OPENED, &own), Some(1.0), "{}", metrics.text());
    let overflow = [
        ("reporter", "source"),
        ("connection_security_policy", "mutual_tls"),
        ("response_flags", "CONNECT"),
        ("source_workload", "overflow"),
        ("destination_principal", "overflow"),
    ];
    assert_eq!(metrics.sum(FAILED, &overflow), Some(1.0), "{}", metrics.text());
    proxy.line(&["WARN", "too many metric series"]).await;
}

async fn idle_label_sets() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("metrics.idle=1s");
    let mut proxy = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    let opened = async || scene.client.metrics().await.sum(OPENED, &[]);
    for lines in 1..=2 {
        connection(&scene, Family::V4).await;
        proxy.access_lines(lines).await;
        assert_eq!(opened().await, Some(1.0));
        until("the idle label set is removed", async || opened().await.is_none()).await;
    }
    let (client, _server_end) = scene.connected(Family::V4).await;
    assert_eq!(opened().await, Some(1.0));
    assert_eq!(scene.client.metrics().await.sum(OPEN, &[]), Some(1.0));
    drop(client);
}

async fn omitted_labels() {
    let scene = Scene::new().await;
    let omitted = "metrics.omit_labels=[source_principal, destination_principal]";
    let mut proxy = scene.client.proxy(&scene.client_settings().set(omitted)).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    connection(&scene, Family::V4).await;
    proxy.access_lines(1).await;
    let metrics = scene.client.metrics().await;
    assert_eq!(metrics.sum(OPENED, &[("destination_workload", "server")]), Some(1.0));
    assert!(!metrics.text().contains("_principal"), "{}", metrics.text());
}

async fn checked_by_promtool() {
    let (scene, mut client_proxy, _server) = Scene::with_proxies().await;
    connection(&scene, Family::V4).await;
    scene.client.dial_and_see_reset(scene.server.at(Family::V4, APP + 1)).await;
    client_proxy.access_lines(2).await;
    for pod in [&scene.client, &scene.server] {
        let metrics = pod.metrics().await;
        let Some(printed) = checker("promtool", &["check", "metrics"], metrics.text()) else {
            return;
        };
        let complaints = (printed.out.as_str(), printed.err.as_str());
        assert!(printed.status.success() && complaints == ("", ""), "{complaints:?}");
    }
}

async fn durations() {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    for lines in 1..=2 {
        connection(&scene, Family::V4).await;
        client_proxy.access_lines(lines).await;
        server_proxy.access_lines(lines).await;
    }
    let sides = [(&scene.client, "source", "outbound"), (&scene.server, "destination", "inbound")];
    for (pod, reporter, direction) in sides {
        let metrics = pod.metrics().await;
        let labels = [("reporter", reporter), ("connection_security_policy", "mutual_tls")];
        for name in ["connect", "first_byte", "connection"] {
            let name = format!("underpass_{name}_duration_seconds");
            let (sum, count) = (format!("{name}_sum"), format!("{name}_count"));
            assert_eq!(metrics.sum(&count, &labels), Some(2.0), "{}", metrics.text());
            assert!(metrics.sum(&sum, &labels) > Some(0.0), "{sum}: {}", metrics.text());
            assert_eq!(metrics.sum(&count, &[]), Some(2.0), "{}", metrics.text());
        }
        let handshakes = "underpass_handshake_duration_seconds_count";
        assert_eq!(metrics.sum(handshakes, &[("direction", direction)]), Some(1.0));
        assert_eq!(metrics.sum(handshakes, &[]), Some(1.0), "{}", metrics.text());
    }
    let metrics = scene.client.metrics().await;
    let streams = |tunnel| metrics.sum("underpass_pool_streams_total", &[("tunnel", tunnel)]);
    assert_eq!((streams("new"), streams("reused")), (Some(1.0), Some(1.0)), "{}", metrics.text());
    for budget in ["connections", "descriptors", "handshakes", "buffers"] {
        let value = |name| metrics.sum(name, &[("budget", budget)]);
        let (used, limit) = (value("underpass_budget_used"), value("underpass_budget_limit"));
        assert!(used.is_some() && used < limit, "{budget}: {}", metrics.text());
    }
}

async fn open_metrics() {
    let (scene, mut proxy, _server) = Scene::with_proxies().await;
    connection(&scene, Family::V4).await;
    let lines = proxy.access_lines(1).await;
    let line = lines.first().expect("a line");
    let (_, from_trace) = line.split_once(" trace_id=\"").expect("a trace id");
    let trace_id = from_trace.split('"').next().expect("a quoted id");
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
    let arguments = ["-s", "-i", "-H", accept, "http://127.0.0.1:15020/metrics"];
    let answer = tool(&scene.client, "curl", &arguments).await.ok();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a body");
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert!(head.contains(content_type), "{head}");
    assert!(body.ends_with("\n# EOF\n") && !body.contains("\n\n"), "{body}");
    assert!(body.contains("\n# TYPE istio_tcp_connections_opened counter\n"), "{body}");
    assert!(body.contains("\nistio_tcp_connections_opened_total{"), "{body}");
    let exemplar = format!(" # {{trace_id=\"{trace_id}\"}} ");
    let mut buckets = body.lines().filter(|line| line.contains(&exemplar));
    assert!(buckets.any(|line| line.starts_with("underpass_connect_duration_seconds_bucket")));
}

async fn counted_while_open() {
    let (scene, _client, _server) = Scene::with_proxies().await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    // Bytes are counted after they were forwarded, so one more exchange makes the earlier ones
    // visible.
    exchange(&mut client, &mut server).await;
    for pod in [&scene.client, &scene.server] {
        let metrics = pod.metrics().await;
        assert_eq!(metrics.sum(OPENED, &[]), Some(1.0));
        assert_eq!(metrics.sum(OPEN, &[]), Some(1.0));
        assert!(metrics.sum(RECEIVED, &[]) >= Some(7.0), "{}", metrics.text());
        assert!(metrics.sum(SENT, &[]) >= Some(6.0), "{}", metrics.text());
    }
}

/// The fields of a tunnelled connection's log line on each side, in order.
fn expected_fields(
    scene: &Scene,
    from: SocketAddr,
    to: SocketAddr,
    inbound: bool,
) -> Vec<(String, String)> {
    let app = to.to_string();
    let tunnel = SocketAddr::new(to.ip(), 15008).to_string();
    // As in ztunnel: the connection's destination is the end of the tunnel.
    let (address, hbone) = (tunnel, app);
    let direction = if inbound { "inbound" } else { "outbound" };
    let fields = [
        ("src.addr", from.to_string()),
        ("src.workload", "client".to_owned()),
        ("src.namespace", "default".to_owned()),
        ("src.identity", scene.pki.id("client").to_string()),
        ("dst.addr", address),
        ("dst.hbone_addr", hbone),
        ("dst.workload", "server".to_owned()),
        ("dst.namespace", "default".to_owned()),
        ("dst.identity", scene.pki.id("server").to_string()),
        ("direction", direction.to_owned()),
        ("bytes_sent", "6".to_owned()),
        ("bytes_recv", "7".to_owned()),
    ];
    fields.map(|(name, value)| (name.to_owned(), value)).to_vec()
}

async fn logged_in_one_line() {
    let (scene, mut client_proxy, mut server_proxy) = Scene::with_proxies().await;
    let from = connection(&scene, Family::V4).await;
    let to = scene.app(Family::V4);
    for (proxy, inbound) in [(&mut client_proxy, false), (&mut server_proxy, true)] {
        proxy.access_lines(1).await;
        // The log is complete after the exit.
        proxy.stop().await;
        let lines = proxy.access_lines(1).await;
        let [line] = &lines[..] else { unreachable!("not one line: {lines:?}") };
        assert!(line.contains(" INFO access: connection complete "), "{line}");
        for (name, value) in expected_fields(&scene, from, to, inbound) {
            if inbound && name == "src.addr" {
                continue; // The peer's port differs from the client's.
            }
            let (bare, quoted) = (format!(" {name}={value} "), format!(" {name}=\"{value}\" "));
            assert!(line.contains(&bare) || line.contains(&quoted), "no {bare}in {line}");
        }
        assert!(line.contains(" duration=\""), "{line}");
        assert!(!line.contains("error="), "{line}");
    }
}

async fn json() {
    let scene = Scene::new().await;
    let client = scene.client_settings().set("logging.format=json");
    let server = scene.server_settings().set("logging.format=json");
    let mut client_proxy = scene.client.proxy(&client).await;
    let mut server_proxy = scene.server.proxy(&server).await;
    let from = connection(&scene, Family::V4).await;
    scene.client.dial_and_see_reset(scene.server.at(Family::V4, APP + 1)).await;
    let to = scene.app(Family::V4);
    for (proxy, inbound) in [(&mut client_proxy, false), (&mut server_proxy, true)] {
        proxy.access_lines(2).await;
        proxy.stop().await;
        let parsed: Vec<serde_json::Value> = proxy
            .log()
            .lines()
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| unreachable!("{error}: {line}"))
            })
            .collect();
        let access: Vec<_> = parsed.iter().filter(|line| line["target"] == "access").collect();
        let [complete, failed] = access[..] else { unreachable!("not two lines: {access:?}") };
        assert_eq!(complete["level"], "INFO");
        assert_eq!(complete["message"], "connection complete");
        for (name, value) in expected_fields(&scene, from, to, inbound) {
            if !(inbound && name == "src.addr") {
                let found = &complete[&name];
                let text = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
                assert_eq!(text, value, "{name} in {complete}");
            }
        }
        assert_eq!(failed["message"], "connection failed");
        assert!(failed["reason"].is_string() && failed["error"].is_string(), "{failed}");
    }
}

async fn access_log_off() {
    let scene = Scene::new().await;
    let settings = scene.client_settings().set("logging.filter=info,access=off");
    let mut proxy = scene.client.proxy(&settings).await;
    let _server = scene.server.proxy(&scene.server_settings()).await;
    connection(&scene, Family::V4).await;
    proxy.stop().await;
    assert!(!proxy.log().contains("access"), "{}", proxy.log());
    assert!(proxy.log().contains("stopped"), "{}", proxy.log());
}

/// Forwards the log until readiness, then stops reading until the pipe `go` is written to.
const STALLED_READER: &str = r#"
mkfifo "$GO.log" "$GO"
( exec < "$GO.log"
  while IFS= read -r line; do
    echo "$line"
    case $line in *" ready "*) break;; esac
  done
  # Not for ever: a test that fails writes nothing.
  timeout 60 cat "$GO"
  exec cat ) &
exec "$UNDERPASS" "$@" > "$GO.log"
"#;

async fn stalled_log_reader() {
    let scene = Scene::new().await;
    let app = Server::echo(&scene.server, APP);
    // Long names make long lines.
    let mesh = scene.world.folder().join("long.yaml");
    let ips: Vec<_> = scene.client.ips().iter().map(|ip| format!("\"{ip}\"")).collect();
    let name = "n".repeat(20_000);
    let text = format!(
        "workloads: [{{name: {name}, serviceAccount: client, workloadIps: [{}]}}]\n",
        ips.join(", ")
    );
    std::fs::write(&mesh, text).expect("a mesh file");
    let go = scene.world.folder().join("go");
    let script = format!("GO={go:?}\n{STALLED_READER}");
    let settings = scene.client_settings().set(&format!("mesh.file={}", mesh.display()));
    let proxy = scene.client.try_proxy_through(&script, &settings).await;
    let mut proxy = proxy.expect("the proxy starts");
    let lost = async || {
        let metrics = scene.client.metrics().await;
        metrics
            .sum("underpass_log_lines_lost_total", &[])
            .expect("the metric exists from the start")
    };
    assert!(lost().await == 0.0);
    until("lines are lost", async || {
        scene.echoed().await;
        lost().await >= 10.0
    })
    .await;
    let lost = lost().await;
    std::fs::write(&go, "").expect("the reader waits");
    let report = proxy.line(&["WARN", "log lines lost: "]).await;
    let reported = report.rsplit(' ').next().and_then(|number| number.parse::<f64>().ok());
    assert!(reported >= Some(lost), "{report}: {lost}");
    assert!(proxy.log().len() < 2 << 20, "{} bytes waited", proxy.log().len());
    drop(app);
}
