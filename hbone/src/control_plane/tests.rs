//! A stream against a scripted gRPC server over TLS.

use std::fs;
use std::net::SocketAddr;

use bytes::Bytes;
use http::Response;
use prost::Message as _;
use tokio::io::duplex;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::codec::BufferSettings;
use underpass_config::{Node, XdsHeader};

use super::*;
use crate::ca::CertificateAuthority;
use crate::ca::tests::TempDir;
use crate::identity::source::testing::DialOnce;

const NAME: &str = "istiod.test";

/// A control plane on loopback, and the files of its client.
struct Plane {
    dir: TempDir,
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Plane {
    async fn new(name: &str) -> Self {
        let dir = TempDir::new(name);
        let ca = CertificateAuthority::init(&dir.0, "td".parse().unwrap()).unwrap();
        let server = ca.issue_server(&[NAME.to_owned()], Duration::from_secs(600)).unwrap();
        server.write(&dir.0.join("server")).unwrap();
        let client = ca.issue(&"spiffe://td/ns/a/sa/b".parse().unwrap(), Duration::from_secs(600));
        client.unwrap().write(&dir.0.join("client")).unwrap();
        fs::write(dir.0.join("token"), "secret\n").unwrap();
        let acceptor = acceptor(&dir);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { dir, listener, acceptor }
    }

    fn client(&self, change: impl FnOnce(&mut XdsSettings)) -> ControlPlaneClient<DialPlane> {
        let file = |name: &str| self.dir.0.join(name);
        let mut settings = XdsSettings {
            address: "https://127.0.0.1:15012".to_owned(),
            server_name: Some(NAME.to_owned()),
            roots: file("roots.pem"),
            token: Some(file("token")),
            client: Some((file("client.pem"), file("client.key"))),
            cluster_id: "c1".to_owned(),
            headers: vec![XdsHeader { name: "x-a".to_owned(), value: "b c".to_owned() }],
            on_demand: false,
            unready_after: None,
            name: "pod".to_owned(),
            namespace: "ns".to_owned(),
        };
        change(&mut settings);
        let address = self.listener.local_addr().unwrap();
        ControlPlaneClient::new(settings, DialPlane(address)).unwrap()
    }

    /// Accepts one stream and answers it with `answer`.
    async fn serve(&self, answer: &[u8], status: Option<&str>) -> Served {
        let (tcp, _) = self.listener.accept().await.unwrap();
        let tls = self.acceptor.accept(tcp).await.unwrap();
        let mut connection = h2::server::handshake(tls).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let (parts, mut body) = request.into_parts();
        let message = body.data().await.unwrap().unwrap();
        let message = DeltaRequest::decode(message.slice(5..)).unwrap();
        let headers = Response::builder().header("content-type", "application/grpc").body(());
        let mut stream = respond.send_response(headers.unwrap(), false).unwrap();
        stream.send_data(Bytes::copy_from_slice(answer), false).unwrap();
        if let Some(status) = status {
            let status = http::HeaderMap::from_iter([
                ("grpc-status".parse().unwrap(), status.parse().unwrap()),
                ("grpc-message".parse().unwrap(), "why".parse().unwrap()),
            ]);
            stream.send_trailers(status).unwrap();
        }
        Served { headers: parts.headers, message, _stream: stream }
    }
}

/// A stream that the control plane accepted, open while this exists.
struct Served {
    headers: http::HeaderMap,
    message: DeltaRequest,
    _stream: h2::SendStream<Bytes>,
}

fn acceptor(dir: &TempDir) -> TlsAcceptor {
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        crate::trust::bundle::Bundle::from_pem(&dir.0, &fs::read(dir.0.join("roots.pem")).unwrap())
            .unwrap()
            .roots(),
        crate::crypto::provider(&underpass_config::Cipher::ALL),
    );
    let (certificate, key) = (dir.0.join("server.pem"), dir.0.join("server.key"));
    let (chain, key) = endpoint::read_client((&certificate, &key)).unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(crate::crypto::provider(
        &underpass_config::Cipher::ALL,
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])
    .unwrap()
    .with_client_cert_verifier(verifier.build().unwrap())
    .with_single_cert(chain, key)
    .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

/// Dials the control plane, and ignores the address in the settings.
#[derive(Debug)]
struct DialPlane(SocketAddr);

impl Dial for DialPlane {
    type Io = tokio::net::TcpStream;

