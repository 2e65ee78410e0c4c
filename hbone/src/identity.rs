//! Who we are: a certificate, its key and the roots that we trust, checked before they are used.
//!
//! Not here: how a peer proves itself (`tls`), and when files are read again.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::CertifiedKey;
use rustls::{InconsistentKeys, RootCertStore};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use underpass_config::{IdentityFiles, SpiffeId};
use x509_parser::time::ASN1Time;

use crate::tls;
use crate::{CredentialProblem, HboneError};

/// One generation of our certificate. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Identity(Arc<Generation>);

#[derive(Debug)]
struct Generation {
    spiffe_id: SpiffeId,
    not_before: SystemTime,
    expires: SystemTime,
    certified_key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
}

/// PEM and what to call it in an error.
#[derive(Clone, Copy)]
struct Source<'a> {
    name: &'a Path,
    pem: &'a [u8],
}

impl Identity {
    /// Reads and checks the three files. A key that others may read is used, with a warning.
    ///
    /// # Errors
    /// [`HboneError::Credential`], naming the file and what is wrong with it.
    pub fn from_files(files: &IdentityFiles) -> Result<Self, HboneError> {
        let certificate = read(&files.certificate)?;
        let key = read(&files.key)?;
        let roots = read(&files.roots)?;
        warn_if_exposed(&files.key)?;
        Self::check(
            Source { name: &files.certificate, pem: &certificate },
            Source { name: &files.key, pem: &key },
            Source { name: &files.roots, pem: &roots },
            SystemTime::now(),
        )
    }

    /// The same from memory: the leaf and its chain, the leaf's key, the trusted roots.
    ///
    /// # Errors
    /// [`HboneError::Credential`], calling them `certificate`, `key` and `roots`.
    pub fn from_pem(certificate: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, HboneError> {
        Self::from_pem_at(certificate, key, roots, SystemTime::now())
    }

    pub(crate) fn from_pem_at(
        certificate: &[u8],
        key: &[u8],
        roots: &[u8],
        now: SystemTime,
    ) -> Result<Self, HboneError> {
        Self::check(
            Source { name: Path::new("certificate"), pem: certificate },
            Source { name: Path::new("key"), pem: key },
            Source { name: Path::new("roots"), pem: roots },
            now,
        )
    }

    /// Who we are.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.0.spiffe_id
    }

    /// When the leaf becomes valid.
    pub fn not_before(&self) -> SystemTime {
        self.0.not_before
    }

    /// When the leaf stops being valid.
    pub fn expires(&self) -> SystemTime {
        self.0.expires
    }

    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        self.0.certified_key.clone()
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        self.0.roots.clone()
    }

    fn check(
        certificate: Source<'_>,
        key: Source<'_>,
        roots: Source<'_>,
        now: SystemTime,
    ) -> Result<Self, HboneError> {
        let chain = certificates(certificate)?;
        let leaf = chain.first().map(AsRef::as_ref).unwrap_or_default();
        let (spiffe_id, not_before, expires) =
            read_leaf(leaf).map_err(|what| HboneError::credential(certificate.name, what))?;
        if expires <= now {
            let what = CredentialProblem::Expired(expires);
            return Err(HboneError::credential(certificate.name, what));
        }
        let certified_key = Arc::new(pair(chain, key)?);
        let roots = Arc::new(root_store(roots)?);
        Ok(Self(Arc::new(Generation { spiffe_id, not_before, expires, certified_key, roots })))
    }
}

fn read(file: &Path) -> Result<Vec<u8>, HboneError> {
    fs::read(file).map_err(|error| HboneError::file(file, error))
}

fn warn_if_exposed(key: &Path) -> Result<(), HboneError> {
    let metadata = fs::metadata(key).map_err(|error| HboneError::file(key, error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let file = key.display();
        tracing::warn!(%file, mode = %format_args!("{mode:04o}"), "others may read the private key: chmod 0600");
    }
    Ok(())
}

fn certificates(source: Source<'_>) -> Result<Vec<CertificateDer<'static>>, HboneError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(source.pem)
        .collect::<Result<_, _>>()
        .map_err(|error| HboneError::credential(source.name, pem_problem(&error, "certificate")))?;
    if found.is_empty() {
        return Err(HboneError::credential(source.name, CredentialProblem::Empty("certificate")));
    }
    Ok(found)
}

fn pair(chain: Vec<CertificateDer<'static>>, key: Source<'_>) -> Result<CertifiedKey, HboneError> {
    let problem = |what| HboneError::credential(key.name, what);
    let der = PrivateKeyDer::from_pem_slice(key.pem)
        .map_err(|error| problem(pem_problem(&error, "private key")))?;
    CertifiedKey::from_der(chain, der, &tls::provider()).map_err(|error| {
        problem(match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                CredentialProblem::KeyMismatch
            }
            other => CredentialProblem::Key(other.to_string()),
        })
    })
}

fn root_store(source: Source<'_>) -> Result<RootCertStore, HboneError> {
    let mut store = RootCertStore::empty();
    for root in certificates(source)? {
        store.add(root).map_err(|error| {
            HboneError::credential(source.name, CredentialProblem::Certificate(error.to_string()))
        })?;
    }
    Ok(store)
}

fn read_leaf(der: &[u8]) -> Result<(SpiffeId, SystemTime, SystemTime), CredentialProblem> {
    let malformed = |error: String| CredentialProblem::Certificate(error);
    let (_, leaf) =
        x509_parser::parse_x509_certificate(der).map_err(|error| malformed(error.to_string()))?;
    let names = tls::uri_names(der).ok_or_else(|| malformed("subjectAltName".to_owned()))?;
    let mut ids = names.iter().filter_map(|name| name.parse().ok());
    let (Some(id), None) = (ids.next(), ids.next()) else {
        return Err(CredentialProblem::Names(names));
    };
    let validity = leaf.validity();
    Ok((id, system_time(validity.not_before), system_time(validity.not_after)))
}

/// Before 1970 counts as 1970: nothing is valid so early.
fn system_time(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn pem_problem(error: &pem::Error, wanted: &'static str) -> CredentialProblem {
    match error {
        pem::Error::NoItemsFound => CredentialProblem::Empty(wanted),
        other => CredentialProblem::Pem(other.to_string()),
    }
}

#[cfg(test)]
mod tests;
