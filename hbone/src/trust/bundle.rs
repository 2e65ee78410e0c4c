//! The roots of one trust domain.

use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, TrustAnchor};

use crate::error::{CredentialProblem, HboneError};
use crate::identity::pem;

/// The roots of one trust domain. Contains at least one. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Bundle {
    store: Arc<RootCertStore>,
    /// The whole certificates, to show them.
    certificates: Arc<[CertificateDer<'static>]>,
}

impl Bundle {
    /// Parses PEM certificates. Errors use `name` as the file.
    ///
    /// # Errors
    /// [`HboneError::Credential`] if there is no certificate, or if one is malformed.
    pub fn from_pem(name: &Path, pem: &[u8]) -> Result<Self, HboneError> {
        Self::from_der(name, pem::certificates(name, pem)?)
    }

    /// Parses DER certificates.
    ///
    /// # Errors
    /// As [`Bundle::from_pem`].
    pub fn from_der(
        name: &Path,
        roots: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<Self, HboneError> {
        let mut store = RootCertStore::empty();
        let certificates: Arc<[_]> = roots.into_iter().collect();
        for root in certificates.iter() {
            store.add(root.clone()).map_err(|error| {
                HboneError::credential(name, CredentialProblem::Certificate(error.to_string()))
            })?;
        }
        if store.is_empty() {
            return Err(HboneError::credential(name, CredentialProblem::Empty("certificate")));
        }
        Ok(Self { store: Arc::new(store), certificates })
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        self.store.clone()
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.store.roots
    }

    /// The root certificates.
    pub(crate) fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.store, &other.store) || self.store.roots == other.store.roots
    }
}

impl Eq for Bundle {}
