//! Tests of new, failing and expiring identities, with a scripted source.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::*;
use crate::ca::CertificateAuthority;
use crate::error::IssuerProblem;
use crate::identity::source::NextIdentity;
use crate::testing::{CLIENT, HOUR, SERVER, authority, id, identity};

type Answer = Result<Identity, HboneError>;

struct Script(mpsc::UnboundedReceiver<Answer>);

impl IdentitySource for Script {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(async {
            match self.0.recv().await {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        })
    }
}

struct Scene {
    authority: CertificateAuthority,
    answers: mpsc::UnboundedSender<Answer>,
    source: Option<Script>,
    events: Arc<Mutex<Vec<String>>>,
}

impl Scene {
    fn new() -> Self {
        let (answers, scripted) = mpsc::unbounded_channel();
        let source = Some(Script(scripted));
        Self { authority: authority("td"), answers, source, events: Arc::default() }
    }

    fn answer(&self, answer: Answer) {
        self.answers.send(answer).unwrap();
    }

    async fn start(
        &mut self,
    ) -> Result<(CredentialRotator, watch::Receiver<Credentials>), HboneError> {
        self.start_with(FirstIdentity::Required).await
    }

    async fn start_with(
        &mut self,
        first: FirstIdentity,
    ) -> Result<(CredentialRotator, watch::Receiver<Credentials>), HboneError> {
        let events = self.events.clone();
        let record = move |event: CredentialsEvent<'_>| {
            events.lock().unwrap().push(match event {
                CredentialsEvent::Identity(new) => format!("{}", new.identity().spiffe_id()),
                CredentialsEvent::Trust(_) => "trust".to_owned(),
                CredentialsEvent::Failed(error) => format!("failed: {}", error.kind()),
                CredentialsEvent::Expiring { left, .. } => {
                    format!("expiring: {} min", (left.as_secs() + 30) / 60)
                }
                CredentialsEvent::Expired(error) => format!("expired: {}", error.kind()),
            });
        };
        let source = Box::new(self.source.take().unwrap());
        CredentialRotator::start(source, Trust::default().fixed(), first, record).await
    }

    fn events(&self) -> Vec<String> {
        std::mem::take(&mut self.events.lock().unwrap())
    }
}

fn unreachable_ca() -> HboneError {
    HboneError::Issuer { issuer: "ca".to_owned(), what: IssuerProblem::Connect, source: None }
}

fn bad_file() -> HboneError {
    HboneError::credential("file", CredentialProblem::Token)
}

#[tokio::test(start_paused = true)]
async fn start_waits_for_unavailable_ca() {
    let mut scene = Scene::new();
    scene.answer(Err(unreachable_ca()));
    scene.answer(Err(unreachable_ca()));
    scene.answer(Ok(identity(&scene.authority, CLIENT)));
    let (_, credentials) = scene.start().await.unwrap();
    assert_eq!(credentials.borrow().identity().spiffe_id(), &id(CLIENT));
    assert_eq!(scene.events(), ["failed: issuer", "failed: issuer", CLIENT]);
}

#[tokio::test(start_paused = true)]
async fn start_fails_on_configuration_error() {
    let mut scene = Scene::new();
    scene.answer(Err(bad_file()));
    assert_eq!(scene.start().await.unwrap_err().fault(), Fault::Configuration);
    assert!(scene.events().is_empty(), "the start reports it");
}

#[tokio::test(start_paused = true)]
async fn awaited_identity_is_requested_again_after_configuration_error() {
    let mut scene = Scene::new();
    scene.answer(Err(bad_file()));
    scene.answer(Ok(identity(&scene.authority, CLIENT)));
    let (_, credentials) = scene.start_with(FirstIdentity::Awaited).await.unwrap();
    assert_eq!(credentials.borrow().identity().spiffe_id(), &id(CLIENT));
    assert_eq!(scene.events(), ["failed: credential", CLIENT]);
}

#[tokio::test(start_paused = true)]
async fn publishes_new_identity_and_keeps_last_one_after_failure() {
    let mut scene = Scene::new();
    scene.answer(Ok(identity(&scene.authority, CLIENT)));
    let (rotator, mut credentials) = scene.start().await.unwrap();
    let running = tokio::spawn(rotator.run());
    scene.answer(Err(bad_file()));
    scene.answer(Ok(identity(&scene.authority, SERVER)));
    credentials.changed().await.unwrap();
    assert_eq!(credentials.borrow_and_update().identity().spiffe_id(), &id(SERVER));
    assert_eq!(scene.events(), [CLIENT, "failed: credential", SERVER]);
    scene.answer(Err(unreachable_ca()));
    timeout(HOUR / 2, credentials.changed()).await.unwrap_err();
    assert_eq!(scene.events(), ["failed: issuer"]);
    assert!(!running.is_finished());
}

#[tokio::test(start_paused = true)]
async fn reports_an_identity_that_expires_without_a_successor() {
    let mut scene = Scene::new();
    scene.answer(Ok(identity(&scene.authority, CLIENT)));
    let (rotator, credentials) = scene.start().await.unwrap();
    let _running = tokio::spawn(rotator.run());
    sleep(HOUR / 2).await;
    assert_eq!(scene.events(), [CLIENT]);
    sleep(HOUR / 2 - Duration::from_secs(10)).await;
    // The validity began some minutes before the CA issued the certificate.
    assert_eq!(scene.events(), ["expiring: 22 min"]);
    sleep(3 * HOUR).await;
    assert_eq!(scene.events(), ["expired: credential"]);
    assert_eq!(credentials.borrow().identity().spiffe_id(), &id(CLIENT));
    // The next certificate has its own warnings.
    scene.answer(Ok(identity(&scene.authority, SERVER)));
    sleep(2 * HOUR).await;
    assert_eq!(scene.events(), [SERVER, "expiring: 22 min", "expired: credential"]);
}

/// An identity that is valid for `life` days in total, `passed` of which have elapsed.
fn identity_of_days(authority: &CertificateAuthority, life: u32, passed: u32) -> Identity {
    let day = 24 * HOUR;
    let now = clock::now();
    let issued =
        authority.issue_between(&id(CLIENT), now - passed * day, now + (life - passed) * day);
    let issued = issued.unwrap();
    let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
    Identity::from_pem(chain, key, authority.roots_pem().as_bytes()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn expiry_warnings_start_at_two_thirds_then_daily_then_hourly() {
    let mut scene = Scene::new();
    scene.answer(Ok(identity_of_days(&scene.authority, 9, 0)));
    let (rotator, _credentials) = scene.start().await.unwrap();
    let _running = tokio::spawn(rotator.run());
    sleep(6 * 24 * HOUR - HOUR).await;
    assert_eq!(scene.events(), [CLIENT]);
    sleep(4 * 24 * HOUR).await;
    let days = [3, 2].map(|days| format!("expiring: {} min", days * 24 * 60));
    let hours = (1..=24).rev().map(|hours| format!("expiring: {} min", hours * 60));
    let expected: Vec<_> =
        days.into_iter().chain(hours).chain(["expired: credential".to_owned()]).collect();
    assert_eq!(scene.events(), expected);
}

#[tokio::test(start_paused = true)]
async fn warns_at_once_after_two_thirds_of_validity() {
    let mut scene = Scene::new();
    scene.answer(Ok(identity_of_days(&scene.authority, 30, 28)));
    let (rotator, _credentials) = scene.start().await.unwrap();
    let _running = tokio::spawn(rotator.run());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(scene.events(), [CLIENT, "expiring: 2880 min"]);
}