    async fn dial(&self, _: SocketAddr) -> io::Result<Self::Io> {
        tokio::net::TcpStream::connect(self.0).await
    }
}

fn request() -> DeltaRequest {
    DeltaRequest { type_url: "type".to_owned(), node: Some(Node::default()), ..Default::default() }
}

fn framed(response: &DeltaResponse) -> Vec<u8> {
    let message = response.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], &message].concat()
}

#[tokio::test]
async fn stream_authenticates_and_carries_both_directions() {
    let plane = Plane::new("xds-stream").await;
    let client = plane.client(|_| {});
    let response = DeltaResponse { nonce: "n".to_owned(), ..DeltaResponse::default() };
    let sent = framed(&response);
    let served = plane.serve(&sent, None);
    let (stream, served) = tokio::join!(client.open(vec![request()]), served);
    let mut stream = stream.unwrap();
    assert_eq!(served.message, request());
    let header = |name: &str| served.headers[name].to_str().unwrap();
    let expected = ["Bearer secret", "c1", "b c"];
    assert_eq!(["authorization", "clusterid", "x-a"].map(header), expected);
    assert_eq!(stream.next().await.unwrap(), response);
}

#[tokio::test(start_paused = true)]
async fn answers_that_control_plane_does_not_read_are_bounded() {
    let (requests, _unread) = mpsc::channel(MAX_QUEUED);
    let decoder = ProstCodec::<DeltaRequest, DeltaResponse>::raw_decoder(BufferSettings::default());
    let responses = Streaming::new_empty(decoder, tonic::body::Body::empty());
    let stream = ControlPlaneStream { requests, responses };
    for _ in 0..MAX_QUEUED {
        stream.send(request()).await.unwrap();
    }
    let error = stream.send(request()).await.unwrap_err();
    assert_eq!(error.to_string(), "it has read no answer for 30s");
}

