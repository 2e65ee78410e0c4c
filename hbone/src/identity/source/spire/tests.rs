//! A scripted SPIRE agent on a socket of its own.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Mutex;

use futures_util::stream;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::pem::PemObject as _;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::server::{Grpc, ServerStreamingService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use underpass_config::Hint as _;

use super::*;
use crate::ca::CertificateAuthority;
use crate::ca::tests::TempDir;
use crate::error::Fault;
use crate::testing::{CLIENT, HOUR, SERVER, authority, id};

#[derive(Clone, PartialEq, prost::Message)]
struct SvidRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct SvidResponse {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<Svid>,
    #[prost(map = "string, bytes", tag = "3")]
    federated_bundles: HashMap<String, Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    #[prost(bytes, tag = "2")]
    x509_svid: Vec<u8>,
    #[prost(bytes, tag = "3")]
    x509_svid_key: Vec<u8>,
    #[prost(bytes, tag = "4")]
    bundle: Vec<u8>,
}

type Update = Result<SvidResponse, Status>;

/// The agent's updates on the next connections, one list for each.
type Script = Arc<Mutex<mpsc::UnboundedReceiver<mpsc::UnboundedReceiver<Update>>>>;

struct Agent {
    dir: TempDir,
    connections: mpsc::UnboundedSender<mpsc::UnboundedReceiver<Update>>,
    _serving: JoinHandle<()>,
}

struct Fetch(Script);

impl ServerStreamingService<SvidRequest> for Fetch {
    type Response = SvidResponse;
    type ResponseStream = Pin<Box<dyn Stream<Item = Update> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<SvidRequest>) -> Self::Future {
        if request.metadata().get("workload.spiffe.io").is_none() {
            return ready(Err(Status::invalid_argument("security header missing")));
        }
        let Ok(updates) = self.0.lock().unwrap().try_recv() else {
            return ready(Err(Status::permission_denied("no identity issued")));
        };
        let updates = stream::unfold(updates, async |mut updates| {
            updates.recv().await.map(|update| (update, updates))
        });
        ready(Ok(Response::new(Box::pin(updates))))
    }
}

impl Agent {
    fn new(name: &str) -> Self {
        let dir = TempDir::new(name);
        let listener = UnixListener::bind(dir.0.join("agent.sock")).unwrap();
        let (connections, script) = mpsc::unbounded_channel();
        let script: Script = Arc::new(Mutex::new(script));
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let script = script.clone();
                let answer = service_fn(move |request: http::Request<_>| {
                    let script = script.clone();
                    async move {
                        assert_eq!(request.uri().path(), "/SpiffeWorkloadAPI/FetchX509SVID");
                        let mut grpc = Grpc::new(ProstCodec::default());
                        Ok::<_, Infallible>(grpc.server_streaming(Fetch(script), request).await)
                    }
                });
                let connection = http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), answer);
                tokio::spawn(async { connection.await.ok() });
            }
        });
        Self { dir, connections, _serving: serving }
    }

    /// The sender of the next connection's updates.
    fn expect(&self) -> mpsc::UnboundedSender<Update> {
        let (updates, told) = mpsc::unbounded_channel();
        self.connections.send(told).unwrap();
        updates
    }

    fn source(&self) -> SpireSource {
        let socket = self.dir.0.join("agent.sock");
        SpireSource::new(SpireSettings { socket }, id(CLIENT))
    }
}

fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

fn svid(authority: &CertificateAuthority, who: &str) -> Svid {
    let issued = authority.issue(&id(who), HOUR).unwrap();
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    Svid {
        spiffe_id: who.to_owned(),
        x509_svid: der(&issued.chain_pem),
        x509_svid_key: key.secret_der().to_vec(),
        bundle: der(authority.roots_pem()),
    }
}

fn of(svids: Vec<Svid>) -> SvidResponse {
    SvidResponse { svids, federated_bundles: HashMap::new() }
}

async fn problem(source: &mut SpireSource) -> IssuerProblem {
    let error = source.next().await.unwrap_err();
    assert_eq!(error.fault(), Fault::Peer, "{error}");
    let HboneError::Issuer { what, .. } = error else { panic!("{error}") };
    what
}

#[tokio::test]
async fn prefers_certificate_of_the_workload() {
    let (agent, ours) = (Agent::new("spire-which"), authority("td"));
    let mut source = agent.source();
    let updates = agent.expect();
    updates.send(Ok(of(vec![svid(&ours, SERVER), svid(&ours, CLIENT)]))).unwrap();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(CLIENT));
    updates.send(Ok(of(vec![svid(&ours, SERVER), svid(&ours, "spiffe://td/x")]))).unwrap();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(SERVER));
}

#[tokio::test]
async fn identity_includes_bundles_of_federated_domains() {
    let (agent, ours) = (Agent::new("spire-bundles"), authority("td"));
    let mut source = agent.source();
    let (friend, second) = (authority("friend"), authority("friend"));
    let mut update = of(vec![svid(&ours, CLIENT)]);
    let both = [der(friend.roots_pem()), der(second.roots_pem())].concat();
    update.federated_bundles =
        HashMap::from([("spiffe://friend".to_owned(), both), ("empty".to_owned(), Vec::new())]);
    agent.expect().send(Ok(update)).unwrap();
    let identity = source.next().await.unwrap();
    let bundles = identity.bundles();
    let found: Vec<_> =
        bundles.iter().map(|(name, bundle)| (name.as_str(), bundle.roots().len())).collect();
    assert_eq!(found, [("friend", 2), ("td", 1)]);
}

#[tokio::test]
async fn reconnects_to_restarted_agent_and_ignores_unchanged_update() {
    let (agent, ours) = (Agent::new("spire-restart"), authority("td"));
    let mut source = agent.source();
    let first = of(vec![svid(&ours, CLIENT)]);
    agent.expect().send(Ok(first.clone())).unwrap();
    // Dropping the sender ended the connection.
    source.next().await.unwrap();
    let updates = agent.expect();
    updates.send(Ok(first)).unwrap();
    updates.send(Ok(of(vec![svid(&ours, SERVER)]))).unwrap();
    assert!(matches!(problem(&mut source).await, IssuerProblem::AgentClosed));
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(SERVER));
}

#[tokio::test]
async fn reports_agent_refusal_and_retries() {
    let (agent, ours) = (Agent::new("spire-refuse"), authority("td"));
    let mut source = agent.source();
    assert!(matches!(problem(&mut source).await, IssuerProblem::NotRegistered));
    let mut broken = svid(&ours, CLIENT);
    broken.x509_svid_key = svid(&ours, CLIENT).x509_svid_key;
    agent.expect().send(Ok(of(vec![broken]))).unwrap();
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::Answer(CredentialProblem::KeyMismatch)), "{what}");
    agent.expect().send(Ok(of(vec![svid(&ours, CLIENT)]))).unwrap();
    source.next().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn missing_agent_is_retried_with_back_off() {
    let dir = TempDir::new("spire-absent");
    let settings = SpireSettings { socket: dir.0.join("absent.sock") };
    let mut source = SpireSource::new(settings, id(CLIENT));
    let start = tokio::time::Instant::now();
    for _ in 0..4 {
        let what = problem(&mut source).await;
        assert!(matches!(&what, IssuerProblem::Agent), "{what}");
        assert!(what.hint().is_some_and(|hint| hint.contains("identity.spire.socket")), "{what}");
    }
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(5600), "1 + 2 + 4 s: {waited:?}");
}
