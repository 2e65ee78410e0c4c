//! Tests of invalid requests, slow clients, and drains.

mod drain;
mod limits;

use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::time::{Instant, sleep};

use super::*;
use crate::testing::{
    ADDRESS, CLIENT, HOUR, Mesh, SECOND, SERVER, Served, StepwiseIo, authority, credentials, id,
    identity, request,
};
use crate::tunnel::client::ConnectRequest;
use crate::tunnel::settings::ClientSettings;

#[tokio::test(start_paused = true)]
async fn silent_client_times_out() {
    let (_near, far) = duplex(1024);
    let accepted = Mesh::new().acceptor.accept(far, SECOND).await;
    assert!(matches!(accepted, Err(HboneError::HandshakeTimeout { after: SECOND })));
}

/// A client's credentials, for tests of TLS only, and an acceptor.
fn client_and_acceptor() -> (Credentials, Acceptor) {
    let authority = authority("td");
    let server = credentials(&identity(&authority, SERVER));
    let acceptor = Acceptor::new(server.fixed(), ServerSettings::default());
    (credentials(&identity(&authority, CLIENT)), acceptor)
}

#[tokio::test(start_paused = true)]
async fn slow_client_times_out() {
    let (client, acceptor) = client_and_acceptor();
    let (near, mut tap) = duplex(64 << 10);
    // The complete ClientHello. Each slow client sends a part of it.
    let hello = async {
        let mut hello = [0; 512];
        tap.read_exact(&mut hello).await.unwrap();
        hello
    };
    let expected = [id(SERVER)];
    let hello = tokio::select! {
        hello = hello => hello,
        _ = client.client().connect(Box::new(near), ADDRESS, &expected) => unreachable!(),
    };
    let deadline = 10 * SECOND;
    for interval in [SECOND / 10, SECOND, HOUR] {
        let (mut near, far) = duplex(64 << 10);
        let start = Instant::now();
        let slow = async {
            for byte in hello {
                near.write_all(&[byte]).await.unwrap();
                sleep(interval).await;
            }
            panic!("the server did not close it");
        };
        let accepted = tokio::select! {
            accepted = acceptor.accept(far, deadline) => accepted,
            () = slow => unreachable!(),
        };
        assert!(matches!(accepted, Err(HboneError::HandshakeTimeout { .. })), "{accepted:?}");
        assert_eq!(start.elapsed(), deadline);
    }
}

#[tokio::test(start_paused = true)]
async fn client_that_stops_after_tls_times_out() {
    let (client, acceptor) = client_and_acceptor();
    let (near, far) = duplex(64 << 10);
    let (client, accepted) = tokio::join!(
        async {
            let (mut stream, _) =
                client.client().connect(Box::new(near), ADDRESS, &[id(SERVER)]).await.unwrap();
            stream.write_all(b"PRI * HTT").await.unwrap();
            stream.flush().await.unwrap();
            stream
        },
        acceptor.accept(far, SECOND)
    );
    assert!(matches!(accepted, Err(HboneError::HandshakeTimeout { .. })));
    drop(client);
}

