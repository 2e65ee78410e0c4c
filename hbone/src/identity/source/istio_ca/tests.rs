//! Tests with certificates from `underpass ca serve` over loopback, and with a scripted CA that
//! sends invalid answers.

use std::fs;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};
use tokio::net::TcpListener;

use underpass_config::Hint as _;

use super::*;
use crate::ca::CertificateAuthority;
use crate::ca::server::tests::{CLIENTS, NAME, TestCa};
use crate::ca::tests::{TempDir, openssl};
use crate::error::Fault;
use crate::identity::source::testing::{DialCa, settings};
use crate::testing::{CLIENT, SERVER, authority, id};

async fn served(name: &str) -> TestCa {
    let served = TestCa::new(name, CLIENTS).await;
    write_token(&served, "client-token\n");
    served
}

fn write_token(served: &TestCa, token: &str) {
    fs::write(served.file("token"), token).unwrap();
}

fn ca(served: &TestCa) -> IstioCa<DialCa> {
    IstioCa::new(settings(served, NAME), DialCa::new(served)).unwrap()
}

fn hint(problem: &IssuerProblem) -> String {
    problem.hint().unwrap_or_default().into_owned()
}

fn problem(error: HboneError) -> IssuerProblem {
    let HboneError::Issuer { what, .. } = error else { panic!("{error}") };
    what
}

async fn refused(ca: &IstioCa<DialCa>, who: &str) -> IssuerProblem {
    let error = ca.issue(&id(who), Priority::RealTime).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Peer, "{error}");
    problem(error)
}

#[tokio::test]
async fn issues_certificate_for_our_key() {
    let served = served("istio-issue").await;
    let ca = Arc::new(ca(&served));
    let mut source = IstioCaSource::new(ca, id(CLIENT), Priority::RealTime);
    let identity = source.next().await.unwrap();
    assert_eq!(identity.spiffe_id(), &id(CLIENT));
    assert_eq!(identity.roots().len(), 1);
    let left = identity.expires().duration_since(clock::now()).unwrap();
    assert!(left <= Duration::from_secs(600) && left > Duration::from_secs(590), "{left:?}");
}

#[tokio::test]
async fn reads_token_for_each_request() {
    let served = served("istio-token").await;
    let ca = ca(&served);
    write_token(&served, "wrong-token");
    let what = refused(&ca, CLIENT).await;
    assert!(matches!(&what, IssuerProblem::Unauthenticated(_)), "{what}");
    assert!(hint(&what).contains("identity.istio_ca.token"), "{what}");
    write_token(&served, "client-token");
    ca.issue(&id(CLIENT), Priority::RealTime).await.unwrap();
    for unusable in ["", "two words"] {
        write_token(&served, unusable);
        let error = ca.issue(&id(CLIENT), Priority::RealTime).await.unwrap_err();
        assert_eq!(error.fault(), Fault::Configuration, "{error}");
    }
    fs::remove_file(served.file("token")).unwrap();
    let error = ca.issue(&id(CLIENT), Priority::RealTime).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Configuration, "{error}");
}

#[tokio::test]
async fn ca_refuses_identity_of_another_account() {
    let served = served("istio-other").await;
    let what = refused(&ca(&served), SERVER).await;
    let IssuerProblem::Denied { id: asked, message } = what else { panic!("{what}") };
    assert_eq!(asked, id(SERVER));
    assert!(message.as_str().contains("does not list"), "{message}");
}

#[tokio::test]
async fn node_token_obtains_certificates_of_its_workloads() {
    let served = served("istio-node").await;
    write_token(&served, "node-token");
    let settings = IstioCaSettings { impersonate: true, ..settings(&served, NAME) };
    let ca = Arc::new(IstioCa::new(settings, DialCa::new(&served)).unwrap());
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..30 {
        let who = id(&format!("spiffe://td/ns/default/sa/workload-{number}"));
        let mut source = IstioCaSource::new(ca.clone(), who.clone(), Priority::Warmup);
        asked.spawn(async move { source.next().await.unwrap().spiffe_id() == &who });
    }
    assert!(asked.join_all().await.into_iter().all(|is_right| is_right));
    let what = refused(&ca, "spiffe://td/ns/other/sa/x").await;
    assert!(matches!(what, IssuerProblem::Denied { .. }), "{what}");
}

