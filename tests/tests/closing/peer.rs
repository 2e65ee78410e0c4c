//! Tests with scripted HBONE peers that end a stream or its tunnel in the middle of a body: only
//! END_STREAM becomes FIN.

use std::future::pending;
use std::net::SocketAddr;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use underpass_interception::reset_on_close;
use underpass_tests::{
    APP, End, Family, HBONE, Scene, Suite, TlsClient, TlsServer, read_to_end, within,
};

use Action::{EndStream, Fin, GoAway, Reset, ResetStream, Retire};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    /// Sends DATA with END_STREAM.
    EndStream,
    /// Sends RST_STREAM.
    ResetStream(Reason),
    /// Sends GOAWAY for new streams, and END_STREAM for this one.
    Retire,
    /// Sends GOAWAY, then ends TLS and TCP cleanly without an end of the stream.
    GoAway(Reason),
    /// Sends FIN on the tunnel's TCP connection.
    Fin,
    /// Sends RST on the tunnel's TCP connection.
    Reset,
}

/// Actions of the peer, and the required end for the application on the proxy's side.
const TABLE: [(Action, End); 11] = [
    (EndStream, End::Fin),
    (Retire, End::Fin),
    (ResetStream(Reason::NO_ERROR), End::Reset),
    (ResetStream(Reason::CANCEL), End::Reset),
    (ResetStream(Reason::INTERNAL_ERROR), End::Reset),
    (ResetStream(Reason::REFUSED_STREAM), End::Reset),
    (ResetStream(Reason::CONNECT_ERROR), End::Reset),
    (GoAway(Reason::NO_ERROR), End::Reset),
    (GoAway(Reason::ENHANCE_YOUR_CALM), End::Reset),
    (Fin, End::Reset),
    (Reset, End::Reset),
];

pub(crate) fn add_tests(suite: &mut Suite) {
    for (action, outcome) in TABLE {
        suite.test(
            &format!("HBONE client: the peer's {action:?} -> {outcome:?}"),
            async move || {
                as_server(action, outcome, Family::V4).await;
            },
        );
        // h2's client cannot send GOAWAY with an open stream.
        if !matches!(action, Retire | GoAway(_)) {
            suite.test(
                &format!("HBONE server: the peer's {action:?} -> {outcome:?}"),
                async move || {
                    by_client(action, outcome, Family::V4).await;
                },
            );
        }
    }
    suite.test("HBONE client, IPv6: the peer's Fin -> Reset", async || {
        as_server(Fin, End::Reset, Family::V6).await;
    });
    suite.test("HBONE server, IPv6: the peer's Fin -> Reset", async || {
        by_client(Fin, End::Reset, Family::V6).await;
    });
}

/// The proxy opens the tunnel.
async fn as_server(action: Action, outcome: End, family: Family) {
    let scene = Scene::new().await;
    let listener = scene.server.listen(HBONE);
    let _proxy = scene.client.proxy(&scene.client_settings()).await;
    let mut app = scene.client.dial(scene.app(family)).await.expect("the proxy accepts");
    let (stream, _) = listener.accept().await;
    if action == Reset {
        reset_on_close(&stream);
    }
    let server = TlsServer::new(&scene.server_files);
    let stream = server.accept(stream).await.expect("a TLS handshake");
    let handshake = within("a preface", h2::server::handshake(stream));
    let mut tunnel = handshake.await.expect("HTTP/2");
    let request = within("a request", tunnel.accept()).await;
    let (request, mut respond) = request.expect("a request").expect("HTTP/2");
    let mut body: SendStream<Bytes> =
        respond.send_response(Response::new(()), false).expect("a response");
    body.send_data("half".into(), false).expect("data");
    tokio::select! {
        () = assert_first_half_arrives(&mut app) => {}
        _ = tunnel.accept() => unreachable!("the proxy ended its tunnel"),
    }
    let request = request.into_body();
    match action {
        Fin | Reset => {
            drop((tunnel, body, request, respond));
            return assert_eq!(read_to_end(&mut app).await, (vec![], outcome));
        }
        GoAway(reason) => tunnel.abrupt_shutdown(reason),
        Retire => tunnel.graceful_shutdown(),
        EndStream | ResetStream(_) => {}
    }
    let driven = async {
        while tunnel.accept().await.is_some() {}
        pending::<()>().await;
    };
    tokio::select! {
        () = assert_end(action, outcome, &mut app, body, request) => {}
        () = driven => {}
    }
}

/// The proxy accepts the tunnel.
async fn by_client(action: Action, outcome: End, family: Family) {
    let scene = Scene::new().await;
    let _proxy = scene.server.proxy(&scene.server_settings()).await;
    let listener = scene.server.listen(APP);
    let stream = scene.client.dial(scene.server.at(family, HBONE)).await.expect("it listens");
    if action == Reset {
        reset_on_close(&stream);
    }
    let client = TlsClient::new(Some(&scene.client_files));
    let stream = client.connect(stream).await.expect("a TLS handshake");
    let (requests, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    let driving = tokio::spawn(connection);
    let (response, mut body) = connect(requests, scene.app(family)).await;
    let (mut app, _) = listener.accept().await;
    let response = within("a response", response).await.expect("HTTP/2");
    assert_eq!(response.status(), StatusCode::OK);
    body.send_data("half".into(), false).expect("data");
    assert_first_half_arrives(&mut app).await;
    if matches!(action, Fin | Reset) {
        driving.abort();
        return assert_eq!(read_to_end(&mut app).await, (vec![], outcome));
    }
    assert_end(action, outcome, &mut app, body, response.into_body()).await;
    driving.abort();
}

async fn connect(
    requests: h2::client::SendRequest<Bytes>,
    to: SocketAddr,
) -> (h2::client::ResponseFuture, SendStream<Bytes>) {
    let mut requests = within("room for a stream", requests.ready()).await.expect("HTTP/2");
    let request = Request::builder().method(Method::CONNECT).uri(to.to_string());
    requests.send_request(request.body(()).expect("a request"), false).expect("HTTP/2")
}

/// Performs an action on the stream, and checks the end of the application's connection.
async fn assert_end(
    action: Action,
    outcome: End,
    app: &mut TcpStream,
    mut body: SendStream<Bytes>,
    mut from_app: RecvStream,
) {
    match action {
        ResetStream(reason) => body.send_reset(reason),
        EndStream | Retire => body.send_data("whole".into(), true).expect("data"),
        GoAway(_) | Fin | Reset => {}
    }
    let rest = if outcome == End::Fin { &b"whole"[..] } else { b"" };
    assert_eq!(read_to_end(app).await, (rest.to_vec(), outcome));
    if outcome == End::Fin {
        // The other direction stays open, and ends cleanly.
        app.write_all(b"more").await.expect("it may send");
        app.shutdown().await.expect("FIN is sent");
        let mut received = Vec::new();
        while let Some(data) = within("END_STREAM", from_app.data()).await {
            received.extend_from_slice(&data.expect("no reset"));
        }
        assert_eq!(received, b"more");
    }
}

async fn assert_first_half_arrives(app: &mut TcpStream) {
    let mut half = [0; 4];
    within("bytes arrive", app.read_exact(&mut half)).await.expect("no end");
    assert_eq!(&half, b"half");
}
