//! A source that issues certificates in this process, with a certificate authority in a local
//! directory.

use underpass_config::{LocalCaSettings, SpiffeId};

use super::{IdentitySource, NextIdentity, valid_now};
use crate::ca::CertificateAuthority;
use crate::error::{CredentialProblem, HboneError};
use crate::identity::Identity;
use crate::identity::renewal::Schedule;

/// Issues certificates with the authority in a directory, which it reads again each time.
///
/// A process that changes from root to another user can no longer read the CA's key. It then uses
/// the authority that it read last, so that its certificate does not expire.
#[derive(Debug)]
pub struct LocalCaSource {
    settings: LocalCaSettings,
    spiffe_id: SpiffeId,
    schedule: Schedule,
    authority: Option<CertificateAuthority>,
}

impl LocalCaSource {
    /// Creates a source of certificates for `spiffe_id`.
    pub fn new(settings: LocalCaSettings, spiffe_id: SpiffeId) -> Self {
        Self { settings, spiffe_id, schedule: Schedule::new(), authority: None }
    }

    /// Issues a new certificate.
    ///
    /// # Errors
    /// [`HboneError::Credential`] if a file is unusable, or if the CA cannot issue this identity.
    pub fn issue(&mut self) -> Result<Identity, HboneError> {
        let Self { settings, spiffe_id, authority: kept, .. } = self;
        let authority = match (CertificateAuthority::open(&settings.dir), kept) {
            (Ok(authority), kept) => kept.insert(authority),
            (Err(error), Some(kept)) if is_forbidden(&error) => kept,
            (Err(error), _) => return Err(error),
        };
        let issued = authority.issue(spiffe_id, settings.ttl)?;
        let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
        let identity = Identity::from_pem(chain, key, authority.roots_pem().as_bytes())?;
        valid_now(&settings.dir, identity)
    }
}

fn is_forbidden(error: &HboneError) -> bool {
    matches!(error, HboneError::Credential { what: CredentialProblem::Permission, .. })
}

impl IdentitySource for LocalCaSource {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(async {
            self.schedule.due().await;
            let issued = self.issue();
            match &issued {
                Ok(identity) => self.schedule.succeeded(identity.expires()),
                Err(_) => self.schedule.failed(),
            }
            issued
        })
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
        LocalCaSource::new(settings, id(CLIENT))
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