#[tokio::test]
async fn reconnects_to_ca_at_new_address() {
    let mut served = served("istio-restart").await;
    let dial = DialCa::new(&served);
    let ca = IstioCa::new(settings(&served, NAME), dial.clone()).unwrap();
    ca.issue(&id(CLIENT), Priority::RealTime).await.unwrap();
    served.stop().await;
    let what = refused(&ca, CLIENT).await;
    assert!(matches!(what, IssuerProblem::Connect), "{what}");
    served.start().await;
    *dial.0.lock().unwrap() = served.address;
    ca.issue(&id(CLIENT), Priority::RealTime).await.unwrap();
}

/// A proxy whose policy refuses plaintext behaves like this: it accepts, then closes.
#[tokio::test]
async fn reset_during_handshake_is_reported_as_such() {
    let served = served("istio-reset").await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dial = DialCa::new(&served);
    *dial.0.lock().unwrap() = proxy.local_addr().unwrap();
    let ca = IstioCa::new(settings(&served, NAME), dial).unwrap();
    let refuse = async {
        let (stream, _) = proxy.accept().await.unwrap();
        // Leave received bytes unread, so that closing the socket sends RST.
        stream.readable().await.unwrap();
    };
    let (what, ()) = tokio::join!(refused(&ca, CLIENT), refuse);
    assert!(matches!(what, IssuerProblem::HandshakeReset), "{what}");
    assert!(hint(&what).contains("interception.inbound.exclude_ports"), "{what}");
}

#[tokio::test]
async fn wrong_server_never_receives_the_token() {
    let served = served("istio-impostor").await;
    let wrong_name = IstioCa::new(settings(&served, "other.test"), DialCa::new(&served)).unwrap();
    assert!(matches!(refused(&wrong_name, CLIENT).await, IssuerProblem::Tls));
    let right = ca(&served);
    fs::write(served.file("roots.pem"), authority("td").roots_pem()).unwrap();
    let what = refused(&right, CLIENT).await;
    assert!(matches!(what, IssuerProblem::Tls), "{what}");
    assert!(hint(&what).contains("identity.istio_ca.roots"), "{what}");
    // The client reads the roots again for each connection.
    let own = CertificateAuthority::open(&served.dir.0);
    fs::copy(served.file("ca.pem"), served.file("roots.pem")).unwrap();
    drop(own);
    right.issue(&id(CLIENT), Priority::RealTime).await.unwrap();
    fs::remove_file(served.file("roots.pem")).unwrap();
    let error = right.issue(&id(CLIENT), Priority::RealTime).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Configuration, "{error}");
}

/// A server that accepts and never answers.
#[derive(Debug, Default)]
struct Silence(Mutex<Vec<DuplexStream>>);

impl Dial for Silence {
    type Io = DuplexStream;

    async fn dial(&self, _: std::net::SocketAddr) -> io::Result<Self::Io> {
        let (near, far) = duplex(1 << 16);
        self.0.lock().unwrap().push(far);
        Ok(near)
    }
}

#[tokio::test(start_paused = true)]
async fn silent_ca_times_out() {
    let served = TestCa::new("istio-silent", CLIENTS).await;
    write_token(&served, "client-token");
    let ca = IstioCa::new(settings(&served, NAME), Silence::default()).unwrap();
    let error = ca.issue(&id(CLIENT), Priority::RealTime).await.unwrap_err();
    assert!(matches!(problem(error), IssuerProblem::ConnectTimeout(CONNECT_TIMEOUT)));
}

#[tokio::test]
async fn rejects_invalid_ca_settings_at_start() {
    let served = TestCa::new("istio-settings", CLIENTS).await;
    write_token(&served, "client-token");
    let new = |change: &dyn Fn(&mut IstioCaSettings)| {
        let mut settings = settings(&served, NAME);
        change(&mut settings);
        IstioCa::new(settings, Silence::default()).map(|_| ())
    };
    for address in ["http://ca:1", "ca:15012", "https://", "https://ca/path", "https://ca?x", ""] {
        let error = new(&|settings| settings.address = address.to_owned()).unwrap_err();
        assert_eq!(error.fault(), Fault::Configuration, "{address}");
        assert!(matches!(problem(error), IssuerProblem::Address), "{address}");
    }
    for address in ["https://ca", "https://ca:15012/", "https://[::1]:15012", "https://10.0.0.1"] {
        new(&|settings| {
            settings.address = address.to_owned();
            settings.server_name = None;
        })
        .unwrap();
    }
    let error = new(&|settings| settings.server_name = Some("no name".to_owned())).unwrap_err();
    assert!(matches!(problem(error), IssuerProblem::ServerName(_)));
    let error = new(&|settings| settings.cluster_id = "a\nb".to_owned()).unwrap_err();
    assert!(matches!(problem(error), IssuerProblem::ClusterId));
    let absent = Path::new("/absent");
    let settings: [&dyn Fn(&mut IstioCaSettings); 2] =
        [&|settings| settings.token = absent.into(), &|settings| settings.roots = absent.into()];
    for change in settings {
        let error = new(change).unwrap_err();
        assert!(matches!(&error, HboneError::Credential { file, .. } if file == absent), "{error}");
    }
}

