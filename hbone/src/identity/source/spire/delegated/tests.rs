//! The Delegated Identity API of a scripted SPIRE agent.

use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::server::Grpc;
use underpass_config::SpireApi;

use super::messages::{Svid, SvidWithKey};
use super::*;
use crate::ca::CertificateAuthority;
use crate::ca::tests::TempDir;
use crate::identity::source::spire::testing::{Streaming, Updates, der, issue, serve};
use crate::testing::{CLIENT, SERVER, authority, id};
use crate::trust::bundle::Bundle;

type Sender<A> = mpsc::UnboundedSender<Result<A, Status>>;

/// The streams of the next connections.
#[derive(Default)]
struct Script {
    svids: Vec<Updates<Svids>>,
    bundles: Vec<Updates<Bundles>>,
    selectors: Vec<String>,
}

struct Agent {
    dir: TempDir,
    script: Arc<Mutex<Script>>,
    _serving: JoinHandle<()>,
}

impl Agent {
    fn new(name: &str) -> Self {
        let dir = TempDir::new(name);
        let script = Arc::new(Mutex::new(Script::default()));
        let scripted = script.clone();
        let serving = serve(&dir.0.join("admin.sock"), move |request| {
            let script = scripted.clone();
            async move {
                if request.uri().path() == SUBSCRIBE_TO_BUNDLES {
                    let bundles = move |_: Request<BundleRequest>| {
                        script.lock().unwrap().bundles.pop().ok_or_else(refused)
                    };
                    let mut grpc = Grpc::new(ProstCodec::default());
                    return grpc.server_streaming(Streaming(bundles), request).await;
                }
                assert_eq!(request.uri().path(), SUBSCRIBE_TO_SVIDS);
                let svids = move |request: Request<SvidRequest>| {
                    let mut script = script.lock().unwrap();
                    let selectors = request.into_inner().selectors.into_iter();
                    script.selectors =
                        selectors.map(|one| format!("{}:{}", one.r#type, one.value)).collect();
                    script.svids.pop().ok_or_else(refused)
                };
                let mut grpc = Grpc::new(ProstCodec::default());
                grpc.server_streaming(Streaming(svids), request).await
            }
        });
        Self { dir, script, _serving: serving }
    }

    /// The senders of the next connection's streams.
    fn expect(&self) -> (Sender<Svids>, Sender<Bundles>) {
        let (svids, svid_updates) = mpsc::unbounded_channel();
        let (bundles, bundle_updates) = mpsc::unbounded_channel();
        let mut script = self.script.lock().unwrap();
        script.svids.push(svid_updates);
        script.bundles.push(bundle_updates);
        (svids, bundles)
    }

    fn source(&self) -> DelegatedIdentitySource {
        let socket = self.dir.0.join("admin.sock");
        let settings = SpireSettings { api: SpireApi::DelegatedIdentity, socket };
        DelegatedIdentitySource::new(settings, id(CLIENT))
    }
}

fn refused() -> Status {
    Status::permission_denied("caller is not an authorized delegate")
}

fn svids(authority: &CertificateAuthority, whose: &[&str]) -> Svids {
    let svid = |who: &&str| {
        let (leaf, x509_svid_key) = issue(authority, who);
        SvidWithKey { x509_svid: Some(Svid { cert_chain: vec![leaf] }), x509_svid_key }
    };
    Svids { x509_svids: whose.iter().map(svid).collect(), federates_with: Vec::new() }
}

fn bundles(of: &[(&str, &[&CertificateAuthority])]) -> Bundles {
    let roots = |authorities: &[&CertificateAuthority]| {
        authorities.iter().flat_map(|authority| der(authority.roots_pem())).collect()
    };
    let entry = |(name, authorities): &(&str, &[&CertificateAuthority])| {
        (format!("spiffe://{name}"), roots(authorities))
    };
    Bundles { ca_certificates: of.iter().map(entry).collect() }
}

async fn problem(source: &mut DelegatedIdentitySource) -> IssuerProblem {
    let error = source.next().await.unwrap_err();
    let HboneError::Issuer { what, .. } = error else { panic!("{error}") };
    what
}

#[tokio::test]
async fn requests_selectors_of_pod_and_uses_only_its_own_certificate() {
    let (agent, ours) = (Agent::new("delegated-own"), authority("td"));
    let mut source = agent.source();
    let (to_svids, to_bundles) = agent.expect();
    to_bundles.send(Ok(bundles(&[("td", &[&ours])]))).unwrap();
    to_svids.send(Ok(svids(&ours, &[SERVER, CLIENT]))).unwrap();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(CLIENT));
    assert_eq!(agent.script.lock().unwrap().selectors, ["k8s:ns:default", "k8s:sa:client"]);

    to_svids.send(Ok(svids(&ours, &[SERVER]))).unwrap();
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::WrongIdentity { .. }), "{what}");
    to_svids.send(Ok(svids(&ours, &[]))).unwrap();
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::NotRegistered), "{what}");
    to_svids.send(Ok(svids(&ours, &[CLIENT]))).unwrap();
    source.next().await.unwrap();
}

