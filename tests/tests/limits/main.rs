//! End-to-end tests of limits: refused or delayed connections, their metrics, and recovery.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod descriptors;
mod endpoints;
mod handshakes;
mod pods;
mod sources;
mod stalled;
mod tunnels;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;
use underpass_tests::{APP, Dial, Family, Pod, Proxy, Scene, Server, Suite, until, within};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    suite.test(
        "a connection is reset while all workers are at limits.connections_per_worker",
        per_worker,
    );
    suite.test("refused connections of a storm are logged once per second and all counted", storm);
    suite.test("a stream beyond limits.connections_per_worker gets status 503", streams_per_worker);
    suite.test("connections beyond limits.accepts_per_second wait and are served", rate);
    endpoints::add_tests(&mut suite);
    handshakes::add_tests(&mut suite);
    sources::add_tests(&mut suite);
    descriptors::add_tests(&mut suite);
    pods::add_tests(&mut suite);
    tunnels::add_tests(&mut suite);
    stalled::add_tests(&mut suite);
    suite.run()
}

/// A connection to an echo server that has returned a byte; `None` if it was reset.
async fn served(pod: &Pod, to: SocketAddr, dial: Dial) -> Option<TcpStream> {
    let mut stream = pod.dial_as(to, dial).await.ok()?;
    let echo = async {
        stream.write_u8(1).await?;
        stream.read_u8().await
    };
    within("a byte comes back, or a reset", echo).await.ok()?;
    Some(stream)
}

/// Opens connections until one is not served.
async fn served_until_full(pod: &Pod, to: SocketAddr) -> Vec<TcpStream> {
    let mut open = Vec::new();
    while let Some(stream) = served(pod, to, Dial::default()).await {
        open.push(stream);
        assert!(open.len() < 1000, "there is no limit");
    }
    open
}

/// The number of connections that a limit refused at a listener.
async fn refused(pod: &Pod, limit: &str, listener: &str) -> Option<f64> {
    let labels = [("limit", limit), ("listener", listener)];
    pod.metrics().await.sum("underpass_connections_refused_total", &labels)
}

async fn per_worker() {
    let (scene, mut proxy) = Scene::with_plain_client(&["limits.connections_per_worker=2"]).await;
    let _echo = Server::echo(&scene.server, APP);
    let to = scene.app(Family::V4);
    let mut open = served_until_full(&scene.client, to).await;
    assert_eq!(open.len(), 4, "two for each of two workers");
    scene.client.dial_and_see_reset(to).await;
    let counted = refused(&scene.client, "connections_per_worker", "outbound").await;
    assert_eq!(counted, Some(2.0));
    proxy.line(&["connections are refused", "limits.connections_per_worker"]).await;
    drop(open.pop());
    until("there is room again", async || {
        served(&scene.client, to, Dial::default()).await.is_some()
    })
    .await;
    // Earlier connections are unaffected.
    for stream in &mut open {
        stream.write_u8(2).await.expect("it is open");
        assert_eq!(within("an echo", stream.read_u8()).await.expect("it is open"), 2);
    }
    assert_eq!(proxy.count(&["connection failed"]), 0, "{}", proxy.log());
}

async fn storm() {
    const STORM: usize = 500;
    let (scene, mut proxy) =
        Scene::with_plain_client(&["limits.connections_per_worker=1", "logging.format=json"]).await;
    let _echo = Server::echo(&scene.server, APP);
    let to = scene.app(Family::V4);
    let _held = [
        served(&scene.client, to, Dial::default()).await.expect("a first one"),
        served(&scene.client, to, Dial::default()).await.expect("a second one"),
    ];
    let began = Instant::now();
    for _ in 0..STORM {
        scene.client.dial_and_see_reset(to).await;
    }
    let refusal_counts = |proxy: &Proxy| -> Vec<usize> {
        let log = proxy.log();
        let lines = log.lines().filter(|line| line.contains("connections are refused"));
        let count = |line: &str| -> usize {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let refused = line.get("refused").and_then(serde_json::Value::as_u64);
            usize::try_from(refused.expect("a count")).expect("a count")
        };
        lines.map(count).collect()
    };
    proxy.line(&["connections are refused"]).await;
    until("all are logged", async || refusal_counts(&proxy).iter().sum::<usize>() == STORM).await;
    let lines = refusal_counts(&proxy).len();
    let seconds = began.elapsed().as_secs_f64();
    assert!(lines as f64 <= seconds + 1.0, "{lines} lines in {seconds} s");
    let counted = refused(&scene.client, "connections_per_worker", "outbound").await;
    assert_eq!(counted, Some(STORM as f64));
}

async fn streams_per_worker() {
    let scene = Scene::new().await;
    let _echo = Server::echo(&scene.server, APP);
    let settings = scene.server_settings().set("limits.connections_per_worker=3");
    let mut server = scene.server.proxy(&settings).await;
    let mut client = scene.client.proxy(&scene.client_settings()).await;
    let to = scene.app(Family::V4);
    let open = served_until_full(&scene.client, to).await;
    assert_eq!(open.len(), 2, "the tunnel counts too");
    server
        .line(&[
            "connection failed",
            "reason=\"too_many_connections\"",
            "limits.connections_per_worker",
        ])
        .await;
    client.line(&["connection failed", "reason=\"refused\"", "503"]).await;
    let counted = refused(&scene.server, "connections_per_worker", "hbone").await;
    assert_eq!(counted, Some(1.0));
    drop(open);
    until("there is room again", async || {
        served(&scene.client, to, Dial::default()).await.is_some()
    })
    .await;
}

async fn rate() {
    let (scene, proxy) = Scene::with_plain_client(&["limits.accepts_per_second=20"]).await;
    let _echo = Server::echo(&scene.server, APP);
    let to = scene.app(Family::V4);
    let began = Instant::now();
    let mut open = Vec::new();
    for _ in 0..14 {
        // All connections wait in the accept queue.
        open.push(scene.client.dial(to).await.expect("it listens"));
    }
    for stream in &mut open {
        stream.write_u8(1).await.expect("it is open");
        within("an echo", stream.read_u8()).await.expect("it is served");
    }
    // A burst of two, then twelve at intervals of 50 ms.
    let elapsed = began.elapsed();
    assert!(elapsed >= Duration::from_millis(600), "{elapsed:?}");
    let labels = [("listener", "outbound"), ("reason", "rate")];
    let paused = scene.client.metrics().await.sum("underpass_accept_paused_total", &labels);
    assert!(paused >= Some(1.0), "{paused:?}");
    assert_eq!(proxy.count(&["connection failed"]), 0, "{}", proxy.log());
}