fn answer(cert_chain: &[&str]) -> IstioCertificateResponse {
    let cert_chain = cert_chain.iter().map(|pem| (*pem).to_owned()).collect();
    IstioCertificateResponse { cert_chain }
}

#[test]
fn rejects_answer_for_other_key_or_identity_or_without_roots() {
    let (ours, other) = (authority("td"), authority("td"));
    let (key, csr) = signing_request(&id(CLIENT)).unwrap();
    let csr = crate::ca::CertificateRequest::from_pem(&csr).unwrap();
    let leaf = |who: &str| ours.sign(&csr, &id(who), Duration::from_secs(60)).unwrap();
    let read = |chain: &[&str]| identity(Path::new("ca"), &answer(chain), &key, &id(CLIENT));
    let (leaf, wrong) = (leaf(CLIENT), leaf(SERVER));
    let both = format!("{}{}", ours.roots_pem(), other.roots_pem());
    assert_eq!(read(&[&leaf, &both]).unwrap().roots().len(), 2, "several roots in one text");
    let chain = read(&[&leaf, other.roots_pem(), ours.roots_pem()]).unwrap();
    assert_eq!(chain.certified_key().cert.len(), 2, "an intermediate is sent along");
    for (chain, found) in [(&[] as &[&str], 0), (&[leaf.as_str()], 1)] {
        let what = read(chain).unwrap_err();
        assert!(matches!(what, IssuerProblem::EmptyResponse(n) if n == found), "{what}");
    }
    let what = read(&[&wrong, ours.roots_pem()]).unwrap_err();
    assert!(
        matches!(&what, IssuerProblem::WrongIdentity { got, .. } if got.as_str() == SERVER),
        "{what}"
    );
    let foreign = ours.issue(&id(CLIENT), Duration::from_secs(60)).unwrap().chain_pem;
    let what = read(&[&foreign, ours.roots_pem()]).unwrap_err();
    assert!(matches!(what, IssuerProblem::Answer(CredentialProblem::KeyMismatch)), "{what}");
    for (chain, roots) in [("garbage", ours.roots_pem()), (leaf.as_str(), "garbage")] {
        let what = read(&[chain, roots]).unwrap_err();
        let is_typed =
            matches!(what, IssuerProblem::Answer(_) | IssuerProblem::WrongIdentity { .. });
        assert!(is_typed, "{what}");
    }
}

#[tokio::test]
async fn broken_connection_is_reported_as_lost() {
    let served = served("istio-breaks").await;
    let dial = DialCa::new(&served);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    *dial.0.lock().unwrap() = listener.local_addr().unwrap();
    let tls = served.tls();
    let breaks = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = tls.accept(stream).await.unwrap();
        stream.read_u8().await.unwrap();
    });
    let ca = IstioCa::new(settings(&served, NAME), dial).unwrap();
    let error = ca.issue(&id(CLIENT), Priority::RealTime).await.unwrap_err();
    assert!(error.source().is_some(), "{error}");
    assert!(matches!(problem(error), IssuerProblem::Lost));
    breaks.await.unwrap();
}

#[tokio::test]
async fn openssl_accepts_request_and_certificate() {
    let dir = TempDir::new("istio-openssl");
    let ours = authority("td");
    let (_, csr) = signing_request(&id(CLIENT)).unwrap();
    fs::write(dir.0.join("csr"), &csr).unwrap();
    let shown = openssl(&["req", "-in", "csr", "-verify", "-noout", "-text"], &dir.0);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.status.success(), "{text}");
    for part in [
        "Subject: \n",
        "X509v3 Subject Alternative Name: critical\n",
        "URI:spiffe://td/ns/default/sa/client\n",
        "NIST CURVE: P-256",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let csr = crate::ca::CertificateRequest::from_pem(&csr).unwrap();
    let leaf = ours.sign(&csr, &id(CLIENT), Duration::from_secs(60)).unwrap();
    fs::write(dir.0.join("leaf"), leaf).unwrap();
    fs::write(dir.0.join("roots"), ours.roots_pem()).unwrap();
    for purpose in ["sslserver", "sslclient"] {
        let judged = openssl(
            &["verify", "-x509_strict", "-purpose", purpose, "-CAfile", "roots", "leaf"],
            &dir.0,
        );
        assert!(judged.status.success(), "{judged:?}");
    }
}
