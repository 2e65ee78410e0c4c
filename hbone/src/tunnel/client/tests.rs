//! Tests of failing requests and of silent peers.

use http::header::HeaderValue;
use tokio::io::{AsyncWriteExt as _, duplex};
use tokio::time::{Instant, sleep};

use super::*;
use crate::testing::frames::{HEADERS, PING, SETTINGS, frame, head};
use crate::testing::{
    ADDRESS, CLIENT, HOUR, Mesh, SECOND, SERVER, Served, authority, credentials, id, identity,
    request,
};
use crate::tunnel::authority::Authority;
use crate::tunnel::inspect::TunnelLimit;

#[tokio::test]
async fn request_arrives_with_authority_and_headers() {
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
async fn status_other_than_200_is_a_refusal() {
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
async fn missing_answer_times_out() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let mut served = Served::new(server);
    let answer = tunnel.connect(request(), SECOND).await;
    assert!(matches!(answer, Err(HboneError::ReplyTimeout { after: SECOND })), "{answer:?}");
    assert_eq!(tunnel.open_streams(), 0);
    // The server detects the cancellation when it answers.
    tokio::task::yield_now().await;
    let late = served.next().await.accept(HeaderMap::new());
    assert!(late.is_err() || late.unwrap().split().0.read().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn silent_server_times_out() {
    let (near, _far) = duplex(1024);
    let opened = Mesh::new().connector.open(near, ADDRESS, &[id(SERVER)], SECOND).await;
    assert!(matches!(opened, Err(HboneError::HandshakeTimeout { after: SECOND })));
}

#[tokio::test]
async fn empty_list_of_expected_peers_rejects_server() {
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
async fn rejects_invalid_authority_before_sending() {
    let (tunnel, _server) = Mesh::new().tunnel().await;
    for authority in ["", "a b:80", "host/path"] {
        let request = ConnectRequest { authority: authority.to_owned(), ..request() };
        let answer = tunnel.connect(request, SECOND).await;
        assert!(matches!(answer, Err(HboneError::InvalidAuthority { .. })), "{authority}");
    }
}

#[tokio::test]
async fn tunnel_ends_with_last_handle_and_stream() {
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

/// Opens a tunnel to a server that sends `bytes` instead of HTTP/2. The second value keeps the
/// server's end open.
async fn tunnel_to(bytes: Vec<u8>) -> (Tunnel, impl Sized) {
    let authority = authority("td");
    let server = credentials(&identity(&authority, SERVER));
    let client = credentials(&identity(&authority, CLIENT)).fixed();
    let connector = Connector::new(client, ClientSettings::default());
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let serve = async {
        let (mut io, _) = server.server().accept(Box::new(far)).await.unwrap();
        io.write_all(&bytes).await.unwrap();
        io.flush().await.unwrap();
        io
    };
    let (tunnel, io) = tokio::join!(connector.open(near, ADDRESS, &expected, SECOND), serve);
    (tunnel.unwrap(), io)
}

#[tokio::test(start_paused = true)]
async fn endless_header_block_of_server_closes_tunnel() {
    let settings = frame(SETTINGS, 0, 0, &[]);
    let block = frame(HEADERS, 0, 1, &[]);
    let silent = (Vec::new(), TunnelLimit::UnfinishedFrame, 10 * SECOND);
    let open = ([&settings[..], &block].concat(), TunnelLimit::UnfinishedFrame, 10 * SECOND);
    let large = [&settings[..], &head(17 << 10, HEADERS, 0, 1)].concat();
    let large = (large, TunnelLimit::HeaderBlock, Duration::ZERO);
    let flood = [&settings[..], &frame(PING, 0, 0, &[0; 8]).repeat(2001)].concat();
    let flood = (flood, TunnelLimit::FrameRate, Duration::ZERO);
    for (bytes, expected, after) in [silent, open, large, flood] {
        let start = Instant::now();
        let (tunnel, _io) = tunnel_to(bytes).await;
        let answer = tunnel.connect(request(), 25 * SECOND).await;
        let Err(HboneError::PeerLimit { limit }) = answer else { panic!("{answer:?}") };
        assert_eq!(limit, expected);
        assert!(start.elapsed() >= after && start.elapsed() <= after + SECOND);
    }
}

#[tokio::test(start_paused = true)]
async fn opens_no_stream_once_a_certificate_has_expired() {
    let (tunnel, server) = Mesh::new().tunnel().await;
    let _served = Served::new(server);
    sleep(HOUR).await;
    let answer = tunnel.connect(request(), SECOND).await;
    assert!(matches!(answer, Err(HboneError::TunnelExpired { .. })), "{answer:?}");
}

/// Probes a server with `served` credentials as a client with `ours`.
async fn probe(ours: &Credentials, served: &Credentials) -> Result<String, HboneError> {
    let mesh = Mesh::of(
        ours.clone().fixed(),
        ClientSettings::default(),
        served.clone().fixed(),
        crate::tunnel::settings::ServerSettings::default(),
    );
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let (probed, _) = tokio::join!(mesh.connector.probe(near, ADDRESS, &expected, SECOND), async {
        let mut server = mesh.acceptor.accept(far, SECOND).await?;
        assert!(server.next().await.is_none(), "a probe opens no stream");
        Ok::<_, HboneError>(())
    });
    probed.map(|peer| peer.spiffe_id().to_string())
}

#[tokio::test]
async fn probe_returns_identity_of_peer_that_accepts_certificate() {
    let authority = authority("td");
    let [ours, theirs] = [CLIENT, SERVER].map(|who| credentials(&identity(&authority, who)));
    assert_eq!(probe(&ours, &theirs).await.unwrap(), SERVER);
}

#[tokio::test]
async fn probe_reports_that_peer_refuses_our_certificate() {
    let (one, other) = (authority("td"), authority("td"));
    // Only the client trusts both authorities.
    let issued = one.issue(&id(CLIENT), HOUR).unwrap();
    let roots = format!("{}{}", one.roots_pem(), other.roots_pem());
    let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
    let ours = crate::identity::Identity::from_pem(chain, key, roots.as_bytes()).unwrap();
    let error = probe(&credentials(&ours), &credentials(&identity(&other, SERVER))).await;
    let error = error.unwrap_err();
    assert!(matches!(error, HboneError::CertificateRefused { .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn probe_of_silent_peer_times_out() {
    let authority = authority("td");
    let ours = credentials(&identity(&authority, CLIENT)).fixed();
    let (near, _far) = duplex(64 << 10);
    let connector = Connector::new(ours, ClientSettings::default());
    let error = connector.probe(near, ADDRESS, &[id(SERVER)], SECOND).await.unwrap_err();
    assert!(matches!(error, HboneError::HandshakeTimeout { after: SECOND }), "{error:?}");
}
