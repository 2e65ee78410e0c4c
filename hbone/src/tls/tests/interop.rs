//! Tests of our record layer against the record layer of rustls, as client and as server.

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::{HandshakeKind, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::*;
use crate::crypto::provider;
use crate::tls::record::{FinishedHandshake, TlsStream};
use crate::tunnel::io::Io;

fn server_config(authority: &CertificateAuthority) -> Arc<ServerConfig> {
    let identity = identity(authority, SERVER);
    let authorities = credentials(&identity).authorities().clone();
    let verifier = verify::Verifier { expected: authorities.any_member(), authorities };
    let mut config = ServerConfig::builder_with_provider(provider(&Cipher::ALL))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new().unwrap();
    Arc::new(config)
}

type RustlsServer = server::TlsStream<DuplexStream>;
type RustlsClient = client::TlsStream<DuplexStream>;

async fn our_client(
    client: &Credentials,
    server: &Arc<ServerConfig>,
) -> (FinishedHandshake<UnbufferedClientConnection, Io>, RustlsServer, Peer) {
    let (near, far) = duplex(64 << 10);
    let expected = [id(SERVER)];
    let acceptor = TlsAcceptor::from(server.clone());
    let (finished, accepted) = tokio::join!(
        client.client().handshake(Box::new(near), ADDRESS, &expected),
        acceptor.accept(far)
    );
    let (finished, peer) = finished.unwrap();
    (finished, accepted.unwrap(), peer)
}

async fn our_server(
    server: &Credentials,
    client: &Arc<ClientConfig>,
) -> (FinishedHandshake<UnbufferedServerConnection, Io>, RustlsClient) {
    let (near, far) = duplex(64 << 10);
    let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    let connector = TlsConnector::from(client.clone());
    let (finished, connected) =
        tokio::join!(server.server().handshake(Box::new(near)), connector.connect(name, far));
    (finished.unwrap(), connected.unwrap())
}

fn our_client_configs(authority: &CertificateAuthority) -> (Credentials, Arc<ServerConfig>) {
    (credentials(&identity(authority, CLIENT)), server_config(authority))
}

fn our_server_configs(authority: &CertificateAuthority) -> (Credentials, Arc<ClientConfig>) {
    let config = config(authority, &[kx_group::X25519MLKEM768]);
    (credentials(&identity(authority, SERVER)), Arc::new(config))
}

async fn send_and_receive(
    from: &mut (impl AsyncWrite + Unpin),
    to: &mut (impl AsyncRead + Unpin),
    content: &[u8],
) {
    let mut read = vec![0; content.len()];
    let write = async {
        from.write_all(content).await.unwrap();
        from.flush().await.unwrap();
    };
    let ((), received) = tokio::join!(write, to.read_exact(&mut read));
    received.unwrap();
    assert!(read == content, "the read data equals the written data");
}

/// Exchanges data in both directions. The peer updates its key after each round.
async fn exchange<T: AsyncRead + AsyncWrite + Unpin>(
    ours: &mut TlsStream<Io>,
    theirs: &mut T,
    mut refresh: impl FnMut(&mut T),
) {
    let content: Vec<u8> = (0..=250).cycle().take(300_000).collect();
    for length in [1, 300_000, 100, 16_384, 200_000, 5, 70_000, 0, 16_385] {
        send_and_receive(theirs, ours, &content[..length]).await;
        send_and_receive(ours, theirs, &content[..length]).await;
        refresh(theirs);
    }
}

#[tokio::test]
async fn exchanges_data_and_keys_with_a_rustls_server() {
    let (client, server) = our_client_configs(&authority("td"));
    for limit in [7, 1 << 24] {
        let (ours, mut theirs, _) = our_client(&client, &server).await;
        let mut ours = ours.into_limited_stream(limit).unwrap();
        let refresh = |theirs: &mut RustlsServer| {
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
        };
        exchange(&mut ours, &mut theirs, refresh).await;
    }
}

#[tokio::test]
async fn exchanges_data_and_keys_with_a_rustls_client() {
    let (server, client) = our_server_configs(&authority("td"));
    for limit in [7, 1 << 24] {
        let (ours, mut theirs) = our_server(&server, &client).await;
        let mut ours = ours.into_limited_stream(limit).unwrap();
        let refresh = |theirs: &mut RustlsClient| {
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
        };
        exchange(&mut ours, &mut theirs, refresh).await;
    }
}

#[tokio::test]
async fn resumes_a_session_with_a_rustls_server() {
    let (client, server) = our_client_configs(&authority("td"));
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed] {
        let (ours, mut theirs, peer) = our_client(&client, &server).await;
        assert_eq!(theirs.get_ref().1.handshake_kind(), Some(expected));
        assert_eq!(peer.resumed, expected == HandshakeKind::Resumed);
        // The server sends the tickets before the data.
        send_and_receive(&mut theirs, &mut ours.into_stream().unwrap(), b"data").await;
    }
}

