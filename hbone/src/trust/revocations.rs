//! Reads certificate revocation lists (RFC 5280 section 5), and selects the lists for a certificate
//! chain.
//!
//! webpki checks certificates and signatures. A list that does not parse is rejected when it is
//! read.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{ParsedExtension, X509Extension};
use x509_parser::time::ASN1Time;

use crate::clock;
use crate::error::{CredentialProblem, HboneError};
use crate::identity::{pem, system_time};

/// The revocation lists of all files. If there are none, revocation is not checked; otherwise a
/// certificate without a list is refused.
#[derive(Debug, Default)]
pub(crate) struct Revocations(Vec<RevocationList>);

#[derive(Debug)]
struct RevocationList {
    file: PathBuf,
    scope: Scope,
    this_update: ASN1Time,
    next_update: SystemTime,
    list: CertRevocationList<'static>,
}

/// The certificates that a list covers. Of two lists with the same scope, the newer one applies.
#[derive(Debug, PartialEq, Eq)]
struct Scope {
    /// The issuer's distinguished name in DER.
    issuer: Vec<u8>,
    /// The identifier of the signing key, if present. An issuer that changes its key keeps its
    /// name.
    key: Option<Vec<u8>>,
    /// The extension that limits the list to some of the issuer's certificates.
    distribution_point: Option<Vec<u8>>,
}

impl Revocations {
    /// # Errors
    /// [`HboneError::Credential`] for a file that cannot be read, or that contains anything
    /// unsupported.
    pub(super) fn read(files: &[PathBuf]) -> Result<Self, HboneError> {
        let mut lists = Self::default();
        for file in files {
            for der in pem::revocation_lists(file, pem::read(file)?)? {
                let list = RevocationList::parse(file, &der).map_err(|reason| {
                    HboneError::credential(file, CredentialProblem::RevocationList(reason))
                })?;
                list.warn_if_expired();
                lists.add(list);
            }
        }
        Ok(lists)
    }

    fn add(&mut self, list: RevocationList) {
        match self.0.iter_mut().find(|known| known.scope == list.scope) {
            Some(known) if list.this_update > known.this_update => *known = list,
            Some(_) => {}
            None => self.0.push(list),
        }
    }

    /// All lists. Those that a key in this chain has signed are first, because webpki uses the
    /// first list with the issuer's name.
    pub(super) fn for_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Vec<&CertRevocationList<'static>> {
        let mut lists: Vec<&RevocationList> = self.0.iter().collect();
        if lists.len() > 1 {
            let keys: Vec<Vec<u8>> = parsed(leaf, intermediates)
                .filter_map(|certificate| issuer_key(certificate.extensions()))
                .collect();
            let is_signed = |list: &RevocationList| {
                list.scope.key.as_ref().is_some_and(|key| keys.contains(key))
            };
            lists.sort_by_key(|list| !is_signed(list));
        }
        lists.into_iter().map(|list| &list.list).collect()
    }

    /// Converts an error of webpki about the lists. `None` for other errors.
    pub(super) fn explain(
        &self,
        error: &webpki::Error,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Option<HboneError> {
        use webpki::Error as Pki;
        #[expect(deprecated, reason = "webpki may still return them")]
        match error {
            Pki::UnknownRevocationStatus => {
                let issuer = self.uncovered(leaf, intermediates).into();
                Some(HboneError::RevocationUnknown { issuer })
            }
            Pki::CrlExpired { next_update, .. } => {
                let list =
                    self.0.iter().find(|list| clock::unix(list.next_update) == *next_update)?;
                let (file, expired) = (list.file.clone(), list.next_update);
                Some(HboneError::RevocationListExpired { file, expired })
            }
            Pki::InvalidCrlSignatureForPublicKey
            | Pki::IssuerNotCrlSigner
            | Pki::UnsupportedCrlSignatureAlgorithm
            | Pki::UnsupportedCrlSignatureAlgorithmContext(_)
            | Pki::UnsupportedCrlSignatureAlgorithmForPublicKey
            | Pki::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => {
                Some(HboneError::RevocationListUntrusted { source: error.clone() })
            }
            _ => None,
        }
    }

    /// The first issuer in a chain that has no list.
    fn uncovered(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> String {
        let is_covered = |certificate: &X509Certificate<'_>| {
            self.0.iter().any(|list| list.scope.issuer == certificate.issuer().as_raw())
        };
        let mut uncovered = parsed(leaf, intermediates).filter(|one| !is_covered(one));
        uncovered.next().map_or_else(
            // The issuer's lists cover only other certificates.
            || "each distribution point".to_owned(),
            |certificate| certificate.issuer().to_string(),
        )
    }
}

impl RevocationList {
    fn parse(file: &Path, der: &[u8]) -> Result<Self, String> {
        let list = OwnedCertRevocationList::from_der(der).map_err(|error| error.to_string())?;
        let list = CertRevocationList::from(list);
        let (_, parsed) = x509_parser::parse_x509_crl(der).map_err(|error| error.to_string())?;
        let next_update = parsed.next_update().ok_or("it has no nextUpdate")?;
        let scope = Scope {
            issuer: parsed.issuer().as_raw().to_vec(),
            key: issuer_key(parsed.extensions()),
            distribution_point: list.issuing_distribution_point().map(<[u8]>::to_vec),
        };
        Ok(Self {
            file: file.to_owned(),
            scope,
            this_update: parsed.last_update(),
            next_update: system_time(next_update),
            list,
        })
    }

    fn warn_if_expired(&self) {
        let (file, expired) = (self.file.clone(), self.next_update);
        if expired <= clock::now() {
            let error = HboneError::RevocationListExpired { file, expired };
            tracing::warn!("{error}");
        }
    }
}

/// The certificates of a chain that parse. Verification rejects a chain with a certificate that
/// does not parse.
fn parsed<'a>(
    leaf: &'a CertificateDer<'_>,
    intermediates: &'a [CertificateDer<'_>],
) -> impl Iterator<Item = X509Certificate<'a>> {
    std::iter::once(leaf)
        .chain(intermediates)
        .filter_map(|der| Some(x509_parser::parse_x509_certificate(der).ok()?.1))
}

/// Reads the authority key identifier (RFC 5280 sections 4.2.1.1 and 5.2.1).
fn issuer_key(extensions: &[X509Extension<'_>]) -> Option<Vec<u8>> {
    extensions.iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(issuer) => {
            issuer.key_identifier.as_ref().map(|key| key.0.to_vec())
        }
        _ => None,
    })
}