#[tokio::test]
async fn trusts_own_and_federated_bundles_only() {
    let (agent, ours) = (Agent::new("delegated-bundles"), authority("td"));
    let (friend, second, other) = (authority("friend"), authority("friend"), authority("other"));
    let mut source = agent.source();
    let (to_svids, to_bundles) = agent.expect();
    let all: &[(&str, &[&CertificateAuthority])] =
        &[("td", &[&ours]), ("friend", &[&friend, &second]), ("other", &[&other]), ("empty", &[])];
    to_bundles.send(Ok(bundles(all))).unwrap();
    let mut update = svids(&ours, &[CLIENT]);
    update.federates_with = vec!["friend".to_owned(), "spiffe://empty".to_owned()];
    to_svids.send(Ok(update)).unwrap();
    let identity = source.next().await.unwrap();
    let roots = |bundle: &Bundle| bundle.roots().len();
    let found: Vec<_> =
        identity.bundles().iter().map(|(name, bundle)| (name.as_str(), roots(bundle))).collect();
    assert_eq!(found, [("friend", 2), ("td", 1)]);
}

#[tokio::test]
async fn pem_for_another_process_has_the_same_identity_and_bundles() {
    let (agent, ours, friend) = (Agent::new("delegated-pem"), authority("td"), authority("friend"));
    let mut source = agent.source();
    let (to_svids, to_bundles) = agent.expect();
    to_bundles.send(Ok(bundles(&[("td", &[&ours]), ("friend", &[&friend, &ours])]))).unwrap();
    let update = svids(&ours, &[CLIENT]);
    to_svids.send(Ok(Svids { federates_with: vec!["friend".to_owned()], ..update })).unwrap();
    let identity = source.next_pem().await.unwrap().identity(Path::new("pem")).unwrap();
    assert_eq!(identity.spiffe_id(), &id(CLIENT));
    let roots = identity.bundles().values().map(|bundle| bundle.roots().len());
    assert_eq!(roots.collect::<Vec<_>>(), [2, 1]);
    to_svids.send(Ok(svids(&ours, &[SERVER]))).unwrap();
    let error = source.next_pem().await.unwrap_err();
    assert!(matches!(error, HboneError::Issuer { what: IssuerProblem::WrongIdentity { .. }, .. }));
}

#[tokio::test]
async fn new_bundle_gives_new_identity() {
    let (agent, ours, next) = (Agent::new("delegated-rotate"), authority("td"), authority("td"));
    let mut source = agent.source();
    let (to_svids, to_bundles) = agent.expect();
    to_svids.send(Ok(svids(&ours, &[CLIENT]))).unwrap();
    to_bundles.send(Ok(bundles(&[("td", &[&ours])]))).unwrap();
    assert_eq!(source.next().await.unwrap().bundles().len(), 1);
    to_bundles.send(Ok(bundles(&[("td", &[&ours, &next])]))).unwrap();
    let identity = source.next().await.unwrap();
    assert_eq!(identity.bundles().values().next().unwrap().roots().len(), 2);
}

#[tokio::test]
async fn refuses_malformed_bundle_and_certificate_with_wrong_roots() {
    let (agent, ours, foreign) = (Agent::new("delegated-wrong"), authority("td"), authority("td"));
    let mut source = agent.source();
    let (to_svids, to_bundles) = agent.expect();
    to_svids.send(Ok(svids(&ours, &[CLIENT]))).unwrap();
    to_bundles.send(Ok(bundles(&[("td", &[&foreign])]))).unwrap();
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::Answer(_)), "{what}");
    let mut truncated = bundles(&[("td", &[&ours])]);
    truncated.ca_certificates.values_mut().for_each(|roots| roots.truncate(40));
    to_bundles.send(Ok(truncated)).unwrap();
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::Answer(CredentialProblem::Certificate(_))), "{what}");
}

#[tokio::test(start_paused = true)]
async fn refused_delegate_is_retried_after_reconnect() {
    let (agent, ours) = (Agent::new("delegated-refused"), authority("td"));
    let mut source = agent.source();
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::NotDelegate(_)), "{what}");
    let (to_svids, to_bundles) = agent.expect();
    to_svids.send(Ok(svids(&ours, &[CLIENT]))).unwrap();
    to_bundles.send(Ok(bundles(&[("td", &[&ours])]))).unwrap();
    source.next().await.unwrap();
    drop(to_svids);
    let what = problem(&mut source).await;
    assert!(matches!(what, IssuerProblem::AgentClosed), "{what}");
}
