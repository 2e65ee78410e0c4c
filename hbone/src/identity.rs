//! A workload's identity: its certificate, key and roots, checked before use.
//!
//! `trust` adds further trust domains, and `tls` authenticates peers.

pub(crate) mod credentials;
pub(crate) mod description;
pub(crate) mod files;
pub(crate) mod identity_pem;
pub(crate) mod inspection;
pub(crate) mod pem;
pub(crate) mod renewal;
pub(crate) mod rotation;
pub(crate) mod source;
pub(crate) mod svid;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::InconsistentKeys;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor};
use underpass_config::{Cipher, IdentityFiles, SpiffeId, TrustDomain};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::time::ASN1Time;

use crate::clock;
use crate::crypto::provider;
use crate::error::{CredentialProblem, HboneError};
use crate::identity::files::warn_if_exposed;
use crate::identity::identity_pem::IdentityPem;
use crate::identity::svid::workload_id;
use crate::trust::bundle::Bundle;

/// A certificate with its key and roots. Never changes; a renewal creates another. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Identity(Arc<IdentityParts>);

#[derive(Debug)]
struct IdentityParts {
    leaf: Leaf,
    certified_key: Arc<CertifiedKey>,
    bundles: BTreeMap<TrustDomain, Bundle>,
}

/// The fields of a leaf certificate that this crate reads.
#[derive(Debug)]
struct Leaf {
    spiffe_id: SpiffeId,
    not_before: SystemTime,
    expires: SystemTime,
}

/// The chain and the key of an identity, each with a name for errors.
struct ChainAndKey<'a> {
    certificate: &'a Path,
    chain: Vec<CertificateDer<'static>>,
    key: &'a Path,
    key_der: PrivateKeyDer<'static>,
}

impl Identity {
    /// Creates an identity from a certificate chain (leaf first), its key, and roots by trust
    /// domain. The roots must include those of the leaf's trust domain. Errors use `name` as the
    /// file.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the reason.
    pub fn new(
        name: &Path,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        bundles: BTreeMap<TrustDomain, Bundle>,
    ) -> Result<Self, HboneError> {
        let parts = ChainAndKey { certificate: name, chain, key: name, key_der: key };
        let leaf = parts.leaf(clock::now())?;
        let own = leaf.spiffe_id.trust_domain();
        if !bundles.contains_key(own) {
            let what = CredentialProblem::NoRoots(own.clone());
            return Err(HboneError::credential(name, what));
        }
        parts.assemble(leaf, bundles)
    }

    /// Reads and checks the files. Logs a warning if other users can read the key.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the file and the reason.
    pub fn from_files(files: &IdentityFiles) -> Result<Self, HboneError> {
        Ok(Self::from_files_with_pem(files)?.1)
    }

    /// Like [`from_files`](Self::from_files), with the PEM form.
    pub(crate) fn from_files_with_pem(
        files: &IdentityFiles,
    ) -> Result<(IdentityPem, Self), HboneError> {
        let read = Self::read_files(files)?;
        warn_if_exposed(&files.key, "the private key")?;
        Ok(read)
    }

    /// Like [`from_files`](Self::from_files), without a warning.
    pub(crate) fn from_files_silently(files: &IdentityFiles) -> Result<Self, HboneError> {
        Ok(Self::read_files(files)?.1)
    }

    fn read_files(files: &IdentityFiles) -> Result<(IdentityPem, Self), HboneError> {
        let certificate = pem::read(&files.certificate)?;
        let key = pem::read(&files.key)?;
        let roots = pem::read(&files.roots)?;
        let identity = Self::check(
            (&files.certificate, &certificate),
            (&files.key, &key),
            (&files.roots, &roots),
            clock::now(),
        )?;
        let text = |pem: Vec<u8>| String::from_utf8_lossy(&pem).into_owned();
        let domain = identity.spiffe_id().trust_domain().clone();
        let bundles = BTreeMap::from([(domain, text(roots))]);
        let pem = IdentityPem { chain: text(certificate), key: text(key), bundles };
        Ok((pem, identity))
    }

    /// Creates an identity from PEM: a certificate chain (leaf first), its key, and roots.
    ///
    /// # Errors
    /// [`HboneError::Credential`], with `certificate`, `key` or `roots` as the file.
    pub fn from_pem(certificate: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, HboneError> {
        Self::from_pem_at(certificate, key, roots, clock::now())
    }

    pub(crate) fn from_pem_at(
        certificate: &[u8],
        key: &[u8],
        roots: &[u8],
        now: SystemTime,
    ) -> Result<Self, HboneError> {
        let [certificate_name, key_name, roots_name] =
            ["certificate", "key", "roots"].map(Path::new);
        Self::check((certificate_name, certificate), (key_name, key), (roots_name, roots), now)
    }

    /// The SPIFFE ID in the certificate.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.0.leaf.spiffe_id
    }

    /// The start of the certificate's validity.
    pub fn not_before(&self) -> SystemTime {
        self.0.leaf.not_before
    }

    /// The end of the certificate's validity.
    pub fn expires(&self) -> SystemTime {
        self.0.leaf.expires
    }

