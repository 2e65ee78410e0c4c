//! Tests of readiness and metrics while clients keep connections busy or idle.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use underpass_tests::{Scene, Suite, http_get};

pub(crate) fn add_tests(suite: &mut Suite) {
    suite.test("probes are served while clients keep the readiness endpoint busy", busy);
    suite.test("probes and scrapes are served while clients keep idle connections", idle);
}

const READINESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);

async fn busy() {
    // The maximum number of concurrent connections.
    const CLIENTS: usize = 64;
    let (scene, _proxy) = Scene::with_plain_client(&[]).await;
    let mut busy = JoinSet::new();
    for _ in 0..CLIENTS {
        let mut stream = scene.client.dial(READINESS).await.expect("it listens");
        busy.spawn(async move {
            let mut again = tokio::time::interval(Duration::from_secs(1));
            let request = b"GET /healthz/ready HTTP/1.1\r\nHost: ready\r\n\r\n";
            while stream.write_all(request).await.is_ok()
                && stream.read(&mut [0; 1024]).await.is_ok_and(|bytes| bytes > 0)
            {
                again.tick().await;
            }
        });
    }
    let (status, _) = http_get(&scene.client, READINESS, "/healthz/ready").await;
    assert_eq!(status, 200);
    while busy.join_next().await.is_some() {}
}

async fn idle() {
    const CLIENTS: usize = 200;
    /// The timeout of a kubelet's probe.
    const TIMEOUT: Duration = Duration::from_secs(1);
    let (scene, _proxy) = Scene::with_plain_client(&[]).await;
    for (endpoint, path) in [(READINESS, "/healthz/ready"), (METRICS, "/metrics")] {
        let mut idle: Vec<TcpStream> = Vec::new();
        for _ in 0..CLIENTS {
            idle.push(scene.client.dial(endpoint).await.expect("it listens"));
        }
        let began = Instant::now();
        let (status, _) = http_get(&scene.client, endpoint, path).await;
        let elapsed = began.elapsed();
        assert!(status == 200 && elapsed < TIMEOUT, "{path}: {status} after {elapsed:?}");
    }
}
