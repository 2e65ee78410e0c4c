//! Leases credentials by SPIFFE id.
//!
//! The pods of one workload share one rotation, one certificate and one set of TLS configurations.
//! All rotations share one trust bundle.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

use tokio::sync::watch;
use underpass_config::{FileWatcher, SpiffeId, TrustSettings};
use underpass_hbone::{
    CredentialRotator, Credentials, CredentialsEvent, FirstIdentity, HboneError, IdentitySource,
    Trust, TrustFiles,
};

use crate::error::Described;
use crate::process::supervise::{Supervisor, Task};

/// Creates sources of certificates, and receives their events.
pub(crate) trait Issuer: fmt::Debug + Send + Sync {
    /// Creates a source of certificates for `id`.
    fn source(&self, id: &SpiffeId) -> Box<dyn IdentitySource>;

    /// Reports an event of the credentials of `id`.
    fn report(&self, id: &SpiffeId, event: &CredentialsEvent<'_>);

    /// Reports that the last lease of the credentials of `id` has ended, so that nothing renews
    /// them.
    fn ended(&self, id: &SpiffeId);

    /// Reports that a changed trust bundle or revocation list could not be read.
    fn report_trust_failure(&self, error: &HboneError);
}

/// Leases credentials. Its tasks run on the caller's runtime.
#[derive(Debug)]
pub(crate) struct Identities {
    supervisor: Supervisor,
    /// Reads changed trust files, until this and every rotation are dropped.
    following: Arc<Task>,
    issuer: Arc<dyn Issuer>,
    trust: watch::Receiver<Trust>,
    /// The rotations by SPIFFE id. Entries without a lease stay until the next rotation starts.
    rotations: Mutex<HashMap<SpiffeId, Weak<Rotation>>>,
}

/// A lease of the credentials of one workload, whose first certificate may not be issued yet. The
/// rotation of the credentials ends with the last lease.
#[derive(Debug, Clone)]
pub(crate) struct CredentialLease {
    rotation: Arc<Rotation>,
    /// Set when the first certificate is issued.
    credentials: OnceLock<watch::Receiver<Credentials>>,
}

/// The task that renews the credentials of one workload.
#[derive(Debug)]
struct Rotation {
    id: SpiffeId,
    issuer: Arc<dyn Issuer>,
    _task: Task,
    /// Keeps the trust files followed, so that revocations reach leased credentials.
    _following_trust: Arc<Task>,
    /// `None` until the first certificate is issued.
    started: watch::Receiver<Option<Started>>,
    /// Why the last attempt to get a certificate failed; `None` after a success.
    failure: Arc<Mutex<Option<Described>>>,
}

/// The certificate of a workload, for `underpass status`.
#[derive(Debug, Clone)]
pub(crate) struct RotationState {
    /// The identity for which a certificate is requested.
    pub(crate) requested: SpiffeId,
    /// `None` until the first certificate is issued.
    pub(crate) current: Option<CurrentCertificate>,
    /// Why the last attempt to get a certificate failed; `None` after a success.
    pub(crate) failure: Option<Described>,
}

/// The certificate in use.
#[derive(Debug, Clone)]
pub(crate) struct CurrentCertificate {
    pub(crate) spiffe_id: SpiffeId,
    pub(crate) expires: SystemTime,
}

type Started = Result<watch::Receiver<Credentials>, HboneError>;

impl Identities {
    /// Reads and watches the trust files.
    ///
    /// # Errors
    /// A trust file is missing or malformed, or cannot be watched.
    pub(crate) fn new(
        issuer: Arc<dyn Issuer>,
        trust: &TrustSettings,
        watcher: &FileWatcher,
        supervisor: Supervisor,
    ) -> Result<Self, HboneError> {
        let (files, trust) = TrustFiles::open(trust, watcher)?;
        let (sender, trust) = watch::channel(trust);
        let reporter = issuer.clone();
        let follow = files.follow(sender, move |error| reporter.report_trust_failure(error));
        let following = supervisor.essential("trust bundles and revocation lists", follow);
        let following = Arc::new(following);
        Ok(Self { supervisor, following, issuer, trust, rotations: Mutex::default() })
    }