/// The time of a test is paused, so it passes while nothing else can run.
#[tokio::test]
async fn stream_of_hanging_control_plane_ends() {
    let plane = Plane::new("xds-hangs").await;
    let client = plane.client(|_| {});
    let accepting = async {
        let (tcp, _) = plane.listener.accept().await.unwrap();
        let tls = plane.acceptor.accept(tcp).await.unwrap();
        let mut connection = h2::server::handshake(tls).await.unwrap();
        let (_, mut respond) = connection.accept().await.unwrap().unwrap();
        let headers = Response::builder().header("content-type", "application/grpc").body(());
        let stream = respond.send_response(headers.unwrap(), false).unwrap();
        // Send the headers, and then read nothing more, no PING either.
        tokio::select! {
            _ = connection.accept() => {}
            () = tokio::task::yield_now() => {}
        }
        (connection, stream)
    };
    let (stream, _hanging) = tokio::join!(client.open(vec![request()]), accepting);
    let mut stream = stream.unwrap();
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    let error = stream.next().await.unwrap_err();
    assert!(matches!(error, ControlPlaneError::Lost(_)), "{error}");
    // The connection was opened before the pause.
    assert!((39..=40).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[tokio::test]
async fn token_is_read_for_each_stream() {
    let plane = Plane::new("xds-token").await;
    let client = plane.client(|_| {});
    for token in ["one", "two"] {
        fs::write(plane.dir.0.join("token"), token).unwrap();
        let served = plane.serve(&[], None);
        let (stream, served) = tokio::join!(client.open(vec![request()]), served);
        stream.unwrap();
        assert_eq!(served.headers["authorization"], format!("Bearer {token}"));
    }
    fs::remove_file(plane.dir.0.join("token")).unwrap();
    let error = client.open(vec![request()]).await.map(drop).unwrap_err();
    assert!(matches!(error, ControlPlaneError::Connect(HboneError::Credential { .. })), "{error}");
}

#[tokio::test]
async fn status_of_stream_names_cause() {
    let plane = Plane::new("xds-status").await;
    let client = plane.client(|_| {});
    for (status, message) in [
        ("16", "it refused this client (\"why\")"),
        ("8", "it is not available (\"why\")"),
        ("3", "it closed the stream with status Client specified an invalid argument (\"why\")"),
        ("0", "it closed the stream"),
    ] {
        let served = plane.serve(&[], Some(status));
        let (stream, _served) = tokio::join!(client.open(vec![request()]), served);
        assert_eq!(stream.unwrap().next().await.unwrap_err().to_string(), message);
    }
}

#[tokio::test]
async fn broken_message_ends_stream() {
    let plane = Plane::new("xds-broken").await;
    let client = plane.client(|_| {});
    // Too long, compressed, not protobuf.
    for bytes in [&[0, 255, 255, 255, 255][..], &[1, 0, 0, 0, 1, 7], &[0, 0, 0, 0, 2, 255, 255]] {
        let served = plane.serve(bytes, None);
        let (stream, _served) = tokio::join!(client.open(vec![request()]), served);
        stream.unwrap().next().await.unwrap_err();
    }
}

#[tokio::test]
async fn server_with_other_name_or_root_is_refused() {
    let plane = Plane::new("xds-name").await;
    let client = plane.client(|settings| settings.server_name = Some("other.test".to_owned()));
    let accepted = async {
        let (tcp, _) = plane.listener.accept().await.unwrap();
        plane.acceptor.accept(tcp).await.map(drop).unwrap_err();
    };
    let (error, ()) = tokio::join!(client.open(vec![request()]), accepted);
    let error = error.map(drop).unwrap_err();
    let hint = error.hint().unwrap();
    assert!(hint.contains("mesh.xds.roots") && hint.contains("mesh.xds.server_name"), "{error}");
}

#[tokio::test]
async fn unusable_settings_are_reported_before_connecting() {
    let plane = Plane::new("xds-settings").await;
    let settings = plane.client(|_| {}).settings;
    let (io, _) = duplex(1);
    let dial = DialOnce(std::sync::Mutex::new(Some(io)));
    let missing = XdsSettings { roots: plane.dir.0.join("missing"), ..settings };
    let error = ControlPlaneClient::new(missing, dial).map(drop).unwrap_err();
    assert!(matches!(error, ControlPlaneError::Connect(HboneError::Credential { .. })), "{error}");
}

#[tokio::test]
async fn reports_all_problems_of_settings_and_files() {
    let plane = Plane::new("control-plane-problems").await;
    let settings = plane.client(|_| {}).settings;
    assert_eq!(control_plane_problems(&settings).len(), 0);
    let file = |name: &str| plane.dir.0.join(name);
    let settings = XdsSettings {
        roots: file("token"),
        token: Some(file("nowhere")),
        client: Some((file("client.pem"), file("server.key"))),
        headers: vec![XdsHeader { name: "x a".to_owned(), value: String::new() }],
        ..settings
    };
    let texts: Vec<_> = control_plane_problems(&settings).iter().map(ToString::to_string).collect();
    for (text, part) in texts.iter().zip([
        "the header \"x a\" cannot be sent",
        "token: the file has no PEM section",
        "nowhere: No such file",
        "server.key: the key does not belong to the certificate",
    ]) {
        assert!(text.contains(part), "{texts:?}");
    }
    assert_eq!(texts.len(), 4, "{texts:?}");
}
