//! Tests of the server over an in-memory connection.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::Bytes;
use http::HeaderValue;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::Instant;

use super::*;
use crate::admin::answer;
use crate::admin::routes::Access;
use crate::admin::state::Admin;
use crate::node::testing::{node, settings};

fn admin(access: Access) -> Server {
    let admin = Admin::new(&Arc::new(settings(&["logging.filter=warn"])), &node(1));
    Server::new(Routes::Admin(Arc::new(admin), access))
}

/// Connects a client. The slot counts until the connection ends.
fn connect(server: Server) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(1024);
    let slot = ConnectionSlots::new(1, 1).take(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    tokio::spawn(server.serve_connection(ours, slot));
    theirs
}

/// Sends a request, and returns the status and the body.
async fn send(server: Server, method: &str, path: &str, host: &str) -> (u16, String) {
    let mut client = connect(server);
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap();
    (status.parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn refused_method_is_answered_with_the_allowed_ones() {
    for (path, expected) in [("/logging", "allow: GET, POST\r\n"), ("/version", "allow: GET\r\n")] {
        let mut client = connect(admin(Access::Change));
        let request =
            format!("PUT {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains(expected), "{answer}");
    }
}

#[tokio::test]
async fn address_shows_the_log_filter_to_istioctl_and_does_not_change_it() {
    for (path, expected) in
        [("/logging?level=", 200), ("/logging?level=debug", 403), ("/logging", 403)]
    {
        let (status, body) = send(admin(Access::Read), "POST", path, "localhost").await;
        assert_eq!(status, expected, "{path}: {body}");
    }
}

#[tokio::test]
async fn unknown_paths_and_methods_are_refused_with_the_reason() {
    for (method, path, status, reason) in [
        ("GET", "/x", 404, "not found: this endpoint serves /, /version"),
        ("GET", "/version/", 404, "not found"),
        ("POST", "/version", 405, "/version has only GET"),
        ("DELETE", "/logging", 405, "/logging has only GET and POST"),
        ("GET", "/?x=1", 400, "unknown parameter \"x\""),
        ("GET", "/version?x=1", 400, "unknown parameter \"x\""),
        ("GET", "/status?pod=web", 400, "pod must be like NAMESPACE/NAME"),
        ("GET", "/status?pod=shop/web", 404, "no pod shop/web is known to this proxy"),
        (
            "POST",
            "/drain?pod=default/server&deadline=5",
            400,
            "deadline must be a time such as 30s",
        ),
        (
            "POST",
            "/drain?pod=default/server&deadline=18446744073709551615s",
            400,
            "and 24h at most",
        ),
        (
            "POST",
            "/drain?pod=shop/web",
            404,
            "no pod shop/web: this proxy has the pod default/server",
        ),
        ("POST", "/undrain", 404, "no pod default/server is served"),
        ("GET", "/rules", 503, "the rules are not installed yet"),
        ("GET", "/connections?verdict=no", 400, "verdict must be allowed or denied or failed"),
        ("POST", "/logging", 400, "one of the parameters filter and reset is needed"),
        ("POST", "/logging?filter=dbug", 400, "filter must be like info"),
        ("POST", "/logging?filter=a%3Ddebug&reset", 400, "one of the parameters"),
    ] {
        let (answered, body) = send(admin(Access::Change), method, path, "localhost").await;
        assert!(answered == status && body.contains(reason), "{method} {path}: {answered} {body}");
    }
}

#[tokio::test]
async fn address_reads_but_does_not_change() {
    let (status, body) = send(admin(Access::Read), "GET", "/version", "127.0.0.1:15000").await;
    assert!(status == 200 && body.contains("\"command\":\"run\""), "{status} {body}");
    assert_eq!(send(admin(Access::Read), "GET", "/", "localhost").await.0, 200);
    let (status, body) = send(admin(Access::Read), "POST", "/logging?reset", "localhost").await;
    assert!(status == 403 && body.contains("admin.socket"), "{status} {body}");
}

#[tokio::test]
async fn address_refuses_the_host_of_a_rebound_name() {
    let (status, body) = send(admin(Access::Read), "GET", "/version", "evil.example").await;
    assert!(status == 403 && body.contains("Host"), "{status} {body}");
    assert_eq!(send(admin(Access::Change), "GET", "/version", "any").await.0, 200);
}

#[tokio::test]
async fn untrusted_process_is_refused_with_the_reason() {
    let refused = Server::new(Routes::Refused(UNTRUSTED));
    let (status, body) = send(refused, "GET", "/version", "localhost").await;
    assert_eq!((status, body), (403, format!("{UNTRUSTED}\n")));
}

#[tokio::test]
async fn malformed_request_gets_status_400() {
    let mut client = connect(admin(Access::Read));
    client.write_all(b"\0\0\0\0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn client_that_never_completes_its_request_is_disconnected() {
    let began = Instant::now();
    let mut client = connect(admin(Access::Change));
    client.write_all(b"GET /version HTTP/1.1\r\n").await.unwrap();
    client.read_to_end(&mut Vec::new()).await.unwrap();
    assert_eq!(began.elapsed(), HEADER_TIMEOUT);
}

/// A stream that never ends makes chunks only while the client reads, and other tasks run between.
#[tokio::test(start_paused = true)]
async fn endless_answer_waits_for_the_client_and_lets_other_tasks_run() {
    let [made, ticks]: [Arc<AtomicUsize>; 2] = Default::default();
    let making = made.clone();
    let chunks = futures_util::stream::repeat_with(move || {
        making.fetch_add(1, Relaxed);
        Bytes::from_static(&[b'x'; 1024])
    });
    let body = answer::stream(HeaderValue::from_static("text/plain"), chunks);
    let (ours, mut theirs) = tokio::io::duplex(1024);
    let body = Mutex::new(Some(body));
    let serving = async move {
        let answer = service_fn(move |_: Request<Incoming>| {
            let body = body.lock().unwrap().take().unwrap();
            async move { Ok::<_, Infallible>(body) }
        });
        let stream = std::pin::pin!(StallTimeout::new(ours));
        http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await
    };
    let serving = tokio::spawn(serving);
    let counted = ticks.clone();
    let ticking = tokio::spawn(async move {
        loop {
            counted.fetch_add(1, Relaxed);
            tokio::task::yield_now().await;
        }
    });
    theirs.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    theirs.read_exact(&mut vec![0; 100 << 10]).await.unwrap();
    assert!(ticks.load(Relaxed) >= 100, "another task runs between two chunks");
    ticking.abort();
    // The client reads nothing more.
    assert!(serving.await.unwrap().is_err());
    let made = made.load(Relaxed);
    assert!(made < 1000, "{made} chunks for a client that does not read");
}