    /// Leases the credentials of `id`, from the running rotation or a new one. Waits for the first
    /// certificate.
    ///
    /// # Errors
    /// The first certificate failed for a reason that only the operator can remedy, or the
    /// rotation panicked.
    pub(crate) async fn lease(&self, id: &SpiffeId) -> Result<CredentialLease, HboneError> {
        let lease = self.lease_with(id, FirstIdentity::Required);
        lease.first().await?;
        Ok(lease)
    }

    /// Leases the credentials of `id` without waiting. The first certificate is requested until it
    /// is issued.
    pub(crate) fn lease_awaited(&self, id: &SpiffeId) -> CredentialLease {
        self.lease_with(id, FirstIdentity::Awaited)
    }

    /// The state of every leased certificate, in no order.
    pub(crate) fn states(&self) -> Vec<RotationState> {
        let rotations = self.rotations.lock().unwrap_or_else(PoisonError::into_inner);
        rotations.values().filter_map(Weak::upgrade).map(|rotation| rotation.state()).collect()
    }

    fn lease_with(&self, id: &SpiffeId, first: FirstIdentity) -> CredentialLease {
        CredentialLease { rotation: self.rotation(id, first), credentials: OnceLock::new() }
    }

    fn rotation(&self, id: &SpiffeId, first: FirstIdentity) -> Arc<Rotation> {
        // No code panics while it holds the lock.
        let mut rotations = self.rotations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = rotations.get(id).and_then(Weak::upgrade) {
            return running;
        }
        rotations.retain(|_, rotation| rotation.strong_count() > 0);
        let rotation = Arc::new(self.start_rotation(id, first));
        rotations.insert(id.clone(), Arc::downgrade(&rotation));
        rotation
    }

    fn start_rotation(&self, id: &SpiffeId, first: FirstIdentity) -> Rotation {
        let (source, trust) = (self.issuer.source(id), self.trust.clone());
        let (issuer, id) = (self.issuer.clone(), id.clone());
        let (reporter, subject) = (issuer.clone(), id.clone());
        let failure = Arc::<Mutex<Option<Described>>>::default();
        let last_failure = failure.clone();
        let report = move |event: CredentialsEvent<'_>| {
            match &event {
                CredentialsEvent::Identity(_) => set(&last_failure, None),
                CredentialsEvent::Failed(error) => {
                    set(&last_failure, Some(Described::new(*error)));
                }
                CredentialsEvent::Expired(error) => set_first(&last_failure, error),
                CredentialsEvent::Trust(_) | CredentialsEvent::Expiring { .. } => {}
            }
            reporter.report(&subject, &event);
        };
        let (sender, started) = watch::channel(None);
        let rotate = async move {
            match CredentialRotator::start(source, trust, first, report).await {
                Ok((rotator, credentials)) => {
                    sender.send_replace(Some(Ok(credentials)));
                    rotator.run().await;
                }
                Err(error) => {
                    sender.send_replace(Some(Err(error)));
                    std::future::pending().await
                }
            }
        };
        let _task = self.supervisor.essential("rotation of a certificate", rotate);
        let _following_trust = self.following.clone();
        Rotation { id, issuer, _task, _following_trust, started, failure }
    }
}

fn set(failure: &Mutex<Option<Described>>, value: Option<Described>) {
    *failure.lock().unwrap_or_else(PoisonError::into_inner) = value;
}

/// Records a failure, unless an earlier one tells why the certificate was not renewed.
fn set_first(failure: &Mutex<Option<Described>>, error: &HboneError) {
    let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
    failure.get_or_insert_with(|| Described::new(error));
}

impl Rotation {
    fn state(&self) -> RotationState {
        let started = self.started.borrow();
        let credentials = started.as_ref().and_then(|started| started.as_ref().ok());
        let current = credentials.map(|credentials| {
            let credentials = credentials.borrow();
            let identity = credentials.identity();
            CurrentCertificate {
                spiffe_id: identity.spiffe_id().clone(),
                expires: identity.expires(),
            }
        });
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        RotationState { requested: self.id.clone(), current, failure }
    }

    async fn started(&self) -> Started {
        let mut started = self.started.clone();
        let outcome = started.wait_for(Option::is_some).await.ok().and_then(|one| one.clone());
        // Without a result, the task has panicked.
        outcome.unwrap_or(Err(HboneError::RotationEnded))
    }
}

