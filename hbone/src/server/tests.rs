//! Requests that are none, slow clients, and the way out.

use tokio::io::{AsyncWriteExt as _, duplex};

use super::*;
use crate::testing::{Mesh, SECOND, Served, authority, identity, request};
use crate::{ClientSettings, ConnectRequest};

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_given_up() {
    let (_near, far) = duplex(1024);
    let accepted = Mesh::new().acceptor.accept(far, SECOND).await;
    assert!(matches!(accepted, Err(HboneError::HandshakeTimeout { after: SECOND })));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_after_tls_is_given_up() {
    let authority = authority("td");
    let client = crate::tls::ClientTls::new(&identity(&authority, crate::testing::CLIENT)).unwrap();
    let server = identity(&authority, crate::testing::SERVER);
    let acceptor = Acceptor::new(&server, ServerSettings::default()).unwrap();
    let (near, far) = duplex(64 << 10);
    let expected = [server.spiffe_id().clone()];
    let (client, accepted) = tokio::join!(
        async {
            let (mut stream, _) = client.connect(near, &expected).await.unwrap();
            stream.write_all(b"PRI * HTT").await.unwrap();
            stream.flush().await.unwrap();
            stream
        },
        acceptor.accept(far, SECOND)
    );
    assert!(matches!(accepted, Err(HboneError::HandshakeTimeout { .. })));
    drop(client);
}

/// The status that the server gives without asking us.
async fn answered(request: Request<()>) -> StatusCode {
    let authority = authority("td");
    let client = crate::tls::ClientTls::new(&identity(&authority, crate::testing::CLIENT)).unwrap();
    let server = identity(&authority, crate::testing::SERVER);
    let acceptor = Acceptor::new(&server, ServerSettings::default()).unwrap();
    let (near, far) = duplex(64 << 10);
    let expected = [server.spiffe_id().clone()];
    let ask = async {
        let (stream, _) = client.connect(near, &expected).await.unwrap();
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
async fn what_is_no_connect_to_an_address_is_answered_with_400() {
    let get = Request::get("https://10.0.0.1:80/").body(()).unwrap();
    assert_eq!(answered(get).await, StatusCode::BAD_REQUEST);
    for authority in ["10.0.0.1", "10.0.0.1:0", "user@10.0.0.1:80"] {
        let connect = Request::connect(authority).body(()).unwrap();
        assert_eq!(answered(connect).await, StatusCode::BAD_REQUEST, "{authority}");
    }
}

#[tokio::test]
async fn a_drained_tunnel_lets_streams_end_and_takes_no_new_ones() {
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
async fn a_client_cannot_open_more_streams_than_allowed() {
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
        // The request that was given up comes too, and says so when it is answered.
        let given_up = served.next().await.accept(HeaderMap::new());
        assert!(matches!(given_up, Err(HboneError::Reset { .. })), "{given_up:?}");
        served.next().await.accept(HeaderMap::new()).unwrap()
    });
    near.unwrap();
}

#[tokio::test]
async fn headers_beyond_the_cap_do_not_get_through() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let _served = Served::new(server);
    let mut headers = HeaderMap::new();
    headers.insert("baggage", "x".repeat(65 << 10).parse().unwrap());
    let answer = tunnel.connect(ConnectRequest { headers, ..request() }, SECOND).await;
    assert!(answer.is_err(), "{answer:?}");
}