/// Sends a request that the server answers itself. Returns the status.
async fn answer_status(request: Request<()>) -> StatusCode {
    let (client, acceptor) = client_and_acceptor();
    let (near, far) = duplex(64 << 10);
    let ask = async {
        let (stream, _) =
            client.client().connect(Box::new(near), ADDRESS, &[id(SERVER)]).await.unwrap();
        let (mut send, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let (response, _send) = send.send_request(request, false).unwrap();
        response.await.unwrap().status()
    };
    let serve = async {
        let mut tunnel = acceptor.accept(far, SECOND).await.unwrap();
        let yielded = tunnel.next().await;
        panic!("{yielded:?} was yielded");
    };
    tokio::select! {
        status = ask => status,
        () = serve => unreachable!(),
    }
}

#[tokio::test]
async fn invalid_connect_request_gets_400() {
    let get = Request::get("https://10.0.0.1:80/").body(()).unwrap();
    assert_eq!(answer_status(get).await, StatusCode::BAD_REQUEST);
    for authority in ["10.0.0.1", "10.0.0.1:0", "user@10.0.0.1:80"] {
        let connect = Request::connect(authority).body(()).unwrap();
        assert_eq!(answer_status(connect).await, StatusCode::BAD_REQUEST, "{authority}");
    }
}

#[tokio::test]
async fn drained_tunnel_finishes_streams_and_takes_no_new_ones() {
    let (tunnel, mut server) = Mesh::new().tunnel().await;
    let asking = tokio::spawn({
        let tunnel = tunnel.clone();
        async move { tunnel.connect(request(), SECOND).await.unwrap() }
    });
    let incoming = server.next().await.unwrap();
    let far = incoming.accept(HeaderMap::new()).unwrap();
    server.drain();
    let served = Served::new(server);
    let (mut near_reader, mut near_writer) = asking.await.unwrap().split();
    let (mut far_reader, mut far_writer) = far.split();
    far_writer.write(Bytes::from_static(b"after GOAWAY")).await.unwrap();
    assert_eq!(near_reader.read().await.unwrap().unwrap(), "after GOAWAY");
    assert!(tunnel.is_closed());
    tunnel.connect(request(), SECOND).await.unwrap_err();
    far_writer.finish().unwrap();
    near_writer.finish().unwrap();
    assert!(near_reader.read().await.unwrap().is_none());
    assert!(far_reader.read().await.unwrap().is_none());
    drop((near_reader, near_writer, far_reader, far_writer));
    served.ended().await;
}

#[tokio::test(start_paused = true)]
async fn drained_tunnel_of_unresponsive_client_times_out() {
    let (near, far) = duplex(64 << 10);
    let near = StepwiseIo::new(near, 64 << 10);
    let stops_reading = near.stopped.clone();
    let (_tunnel, mut server) = Mesh::new().tunnel_over(near, far).await;
    stops_reading.store(true, Ordering::Relaxed);
    server.drain();
    // With a timeout, an endless wait fails the test.
    assert!(timeout(60 * SECOND, server.next()).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn client_cannot_exceed_stream_limit() {
    let server = ServerSettings { max_streams: 2, ..ServerSettings::default() };
    let (tunnel, server) = Mesh::with(ClientSettings::default(), server).tunnel().await;
    let mut served = Served::new(server);
    let mut open = Vec::new();
    for _ in 0..2 {
        let (near, far) = tokio::join!(tunnel.connect(request(), SECOND), async {
            served.next().await.accept(HeaderMap::new()).unwrap()
        });
        open.push((near.unwrap(), far));
    }
    let third = tunnel.connect(request(), SECOND).await;
    assert!(matches!(third, Err(HboneError::ReplyTimeout { .. })), "{third:?}");
    open.clear();
    let (near, _far) = tokio::join!(tunnel.connect(request(), SECOND), async {
        // The cancelled request arrives too; answering it reports the cancellation.
        let given_up = served.next().await.accept(HeaderMap::new());
        assert!(matches!(given_up, Err(HboneError::Reset { .. })), "{given_up:?}");
        served.next().await.accept(HeaderMap::new()).unwrap()
    });
    near.unwrap();
}

#[tokio::test]
async fn header_list_above_limit_is_rejected() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let _served = Served::new(server);
    let mut headers = HeaderMap::new();
    headers.insert("baggage", "x".repeat(65 << 10).parse().unwrap());
    let answer = tunnel.connect(ConnectRequest { headers, ..request() }, SECOND).await;
    assert!(answer.is_err(), "{answer:?}");
}

#[tokio::test]
async fn pending_request_reports_cancellation_by_client() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let mut served = Served::new(server);
    let asking = async {
        // Cancel the request as soon as it arrives.
        tokio::select! {
            answered = tunnel.connect(request(), HOUR) => panic!("{answered:?}"),
            incoming = served.next() => incoming,
        }
    };
    let mut incoming = asking.await;
    assert!(matches!(incoming.closed().await, HboneError::Reset { .. }));
    let (_, mut incoming) = tokio::join!(
        async { timeout(SECOND, tunnel.connect(request(), HOUR)).await },
        served.next()
    );
    assert!(matches!(incoming.closed().await, HboneError::Reset { .. }));
    let connecting = tokio::spawn(async move { tunnel.connect(request(), HOUR).await });
    let mut incoming = served.next().await;
    served.abort().await;
    assert!(matches!(incoming.closed().await, HboneError::Lost { .. }));
    let answered = connecting.await.unwrap();
    assert!(matches!(answered, Err(HboneError::Lost { .. })), "{answered:?}");
}