#[tokio::test]
async fn resumes_a_session_with_a_rustls_client() {
    let (server, client) = our_server_configs(&authority("td"));
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed] {
        let (ours, mut theirs) = our_server(&server, &client).await;
        assert_eq!(theirs.get_ref().1.handshake_kind(), Some(expected));
        send_and_receive(&mut ours.into_stream().unwrap(), &mut theirs, b"data").await;
    }
}

#[tokio::test]
async fn handshake_succeeds_in_small_records() {
    let authority = authority("td");
    for size in [32, 33, 100, 1000] {
        let (client, server) = our_client_configs(&authority);
        let mut server = Arc::unwrap_or_clone(server);
        server.max_fragment_size = Some(size);
        let server = Arc::new(server);
        for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let (ours, mut theirs, _) = our_client(&client, &server).await;
            assert_eq!(theirs.get_ref().1.handshake_kind(), Some(expected), "{size}");
            // The tickets span records.
            send_and_receive(&mut theirs, &mut ours.into_stream().unwrap(), &[7; 5000]).await;
        }
        let (server, client) = our_server_configs(&authority);
        let mut client = Arc::unwrap_or_clone(client);
        client.max_fragment_size = Some(size);
        let (ours, mut theirs) = our_server(&server, &Arc::new(client)).await;
        send_and_receive(&mut theirs, &mut ours.into_stream().unwrap(), &[7; 5000]).await;
    }
}

#[tokio::test]
async fn end_is_clean_only_with_close_notify() {
    let (client, server) = our_client_configs(&authority("td"));
    let (ours, mut theirs, _) = our_client(&client, &server).await;
    let mut ours = ours.into_stream().unwrap();
    ours.write_all(b"last").await.unwrap();
    ours.shutdown().await.unwrap();
    let mut read = Vec::new();
    theirs.read_to_end(&mut read).await.unwrap();
    assert_eq!(read, b"last");
    // The other direction stays open.
    send_and_receive(&mut theirs, &mut ours, b"answer").await;
    theirs.shutdown().await.unwrap();
    assert_eq!(ours.read(&mut [0; 10]).await.unwrap(), 0);

    let (ours, theirs, _) = our_client(&client, &server).await;
    drop(theirs);
    let mut ours = ours.into_stream().unwrap();
    let error = ours.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

    let (ours, mut theirs, _) = our_client(&client, &server).await;
    drop(ours.into_stream().unwrap());
    let error = theirs.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

/// A transport that splits data into pieces, and flips one bit of the received data.
struct Tampered {
    io: DuplexStream,
    piece: usize,
    /// The number of bytes before the flipped bit.
    position: usize,
}

impl AsyncRead for Tampered {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        let mut bytes = vec![0; self.piece.min(buf.remaining())];
        let mut piece = tokio::io::ReadBuf::new(&mut bytes);
        std::task::ready!(std::pin::Pin::new(&mut self.io).poll_read(cx, &mut piece))?;
        if let Some(byte) = piece.filled_mut().get_mut(self.position) {
            *byte ^= 0x10;
        }
        self.position = self.position.wrapping_sub(piece.filled().len());
        buf.put_slice(piece.filled());
        std::task::Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tampered {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        let length = self.piece.min(buf.len());
        std::pin::Pin::new(&mut self.io).poll_write(cx, &buf[..length])
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// If a length field changes, both sides wait for each other. Each handshake therefore has a
/// timeout in paused time.
#[tokio::test(start_paused = true)]
async fn handshake_succeeds_in_pieces_and_fails_with_changed_bit() {
    let authority = authority("td");
    let (ours, theirs) = our_client_configs(&authority);
    let (our_server, their_client) = our_server_configs(&authority);
    let expected = [id(SERVER)];
    let intact = usize::MAX;
    let tampered = (0..1450).step_by(3).map(|position| (1 << 14, position));
    let pieces = [1, 3, 1000].map(|piece| (piece, intact));
    let (mut connections, mut acceptances) = (0, 0);
    for (piece, position) in pieces.into_iter().chain(tampered) {
        let (near, far) = duplex(64 << 10);
        let near = Tampered { io: near, piece, position };
        let accept = TlsAcceptor::from(theirs.clone()).accept(far);
        let connect = ours.client().handshake(Box::new(near), ADDRESS, &expected);
        let (connected, _) = tokio::join!(timeout(SECOND, connect), timeout(SECOND, accept));
        connections += usize::from(connected.is_ok_and(|connected| connected.is_ok()));

        let (near, far) = duplex(64 << 10);
        let near = Tampered { io: near, piece, position };
        let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
        let connector = TlsConnector::from(their_client.clone());
        let (accepted, _) = tokio::join!(
            timeout(SECOND, our_server.server().handshake(Box::new(near))),
            timeout(SECOND, connector.connect(name, far))
        );
        acceptances += usize::from(accepted.is_ok_and(|accepted| accepted.is_ok()));
    }
    // rustls ignores the legacy version of the first three records (RFC 8446 section 5.1).
    assert!((3..=6).contains(&connections), "{connections}");
    assert!((3..=6).contains(&acceptances), "{acceptances}");
}