    /// Checks that the identity is valid now and that its own roots verify it.
    pub(crate) fn valid_now(self, name: &Path) -> Result<Self, HboneError> {
        let now = clock::now();
        if self.not_before() > now {
            let what = CredentialProblem::NotYetValid(self.not_before());
            return Err(HboneError::credential(name, what));
        }
        if self.expires() <= now {
            let what = CredentialProblem::Expired(self.expires());
            return Err(HboneError::credential(name, what));
        }
        self.verify(name, now)?;
        Ok(self)
    }

    /// Verifies the certificate with its own roots at the time `now`, as peers with the same roots
    /// do. Does not check revocation.
    fn verify(&self, name: &Path, now: SystemTime) -> Result<(), HboneError> {
        let own = self.spiffe_id().trust_domain();
        let anchors = self.bundles().get(own).map(Bundle::anchors).unwrap_or_default();
        verify_chain(self.chain(), anchors, now).map_err(|what| HboneError::credential(name, what))
    }

    /// The certificate chain: the leaf, then intermediates.
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.certified_key.cert
    }

    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        self.0.certified_key.clone()
    }

    /// The roots that came with the certificate, by trust domain.
    pub(crate) fn bundles(&self) -> &BTreeMap<TrustDomain, Bundle> {
        &self.0.bundles
    }

    /// The roots of the certificate's own trust domain.
    #[cfg(test)]
    pub(crate) fn roots(&self) -> &[TrustAnchor<'static>] {
        self.bundles()[self.spiffe_id().trust_domain()].anchors()
    }

    fn check(
        certificate: (&Path, &[u8]),
        key: (&Path, &[u8]),
        roots: (&Path, &[u8]),
        now: SystemTime,
    ) -> Result<Self, HboneError> {
        let parts = ChainAndKey {
            certificate: certificate.0,
            chain: pem::certificates(certificate.0, certificate.1)?,
            key: key.0,
            key_der: pem::private_key(key.0, key.1)?,
        };
        let leaf = parts.leaf(now)?;
        let bundle = Bundle::from_pem(roots.0, roots.1)?;
        let bundles = BTreeMap::from([(leaf.spiffe_id.trust_domain().clone(), bundle)]);
        parts.assemble(leaf, bundles)
    }
}

impl ChainAndKey<'_> {
    fn leaf(&self, now: SystemTime) -> Result<Leaf, HboneError> {
        let der = self.chain.first().map(AsRef::as_ref).unwrap_or_default();
        let problem = |what| HboneError::credential(self.certificate, what);
        let leaf = read_leaf(der).map_err(problem)?;
        if leaf.expires <= now {
            return Err(problem(CredentialProblem::Expired(leaf.expires)));
        }
        Ok(leaf)
    }

    fn assemble(
        self,
        leaf: Leaf,
        bundles: BTreeMap<TrustDomain, Bundle>,
    ) -> Result<Identity, HboneError> {
        let certified_key = certified_key(self.chain, self.key_der)
            .map_err(|what| HboneError::credential(self.key, what))?;
        let certified_key = Arc::new(certified_key);
        Ok(Identity(Arc::new(IdentityParts { leaf, certified_key, bundles })))
    }
}

/// Combines a chain with its key, if the key belongs to the first certificate.
pub(crate) fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, CredentialProblem> {
    CertifiedKey::from_der(chain, key, &provider(&Cipher::ALL)).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            CredentialProblem::KeyMismatch
        }
        other => CredentialProblem::Key(other.to_string()),
    })
}

/// Verifies a chain with these roots, as a server's and as a client's.
fn verify_chain(
    chain: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    now: SystemTime,
) -> Result<(), CredentialProblem> {
    let [leaf, intermediates @ ..] = chain else {
        return Err(CredentialProblem::Empty("certificate"));
    };
    let algorithms = provider(&Cipher::ALL).signature_verification_algorithms;
    let verified = [KeyUsage::server_auth(), KeyUsage::client_auth()].map(|usage| {
        let now = clock::unix(now);
        let leaf = EndEntityCert::try_from(leaf)?;
        leaf.verify_for_usage(algorithms.all, anchors, intermediates, now, usage, None, None)?;
        Ok(())
    });
    let verified = verified.into_iter().collect::<Result<(), webpki::Error>>();
    verified.map_err(|error| CredentialProblem::UnknownIssuer(error.to_string()))
}

fn read_leaf(der: &[u8]) -> Result<Leaf, CredentialProblem> {
    let malformed = |error: String| CredentialProblem::Certificate(error);
    let (_, leaf) =
        x509_parser::parse_x509_certificate(der).map_err(|error| malformed(error.to_string()))?;
    let spiffe_id = workload_id(der).map_err(CredentialProblem::Svid)?;
    let validity = leaf.validity();
    Ok(Leaf {
        spiffe_id,
        not_before: system_time(validity.not_before),
        expires: system_time(validity.not_after),
    })
}

/// Converts a time. Times before 1970 become 1970.
pub(crate) fn system_time(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[cfg(test)]
mod tests;
