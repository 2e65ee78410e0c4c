//! A source that issues certificates in this process, with a certificate authority in a local
//! directory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use underpass_config::{LocalCaSettings, SpiffeId};

use super::{IdentitySource, NextIdentity, NextPem, PemSource};
use crate::ca::CertificateAuthority;
use crate::error::{CredentialProblem, HboneError};
use crate::identity::Identity;
use crate::identity::identity_pem::IdentityPem;
use crate::identity::renewal::Schedule;

/// The authority in a directory, which is read again for each certificate.
///
/// A process that drops its privileges can perhaps no longer read the CA's key. It then uses the
/// authority that it read last, so that it can still issue certificates.
#[derive(Debug)]
pub struct LocalAuthority {
    settings: LocalCaSettings,
    last: Mutex<Option<CertificateAuthority>>,
}

impl LocalAuthority {
    /// Reads the authority, if it is readable. Call it while this process has its privileges.
    pub fn new(settings: LocalCaSettings) -> Self {
        let last = Mutex::new(CertificateAuthority::open(&settings.dir).ok());
        Self { settings, last }
    }

    /// Issues a certificate for `id`.
    ///
    /// # Errors
    /// [`HboneError::Credential`] if a file is unusable, or if the CA cannot issue this identity.
    pub fn issue(&self, id: &SpiffeId) -> Result<Identity, HboneError> {
        Ok(self.issue_pem(id)?.1)
    }

    fn issue_pem(&self, id: &SpiffeId) -> Result<(IdentityPem, Identity), HboneError> {
        // No code panics while it holds the lock.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let authority = match (CertificateAuthority::open(&self.settings.dir), &mut *last) {
            (Ok(authority), last) => last.insert(authority),
            (Err(error), Some(last)) if is_forbidden(&error) => last,
            (Err(error), _) => return Err(error),
        };
        let issued = authority.issue(id, self.settings.ttl)?;
        let bundle = (id.trust_domain().clone(), authority.roots_pem().to_owned());
        let bundles = BTreeMap::from([bundle]);
        let pem = IdentityPem { chain: issued.chain_pem, key: issued.key_pem, bundles };
        let identity = pem.identity(&self.settings.dir)?;
        Ok((pem, identity))
    }
}

/// Issues certificates with a local authority.
#[derive(Debug)]
pub struct LocalCaSource {
    authority: Arc<LocalAuthority>,
    spiffe_id: SpiffeId,
    schedule: Schedule,
}

impl LocalCaSource {
    /// Creates a source of certificates for `spiffe_id`.
    pub fn new(authority: Arc<LocalAuthority>, spiffe_id: SpiffeId) -> Self {
        Self { authority, spiffe_id, schedule: Schedule::new() }
    }

    async fn next_issued(&mut self) -> Result<(IdentityPem, Identity), HboneError> {
        self.schedule.due().await;
        let issued = self.authority.issue_pem(&self.spiffe_id);
        match &issued {
            Ok((_, identity)) => self.schedule.succeeded(identity.expires()),
            Err(_) => self.schedule.failed(),
        }
        issued
    }
}

fn is_forbidden(error: &HboneError) -> bool {
    matches!(error, HboneError::Credential { what: CredentialProblem::Permission, .. })
}

impl IdentitySource for LocalCaSource {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(async { Ok(self.next_issued().await?.1) })
    }
}

impl PemSource for LocalCaSource {
    fn next_pem(&mut self) -> NextPem<'_> {
        Box::pin(async { Ok(self.next_issued().await?.0) })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::ca::tests::TempDir;
    use crate::clock;
    use crate::error::Fault;
    use crate::testing::{CLIENT, HOUR, id};

    fn source(dir: &TempDir) -> LocalCaSource {
        let settings = LocalCaSettings { dir: dir.0.clone(), ttl: HOUR };
        LocalCaSource::new(Arc::new(LocalAuthority::new(settings)), id(CLIENT))
    }

    #[tokio::test(start_paused = true)]
    async fn issues_at_once_and_renews_at_half_of_validity() {
        let dir = TempDir::new("local-ca");
        CertificateAuthority::init(&dir.0, "td".parse().unwrap()).unwrap();
        let mut source = source(&dir);
        let mut last = source.next().await.unwrap();
        assert_eq!(last.spiffe_id(), &id(CLIENT));
        for _ in 0..10 {
            let asked = Instant::now();
            let next = source.next().await.unwrap();
            let minutes = asked.elapsed().as_secs_f64() / 60.0;
            assert!((26.9..=33.1).contains(&minutes), "{minutes}");
            assert!(next.expires() > last.expires());
            assert!(last.expires() > clock::now(), "renewed in time");
            last = next;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn missing_authority_is_retried_with_back_off() {
        let dir = TempDir::new("local-ca-gone");
        CertificateAuthority::init(&dir.0, "td".parse().unwrap()).unwrap();
        let mut source = source(&dir);
        source.next().await.unwrap();
        fs::rename(dir.0.join("ca.key"), dir.0.join("kept.key")).unwrap();
        assert_eq!(source.next().await.unwrap_err().fault(), Fault::Configuration);
        let start = Instant::now();
        for _ in 0..4 {
            source.next().await.unwrap_err();
        }
        let waited = start.elapsed();
        let (least, most) = (Duration::from_secs(12), Duration::from_millis(18_100));
        assert!((least..most).contains(&waited), "1 + 2 + 4 + 8 s: {waited:?}");
        fs::rename(dir.0.join("kept.key"), dir.0.join("ca.key")).unwrap();
        source.next().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn trusts_all_roots_of_the_directory() {
        let (dir, old) = (TempDir::new("local-ca-roots"), TempDir::new("local-ca-old"));
        let authority = CertificateAuthority::init(&dir.0, "td".parse().unwrap()).unwrap();
        let other = CertificateAuthority::init(&old.0, "td".parse().unwrap()).unwrap();
        let both = format!("{}{}", authority.roots_pem(), other.roots_pem());
        fs::write(dir.0.join("roots.pem"), &both).unwrap();
        let identity = source(&dir).next().await.unwrap();
        assert_eq!(identity.roots().len(), 2);
        fs::write(dir.0.join("roots.pem"), "no roots").unwrap();
        let error = source(&dir).next().await.unwrap_err();
        assert!(matches!(error, HboneError::Credential { what: CredentialProblem::Empty(_), .. }));
    }
}
