//! A source of certificates that another process issues. That process holds the CA's key.
//!
//! Not here: the connection to that process.

use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use underpass_config::{Quoted, SpiffeId};

use super::{IdentitySource, NextIdentity, valid_now};
use crate::ca::IssuedCertificate;
use crate::error::{HboneError, IssuerProblem};
use crate::identity::Identity;
use crate::identity::renewal::Schedule;

/// Issues certificates in another process.
pub trait CertificateIssuer: fmt::Debug + Send + Sync {
    /// The issuer's name in errors and logs.
    fn name(&self) -> &str;

    /// Issues a certificate for `id`, and returns it with the trusted roots in PEM.
    fn issue(&self, id: &SpiffeId) -> IssueFuture;
}

/// The certificate and the roots in PEM, or the reason why none was issued.
pub type IssueFuture =
    Pin<Box<dyn Future<Output = Result<(IssuedCertificate, String), String>> + Send>>;

/// A source of one workload's certificates.
#[derive(Debug)]
pub struct IssuedSource {
    issuer: Arc<dyn CertificateIssuer>,
    spiffe_id: SpiffeId,
    schedule: Schedule,
}

impl IssuedSource {
    /// A source of certificates for `spiffe_id`.
    pub fn new(issuer: Arc<dyn CertificateIssuer>, spiffe_id: SpiffeId) -> Self {
        Self { issuer, spiffe_id, schedule: Schedule::new() }
    }

    async fn issue(&self) -> Result<Identity, HboneError> {
        let problem = |what| {
            let issuer = self.issuer.name().to_owned();
            HboneError::Issuer { issuer, what, source: None }
        };
        let issued = self.issuer.issue(&self.spiffe_id).await;
        let (issued, roots) =
            issued.map_err(|error| problem(IssuerProblem::Unavailable(Quoted::new(error))))?;
        let (chain, key) = (issued.chain_pem.as_bytes(), issued.key_pem.as_bytes());
        let identity = Identity::from_pem(chain, key, roots.as_bytes())?;
        if *identity.spiffe_id() != self.spiffe_id {
            let (requested, got) = (self.spiffe_id.clone(), Quoted::new(identity.spiffe_id()));
            return Err(problem(IssuerProblem::WrongIdentity { requested, got }));
        }
        valid_now(Path::new(self.issuer.name()), identity)
    }
}

impl IdentitySource for IssuedSource {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(async {
            self.schedule.due().await;
            let issued = self.issue().await;
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
    use super::*;
    use crate::testing::{CLIENT, HOUR, SERVER, authority, id};

    /// Issues certificates for this identity, not for the requested one. `None`: fails.
    #[derive(Debug)]
    struct Issuer(Option<&'static str>);

    impl CertificateIssuer for Issuer {
        fn name(&self) -> &str {
            "another process"
        }

        fn issue(&self, _: &SpiffeId) -> IssueFuture {
            let authority = authority("td");
            let issued = self.0.map(|issued| authority.issue(&id(issued), HOUR).unwrap());
            let outcome = issued.ok_or_else(|| "no such pod".to_owned());
            Box::pin(
                async move { outcome.map(|issued| (issued, authority.roots_pem().to_owned())) },
            )
        }
    }

    async fn next(issuer: Issuer) -> Result<Identity, HboneError> {
        IssuedSource::new(Arc::new(issuer), id(CLIENT)).next().await
    }

    #[tokio::test]
    async fn uses_issued_certificate() {
        assert_eq!(next(Issuer(Some(CLIENT))).await.unwrap().spiffe_id(), &id(CLIENT));
    }

    #[tokio::test]
    async fn rejects_certificate_of_another_identity() {
        let error = next(Issuer(Some(SERVER))).await.unwrap_err();
        let HboneError::Issuer { what: IssuerProblem::WrongIdentity { .. }, .. } = error else {
            panic!("{error}");
        };
    }

    #[tokio::test]
    async fn reports_refusal_with_its_issuer() {
        let error = next(Issuer(None)).await.unwrap_err();
        let HboneError::Issuer { issuer, what: IssuerProblem::Unavailable(_), .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(issuer, "another process");
    }
}
