//! Tests with a scripted SPIRE agent on a Unix socket.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::server::Grpc;
use tonic_prost::ProstCodec;
use underpass_config::{Hint as _, SpireApi};

use super::*;
use crate::ca::CertificateAuthority;
use crate::ca::tests::TempDir;
use crate::error::Fault;
use crate::identity::source::spire::testing::{Streaming, Updates, der, issue, serve};
use crate::testing::{CLIENT, SERVER, authority, id};

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
type Script = Arc<Mutex<mpsc::UnboundedReceiver<Updates<SvidResponse>>>>;

struct Agent {
    dir: TempDir,
    connections: mpsc::UnboundedSender<Updates<SvidResponse>>,
    _serving: JoinHandle<()>,
}

impl Agent {
    fn new(name: &str) -> Self {
        let dir = TempDir::new(name);
        let (connections, script) = mpsc::unbounded_channel();
        let script: Script = Arc::new(Mutex::new(script));
        let serving = serve(&dir.0.join("agent.sock"), move |request| {
            let script = script.clone();
            async move {
                assert_eq!(request.uri().path(), "/SpiffeWorkloadAPI/FetchX509SVID");
                let updates = move |request: tonic::Request<SvidRequest>| {
                    if request.metadata().get("workload.spiffe.io").is_none() {
                        return Err(Status::invalid_argument("security header missing"));
                    }
                    let next = script.lock().unwrap().try_recv();
                    next.map_err(|_| Status::permission_denied("no identity issued"))
                };
                let mut grpc = Grpc::new(ProstCodec::default());
                grpc.server_streaming(Streaming(updates), request).await
            }
        });
        Self { dir, connections, _serving: serving }
    }

    /// Prepares the agent for the next connection. Returns the sender of its updates.
    fn expect(&self) -> mpsc::UnboundedSender<Update> {
        let (updates, receiver) = mpsc::unbounded_channel();
        self.connections.send(receiver).unwrap();
        updates
    }

    fn source(&self) -> WorkloadApiSource {
        let socket = self.dir.0.join("agent.sock");
        WorkloadApiSource::new(SpireSettings { api: SpireApi::Workload, socket }, id(CLIENT))
    }
}

fn svid(authority: &CertificateAuthority, who: &str) -> Svid {
    let (x509_svid, x509_svid_key) = issue(authority, who);
    let bundle = der(authority.roots_pem());
    Svid { spiffe_id: who.to_owned(), x509_svid, x509_svid_key, bundle }
}

fn response(svids: Vec<Svid>) -> SvidResponse {
    SvidResponse { svids, federated_bundles: HashMap::new() }
}

async fn problem(source: &mut WorkloadApiSource) -> IssuerProblem {
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
    updates.send(Ok(response(vec![svid(&ours, SERVER), svid(&ours, CLIENT)]))).unwrap();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(CLIENT));
    updates.send(Ok(response(vec![svid(&ours, SERVER), svid(&ours, "spiffe://td/x")]))).unwrap();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(SERVER));
}

#[tokio::test]
async fn identity_includes_bundles_of_federated_domains() {
    let (agent, ours) = (Agent::new("spire-bundles"), authority("td"));
    let mut source = agent.source();
    let (friend, second) = (authority("friend"), authority("friend"));
    let mut update = response(vec![svid(&ours, CLIENT)]);
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
    let first = response(vec![svid(&ours, CLIENT)]);
    agent.expect().send(Ok(first.clone())).unwrap();
    // The agent's connection ended when its sender was dropped.
    source.next().await.unwrap();
    let updates = agent.expect();
    updates.send(Ok(first)).unwrap();
    updates.send(Ok(response(vec![svid(&ours, SERVER)]))).unwrap();
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
    agent.expect().send(Ok(response(vec![broken]))).unwrap();
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::Answer(CredentialProblem::KeyMismatch)), "{what}");
    agent.expect().send(Ok(response(vec![svid(&ours, CLIENT)]))).unwrap();
    source.next().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn missing_agent_is_retried_with_back_off() {
    let dir = TempDir::new("spire-absent");
    let settings = SpireSettings { api: SpireApi::Workload, socket: dir.0.join("absent.sock") };
    let mut source = WorkloadApiSource::new(settings, id(CLIENT));
    let start = tokio::time::Instant::now();
    for _ in 0..4 {
        let what = problem(&mut source).await;
        assert!(matches!(&what, IssuerProblem::Agent), "{what}");
        assert!(what.hint().is_some_and(|hint| hint.contains("identity.spire.socket")), "{what}");
    }
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(5600), "1 + 2 + 4 s: {waited:?}");
}
