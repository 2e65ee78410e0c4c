//! Tests of the CA server over loopback.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, KeyPair, SanType};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Code;

use super::*;
use crate::ca::tests::TempDir;
use crate::ca::{IMPERSONATED, IstioCertificateRequest, IstioCertificateResponse};
use crate::identity::source::testing::{Connection, DialOnce, ask, connect, connect_with};
use crate::identity::svid::workload_id;
use crate::testing::{CLIENT, HOUR, SERVER};

pub(crate) const NAME: &str = "ca.test";

/// A running CA server with its own temporary directory.
pub(crate) struct TestCa {
    pub(crate) dir: TempDir,
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<()>>,
}

impl TestCa {
    pub(crate) async fn new(name: &str, clients: &str) -> Self {
        let dir = TempDir::new(name);
        CertificateAuthority::init(&dir.0, "td".parse().unwrap()).unwrap();
        fs::write(dir.0.join("clients.yaml"), clients).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut served = Self { dir, address, stop: None, running: None };
        served.start().await;
        served
    }

    pub(crate) async fn start(&mut self) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = CaServer::new(self.settings(), listener, &FileWatcher::default()).unwrap();
        self.running = Some(tokio::spawn(server.run(async {
            let _dropped = stopped.await;
        })));
        self.stop = Some(stop);
    }

    fn settings(&self) -> CaServerSettings {
        CaServerSettings {
            dir: self.dir.0.clone(),
            clients: self.file("clients.yaml"),
            names: vec![NAME.to_owned()],
            max_ttl: HOUR,
        }
    }

    /// A TLS acceptor with the CA server's name, for scripted servers.
    pub(crate) fn tls(&self) -> TlsAcceptor {
        own_tls(&self.settings()).unwrap().into()
    }

    pub(crate) async fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.running.take().unwrap().await.unwrap();
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.0.join(name)
    }
}