impl Drop for Rotation {
    fn drop(&mut self) {
        self.issuer.ended(&self.id);
    }
}

impl CredentialLease {
    /// Waits for the first certificate and returns a receiver of the credentials. The receiver does
    /// not keep the rotation running.
    ///
    /// # Errors
    /// The rotation could not start.
    pub(crate) async fn first(&self) -> Result<watch::Receiver<Credentials>, HboneError> {
        if let Some(credentials) = self.issued() {
            return Ok(credentials.clone());
        }
        self.rotation.started().await
    }

    /// The credentials; `None` until the first certificate is issued.
    pub(crate) fn issued(&self) -> Option<&watch::Receiver<Credentials>> {
        if let Some(credentials) = self.credentials.get() {
            return Some(credentials);
        }
        let started = self.rotation.started.borrow();
        let credentials = started.as_ref()?.as_ref().ok()?;
        Some(self.credentials.get_or_init(|| credentials.clone()))
    }

    /// The identity of the current certificate, or of the requested one.
    pub(crate) fn identity(&self) -> SpiffeId {
        match self.issued() {
            Some(credentials) => credentials.borrow().identity().spiffe_id().clone(),
            None => self.rotation.id.clone(),
        }
    }

    /// Whether the current certificate, or the requested one, is for `id`.
    pub(crate) fn proves(&self, id: &SpiffeId) -> bool {
        match self.issued() {
            Some(credentials) => credentials.borrow().identity().spiffe_id() == id,
            None => self.rotation.id == *id,
        }
    }

    /// Whether the current certificate has expired; `None` until the first one is issued.
    pub(crate) fn is_expired(&self) -> Option<bool> {
        let expires = self.issued()?.borrow().identity().expires();
        Some(expires <= SystemTime::now())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::time::Duration;

    use tokio::sync::oneshot;
    use underpass_config::LocalCaSettings;
    use underpass_hbone::{CertificateAuthority, LocalAuthority, LocalCaSource, NextIdentity};

    use super::*;

    /// A local CA that counts its sources and events.
    #[derive(Debug)]
    struct LocalCa {
        settings: LocalCaSettings,
        issued: AtomicUsize,
        /// One receiver for each source, closed when the source is dropped.
        sources: Mutex<Vec<oneshot::Receiver<()>>>,
    }

    struct Source {
        source: LocalCaSource,
        _alive: oneshot::Sender<()>,
    }

    impl IdentitySource for Source {
        fn next(&mut self) -> NextIdentity<'_> {
            self.source.next()
        }
    }

    impl Issuer for LocalCa {
        fn source(&self, id: &SpiffeId) -> Box<dyn IdentitySource> {
            let (alive, source) = oneshot::channel();
            self.sources.lock().unwrap().push(source);
            let authority = Arc::new(LocalAuthority::new(self.settings.clone()));
            let source = LocalCaSource::new(authority, id.clone());
            Box::new(Source { source, _alive: alive })
        }

        fn report(&self, _: &SpiffeId, event: &CredentialsEvent<'_>) {
            if let CredentialsEvent::Identity(_) = event {
                self.issued.fetch_add(1, Relaxed);
            }
        }

        fn ended(&self, _: &SpiffeId) {}

        fn report_trust_failure(&self, error: &HboneError) {
            panic!("{error}");
        }
    }

