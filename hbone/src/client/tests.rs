//! Requests that fail, and peers that say nothing.

use http::header::HeaderValue;
use tokio::io::duplex;

use super::*;
use crate::Authority;
use crate::testing::{ADDRESS, Mesh, SECOND, SERVER, Served, id, request};

#[tokio::test]
async fn a_request_arrives_with_its_authority_and_headers() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let mut served = Served::new(server);
    let mut asked = request();
    asked.headers.insert("baggage", HeaderValue::from_static("k8s.namespace.name=default"));
    let (answer, _far) = tokio::join!(tunnel.connect(asked, SECOND), async {
        let incoming = served.next().await;
        assert_eq!(incoming.authority(), &"10.0.0.1:80".parse::<Authority>().unwrap());
        assert_eq!(incoming.headers().get("baggage").unwrap(), "k8s.namespace.name=default");
        assert_eq!(incoming.headers().len(), 1);
        incoming.accept(HeaderMap::new()).unwrap()
    });
    answer.unwrap();
}

#[tokio::test]
async fn any_answer_but_200_is_a_refusal() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let mut served = Served::new(server);
    for expected in
        [StatusCode::UNAUTHORIZED, StatusCode::SERVICE_UNAVAILABLE, StatusCode::ACCEPTED]
    {
        let (answer, ()) = tokio::join!(tunnel.connect(request(), SECOND), async {
            served.next().await.refuse(expected)
        });
        let Err(HboneError::Refused { status }) = answer else { panic!("{answer:?}") };
        assert_eq!(status, expected);
    }
    assert_eq!(tunnel.open_streams(), 0);
    assert!(!tunnel.is_closed());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_does_not_come_is_given_up() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let mut served = Served::new(server);
    let answer = tunnel.connect(request(), SECOND).await;
    assert!(matches!(answer, Err(HboneError::ReplyTimeout { after: SECOND })), "{answer:?}");
    assert_eq!(tunnel.open_streams(), 0);
    // The server learns of it when it answers.
    tokio::task::yield_now().await;
    let late = served.next().await.accept(HeaderMap::new());
    assert!(late.is_err() || late.unwrap().split().0.read().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_given_up() {
    let (near, _far) = duplex(1024);
    let opened = Mesh::new().connector.open(near, ADDRESS, &[id(SERVER)], SECOND).await;
    assert!(matches!(opened, Err(HboneError::HandshakeTimeout { after: SECOND })));
}

#[tokio::test]
async fn a_server_that_nobody_is_expected_at_is_refused() {
    let mesh = Mesh::new();
    let (near, far) = duplex(64 << 10);
    let (client, server) = tokio::join!(
        mesh.connector.open(near, ADDRESS, &[], SECOND),
        mesh.acceptor.accept(far, SECOND)
    );
    assert!(matches!(client, Err(HboneError::UnexpectedPeer { .. })));
    server.unwrap_err();
}

#[tokio::test]
async fn an_authority_that_http_cannot_carry_is_refused_before_it_is_sent() {
    let (tunnel, _server) = Mesh::new().tunnel().await;
    for authority in ["", "a b:80", "host/path"] {
        let request = ConnectRequest { authority: authority.to_owned(), ..request() };
        let answer = tunnel.connect(request, SECOND).await;
        assert!(matches!(answer, Err(HboneError::InvalidAuthority { .. })), "{authority}");
    }
}

#[tokio::test]
async fn a_tunnel_ends_with_its_last_handle_and_stream() {
    let (near, far, tunnel, served) = Mesh::new().stream().await;
    drop(tunnel);
    let (mut reader, mut writer) = near.split();
    let (mut far_reader, mut far_writer) = far.split();
    writer.write(Bytes::from_static(b"still here")).await.unwrap();
    assert_eq!(far_reader.read().await.unwrap().unwrap(), "still here");
    writer.finish().unwrap();
    far_writer.finish().unwrap();
    assert!(reader.read().await.unwrap().is_none());
    assert!(far_reader.read().await.unwrap().is_none());
    drop((reader, writer, far_reader, far_writer));
    served.ended().await;
}