pub(crate) const CLIENTS: &str = "clients:
- {token: client-token, identities: [spiffe://td/ns/default/sa/client]}
- {token: node-token, identities: [\"spiffe://td/ns/default/*\"]}
- {token: stray-token, identities: [spiffe://elsewhere/a]}
";

fn csr(uris: &[&str]) -> String {
    let mut params = CertificateParams::default();
    let uri = |uri: &&str| SanType::URI((*uri).try_into().unwrap());
    params.subject_alt_names = uris.iter().map(uri).collect();
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

fn request(csr: String, validity_duration: i64) -> IstioCertificateRequest {
    IstioCertificateRequest { csr, validity_duration, metadata: None }
}

fn impersonating(csr: String, kind: Kind) -> IstioCertificateRequest {
    let fields = [(IMPERSONATED.to_owned(), Value { kind: Some(kind) })].into();
    IstioCertificateRequest { metadata: Some(Struct { fields }), ..request(csr, 60) }
}

/// The identity in a leaf certificate, and its validity in seconds, including the clock-skew
/// margin.
fn identity_and_validity(pem: &str) -> (String, i64) {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).unwrap();
    let validity = leaf.validity();
    let seconds = validity.not_after.timestamp() - validity.not_before.timestamp();
    (workload_id(&der).unwrap().to_string(), seconds)
}

#[tokio::test]
async fn issues_listed_identity_with_root_last_and_capped_validity() {
    let served = TestCa::new("serve-issue", CLIENTS).await;
    let roots = fs::read_to_string(served.file("roots.pem")).unwrap();
    for (seconds, expected) in [(60, 66), (0, 3900), (-5, 3900), (i64::MAX, 3900)] {
        let answer = ask(&served, Some("Bearer client-token"), request(csr(&[CLIENT]), seconds));
        let chain = answer.await.unwrap().cert_chain;
        assert_eq!(chain.len(), 2);
        assert_eq!(identity_and_validity(&chain[0]), (CLIENT.to_owned(), expected), "{seconds}");
        assert_eq!(chain[1], roots);
    }
    // The request may name the identity in the CSR, in the metadata, or in both.
    let text = |id: &str| Kind::StringValue(id.to_owned());
    for csr in [csr(&[]), csr(&[SERVER])] {
        let asked = ask(&served, Some("bearer node-token"), impersonating(csr, text(SERVER)));
        assert_eq!(identity_and_validity(&asked.await.unwrap().cert_chain[0]).0, SERVER);
    }
}

#[tokio::test]
async fn refuses_unlisted_token_and_identity_with_reason() {
    let served = TestCa::new("serve-refuse", CLIENTS).await;
    let text = |id: &str| Kind::StringValue(id.to_owned());
    let plain = || request(csr(&[CLIENT]), 60);
    let node = Some("Bearer node-token");
    let cases = [
        (None, plain(), Code::Unauthenticated, "missing header"),
        (Some("client-token"), plain(), Code::Unauthenticated, "missing header"),
        (Some("Basic client-token"), plain(), Code::Unauthenticated, "missing header"),
        (Some("Bearer client-toke"), plain(), Code::Unauthenticated, "not in the clients file"),
        (
            Some("Bearer client-token"),
            request(csr(&[SERVER]), 60),
            Code::PermissionDenied,
            "does not list spiffe://td/ns/default/sa/server",
        ),
        (
            node,
            impersonating(csr(&[]), text("spiffe://td/ns/other/sa/x")),
            Code::PermissionDenied,
            "does not list",
        ),
        (
            Some("Bearer stray-token"),
            request(csr(&["spiffe://elsewhere/a"]), 60),
            Code::PermissionDenied,
            "trust domain td",
        ),
        (node, request(csr(&[]), 60), Code::InvalidArgument, "contains a SPIFFE identity"),
        (node, request(csr(&[CLIENT, SERVER]), 60), Code::InvalidArgument, "at most one URI"),
        (node, request(csr(&["https://x"]), 60), Code::InvalidArgument, "at most one URI"),
        (
            node,
            request("no csr".to_owned(), 60),
            Code::InvalidArgument,
            "the certificate request is not valid PEM",
        ),
        (
            node,
            impersonating(csr(&[CLIENT]), text(SERVER)),
            Code::InvalidArgument,
            "the CSR is for spiffe://td/ns/default/sa/client, but ImpersonatedIdentity is",
        ),
        (node, impersonating(csr(&[]), text("td/x")), Code::InvalidArgument, "is not a SPIFFE"),
        (
            node,
            impersonating(csr(&[]), Kind::NumberValue(1.0)),
            Code::InvalidArgument,
            "not a string",
        ),
        (node, request("x".repeat(65 << 10), 60), Code::OutOfRange, "decoded message length"),
    ];
    for (header, message, code, reason) in cases {
        let status = ask(&served, header, message).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(reason), "{reason} is not in {}", status.message());
    }
}

#[tokio::test]
async fn hides_own_file_errors_from_clients() {
    let served = TestCa::new("serve-trouble", CLIENTS).await;
    fs::rename(served.file("ca.key"), served.file("gone")).unwrap();
    let asked = || ask(&served, Some("Bearer client-token"), request(csr(&[CLIENT]), 60));
    let status = asked().await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(!status.message().contains("ca.key"), "{}", status.message());
    fs::rename(served.file("gone"), served.file("ca.key")).unwrap();
    asked().await.unwrap();
}

#[tokio::test]
async fn rejects_unknown_method() {
    let served = TestCa::new("serve-method", CLIENTS).await;
    let mut grpc = tonic::client::Grpc::with_origin(
        connect(&served, NAME).await.unwrap(),
        "https://ca.test".parse().unwrap(),
    );
    let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let status = grpc.unary(tonic::Request::new(()), path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

#[tokio::test]
async fn server_certificate_covers_only_its_names_and_address() {
    let served = TestCa::new("serve-names", CLIENTS).await;
    for name in [NAME, "127.0.0.1"] {
        connect(&served, name).await.unwrap();
    }
    for name in ["other.test", "127.0.0.2"] {
        connect(&served, name).await.unwrap_err();
    }
}

#[tokio::test]
async fn silent_client_blocks_neither_others_nor_shutdown() {
    let mut served = TestCa::new("serve-silent", CLIENTS).await;
    let silent = TcpStream::connect(served.address).await.unwrap();
    let idle = connect(&served, NAME).await.unwrap();
    ask(&served, Some("Bearer client-token"), request(csr(&[CLIENT]), 60)).await.unwrap();
    drop(silent);
    served.stop().await;
    drop(idle);
}

#[tokio::test]
async fn server_rejects_invalid_settings() {
    let dir = TempDir::new("serve-start");
    CertificateAuthority::init(&dir.0, "td".parse().unwrap()).unwrap();
    let settings = |clients: &str, names: &[&str]| CaServerSettings {
        dir: dir.0.clone(),
        clients: dir.0.join(clients),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        max_ttl: HOUR,
    };
    let new = async |settings| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        CaServer::new(settings, listener, &FileWatcher::default()).map(|_| ())
    };
    let write = |text: &str| fs::write(dir.0.join("clients.yaml"), text).unwrap();
    write("clients: [\n");
    assert!(matches!(new(settings("clients.yaml", &[])).await, Err(HboneError::Clients { .. })));
    assert!(matches!(new(settings("absent.yaml", &[])).await, Err(HboneError::Clients { .. })));
    write("");
    let bad_name = new(settings("clients.yaml", &["not a name"])).await;
    let what = CredentialProblem::ServerName.to_string();
    assert!(bad_name.unwrap_err().to_string().contains(&what));
    new(settings("clients.yaml", &["ca.test", "::1"])).await.unwrap();
    fs::remove_file(Path::new(&dir.0).join("ca.key")).unwrap();
    assert!(matches!(new(settings("clients.yaml", &[])).await, Err(HboneError::Credential { .. })));
}

#[tokio::test]
async fn accepts_client_that_is_added_later() {
    let served = TestCa::new("serve-reload", "clients: []\n").await;
    let asked = || ask(&served, Some("Bearer client-token"), request(csr(&[CLIENT]), 60));
    assert_eq!(asked().await.unwrap_err().code(), Code::Unauthenticated);
    fs::write(served.file("clients.yaml"), CLIENTS).unwrap();
    poll_files().await;
    asked().await.unwrap();
    // The server ignores an invalid file, and applies a later valid one.
    fs::write(served.file("clients.yaml"), "clients: [\n").unwrap();
    poll_files().await;
    asked().await.unwrap();
    fs::write(served.file("clients.yaml"), "clients: []\n").unwrap();
    poll_files().await;
    assert_eq!(asked().await.unwrap_err().code(), Code::Unauthenticated);
}

/// Advances tokio's clock until the server has polled its files.
async fn poll_files() {
    tokio::time::pause();
    sleep(HOUR / 2).await;
    tokio::time::resume();
}

#[tokio::test(start_paused = true)]
async fn server_certificate_is_renewed_at_half_of_its_lifetime() {
    let served = TestCa::new("serve-renew", CLIENTS).await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut server = CaServer::new(served.settings(), listener, &FileWatcher::default()).unwrap();
    let start = tokio::time::Instant::now();
    for round in 1..=3 {
        let before = server.tls.clone();
        server.renewal.due().await;
        server.renew();
        assert!(!Arc::ptr_eq(&before, &server.tls));
        let hours = start.elapsed().as_secs_f64() / 3600.0 / f64::from(round);
        assert!((10.7..=13.3).contains(&hours), "{hours}");
    }
    fs::remove_file(served.file("ca.key")).unwrap();
    let before = server.tls.clone();
    server.renew();
    assert!(Arc::ptr_eq(&before, &server.tls), "the previous one stays");
}

/// Serves one in-memory connection. Returns the client's end and the server's task.
fn in_memory(served: &TestCa) -> (DialOnce, JoinHandle<()>) {
    let (clients_file, clients) =
        ClientsFile::open(served.file("clients.yaml"), &FileWatcher::default()).unwrap();
    drop(clients_file);
    let service = Arc::new(Service::new(served.dir.0.clone(), HOUR, clients));
    let tls = own_tls(&served.settings()).unwrap();
    let (near, far) = tokio::io::duplex(64 << 10);
    let serving = tokio::spawn(async move {
        let stop = watch::Sender::new(());
        let peer: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let slot = ConnectionSlots::new(1, 1).take(peer.ip()).unwrap();
        serve(far, peer, tls, service, slot, stop.subscribe()).await;
    });
    (DialOnce(std::sync::Mutex::new(Some(near))), serving)
}

#[tokio::test(start_paused = true)]
async fn client_without_handshake_is_disconnected() {
    let served = TestCa::new("serve-mute", CLIENTS).await;
    let (_near, serving) = in_memory(&served);
    let start = tokio::time::Instant::now();
    serving.await.unwrap();
    assert_eq!(start.elapsed().as_secs(), HANDSHAKE_TIMEOUT.as_secs());
}

async fn ask_on(
    connection: &mut Connection,
    authorization: &'static str,
) -> Result<IstioCertificateResponse, Status> {
    let origin = "https://ca.test".parse().unwrap();
    let mut grpc = tonic::client::Grpc::with_origin(connection, origin);
    let mut request = tonic::Request::new(request(csr(&[CLIENT]), 60));
    request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(crate::ca::CREATE_CERTIFICATE);
    Ok(grpc.unary(request, path, tonic_prost::ProstCodec::default()).await?.into_inner())
}

#[tokio::test(start_paused = true)]
async fn connection_without_token_ends_after_first_request_deadline() {
    let served = TestCa::new("serve-idle", CLIENTS).await;
    for asks in [false, true] {
        let (near, serving) = in_memory(&served);
        let mut connection = connect_with(&served, NAME, &near).await.unwrap();
        let start = tokio::time::Instant::now();
        if asks {
            let refused = ask_on(&mut connection, "Bearer stranger").await.unwrap_err();
            assert_eq!(refused.code(), Code::Unauthenticated);
        }
        serving.await.unwrap();
        assert_eq!(start.elapsed().as_secs(), FIRST_REQUEST_TIMEOUT.as_secs(), "{asks}");
        drop(connection);
    }
}

#[tokio::test(start_paused = true)]
async fn authenticated_connection_ends_at_maximum_age() {
    let served = TestCa::new("serve-age", CLIENTS).await;
    let (near, serving) = in_memory(&served);
    let mut connection = connect_with(&served, NAME, &near).await.unwrap();
    let start = tokio::time::Instant::now();
    ask_on(&mut connection, "Bearer client-token").await.unwrap();
    serving.await.unwrap();
    assert_eq!(start.elapsed().as_secs(), MAX_CONNECTION_AGE.as_secs());
    drop(connection);
}

/// Connects from a given loopback address.
struct DialFrom(Ipv4Addr, SocketAddr);

impl crate::pool::Dial for DialFrom {
    type Io = TcpStream;

    async fn dial(&self, _: SocketAddr) -> std::io::Result<TcpStream> {
        let Self(source, server) = self;
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind((*source, 0).into())?;
        socket.connect(*server).await
    }
}

#[tokio::test]
async fn idle_connections_do_not_block_a_new_client() {
    let served = TestCa::new("serve-flood", CLIENTS).await;
    let mut flood = Vec::new();
    // Open more connections than the total limit, and more from one source than its limit.
    for (source, connections) in (1..=9).map(|source| (source, 30)).chain([(10, 40)]) {
        let dial = DialFrom(Ipv4Addr::new(127, 0, 1, source), served.address);
        for _ in 0..connections {
            flood.push(connect_with(&served, NAME, &dial).await.unwrap());
        }
    }
    for _ in 0..3 {
        let asked = ask(&served, Some("Bearer client-token"), request(csr(&[CLIENT]), 60));
        timeout(FIRST_REQUEST_TIMEOUT, asked).await.unwrap().unwrap();
    }
    drop(flood);
}

#[tokio::test(start_paused = true)]
async fn unfinished_request_is_answered_at_timeout() {
    let served = TestCa::new("serve-slow", CLIENTS).await;
    let (near, _serving) = in_memory(&served);
    let mut connection = connect_with(&served, NAME, &near).await.unwrap();
    ask_on(&mut connection, "Bearer client-token").await.unwrap();
    let origin = "https://ca.test".parse().unwrap();
    let mut grpc = tonic::client::Grpc::with_origin(connection, origin);
    let endless = futures_util::stream::pending::<IstioCertificateRequest>();
    let path = http::uri::PathAndQuery::from_static(crate::ca::CREATE_CERTIFICATE);
    let codec = tonic_prost::ProstCodec::<_, IstioCertificateResponse>::default();
    let answer = grpc.client_streaming(tonic::Request::new(endless), path, codec).await;
    assert_eq!(answer.unwrap_err().code(), Code::DeadlineExceeded);
}