    struct Folder(PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    /// A CA whose certificates are valid for an hour, and its identities.
    fn local_ca(name: &str) -> (Folder, Arc<LocalCa>, Identities) {
        let dir = std::env::temp_dir().join(format!("identities-{name}-{}", std::process::id()));
        CertificateAuthority::init(&dir, "td".parse().unwrap()).unwrap();
        let settings = LocalCaSettings { dir: dir.clone(), ttl: Duration::from_secs(3600) };
        let (issued, sources) = (AtomicUsize::new(0), Mutex::default());
        let issuer = Arc::new(LocalCa { settings, issued, sources });
        let trust = TrustSettings::default();
        let supervisor = Supervisor::new().0;
        let identities =
            Identities::new(issuer.clone(), &trust, &FileWatcher::default(), supervisor).unwrap();
        (Folder(dir), issuer, identities)
    }

    fn id(account: &str) -> SpiffeId {
        format!("spiffe://td/ns/default/sa/{account}").parse().unwrap()
    }

    #[tokio::test]
    async fn pods_with_one_identity_share_source_and_credentials() {
        let (_folder, ca, identities) = local_ca("share");
        let web = id("web");
        let (one, other) = tokio::join!(identities.lease(&web), identities.lease(&web));
        let (one, other) = (one.unwrap(), other.unwrap());
        assert!(one.issued().unwrap().same_channel(other.issued().unwrap()));
        assert_eq!((one.identity(), ca.issued.load(Relaxed)), (web, 1));
        identities.lease(&id("other")).await.unwrap();
        assert_eq!((ca.sources.lock().unwrap().len(), ca.issued.load(Relaxed)), (2, 2));
    }

    #[tokio::test]
    async fn credential_rotation_ends_with_last_lease_and_restarts_with_next() {
        let (_folder, ca, identities) = local_ca("last");
        let web = id("web");
        let one = identities.lease(&web).await.unwrap();
        let other = one.clone();
        let mut source = ca.sources.lock().unwrap().remove(0);
        drop(one);
        tokio::task::yield_now().await;
        assert!(matches!(source.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        drop(other);
        source.await.unwrap_err();
        identities.lease(&web).await.unwrap();
        assert_eq!(ca.issued.load(Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn lease_without_certificate_gets_it_once_ca_responds() {
        let (folder, ca, identities) = local_ca("awaited");
        let (web, key, kept) = (id("web"), folder.0.join("ca.key"), folder.0.join("kept"));
        std::fs::rename(&key, &kept).unwrap();
        let lease = identities.lease_awaited(&web);
        let waited = tokio::time::timeout(Duration::from_secs(5), lease.first()).await;
        assert!(waited.is_err() && lease.issued().is_none() && lease.is_expired().is_none());
        assert!(
            lease.proves(&web) && lease.identity() == web,
            "the identity is known before its certificate"
        );
        std::fs::rename(&kept, &key).unwrap();
        let credentials = lease.first().await.unwrap();
        assert_eq!(credentials.borrow().identity().spiffe_id(), &web);
        assert!(lease.issued().is_some() && lease.is_expired() == Some(false));
        assert_eq!((ca.issued.load(Relaxed), ca.sources.lock().unwrap().len()), (1, 1));
    }

    #[tokio::test]
    async fn failed_rotation_start_fails_every_lease_and_is_retried_by_next_lease() {
        let (folder, ca, identities) = local_ca("failed");
        let (web, key, kept) = (id("web"), folder.0.join("ca.key"), folder.0.join("kept"));
        std::fs::rename(&key, &kept).unwrap();
        let (one, other) = tokio::join!(identities.lease(&web), identities.lease(&web));
        assert_eq!(one.unwrap_err().to_string(), other.unwrap_err().to_string());
        assert_eq!(ca.sources.lock().unwrap().len(), 1);
        std::fs::rename(&kept, &key).unwrap();
        identities.lease(&web).await.unwrap();
    }

    /// An issuer whose source panics instead of issuing.
    #[derive(Debug)]
    struct PanickingIssuer;

    impl IdentitySource for PanickingIssuer {
        fn next(&mut self) -> NextIdentity<'_> {
            Box::pin(async { panic!("of a source") })
        }
    }

    impl Issuer for PanickingIssuer {
        fn source(&self, _: &SpiffeId) -> Box<dyn IdentitySource> {
            Box::new(Self)
        }

        fn report(&self, _: &SpiffeId, _: &CredentialsEvent<'_>) {}

        fn ended(&self, _: &SpiffeId) {}

        fn report_trust_failure(&self, _: &HboneError) {}
    }

    #[tokio::test]
    async fn panicking_rotation_fails_its_lease_and_reports_the_panic() {
        let (supervisor, mut failures) = Supervisor::new();
        let (trust, watcher) = (TrustSettings::default(), FileWatcher::default());
        let identities =
            Identities::new(Arc::new(PanickingIssuer), &trust, &watcher, supervisor).unwrap();
        let lease = identities.lease(&id("web")).await;
        assert!(matches!(lease, Err(HboneError::RotationEnded)), "{lease:?}");
        let failure = failures.next().await.to_string();
        assert_eq!(failure, "rotation of a certificate panicked: of a source");
    }
}
