//! Reads and writes credentials in PEM. Errors name the file.

use std::fs;
use std::path::Path;

use pem::{EncodeConfig, LineEnding, Pem};
use rustls_pki_types::pem::{self as pki, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::error::{CredentialProblem, HboneError};

const CERTIFICATE: &str = "certificate";
const KEY: &str = "private key";
const REVOCATION_LIST: &str = "X509 CRL";

pub(crate) fn read(file: &Path) -> Result<Vec<u8>, HboneError> {
    fs::read(file).map_err(|error| HboneError::file(file, error))
}

/// Reads all certificates. Fails if there are none.
pub(crate) fn certificates(
    name: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, HboneError> {
    sections(name, pem, CERTIFICATE)
}

/// Reads the first private key.
pub(crate) fn private_key(name: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, HboneError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| problem(name, &error, KEY))
}

/// Reads revocation lists: PEM with at least one list, or DER with exactly one.
pub(crate) fn revocation_lists(
    name: &Path,
    bytes: Vec<u8>,
) -> Result<Vec<CertificateRevocationListDer<'static>>, HboneError> {
    // DER starts with a SEQUENCE tag and a length above 127; PEM never has that byte's high bit.
    if matches!(bytes.as_slice(), [0x30, 0x80..=0xff, ..]) {
        return Ok(vec![bytes.into()]);
    }
    sections(name, &bytes, REVOCATION_LIST)
}

/// The PEM form of certificates.
pub(crate) fn of_certificates(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|one| encode("CERTIFICATE", one)).collect()
}

/// The PEM form of a private key in PKCS#8.
pub(crate) fn of_key(pkcs8: &[u8]) -> String {
    encode("PRIVATE KEY", pkcs8)
}

fn encode(label: &str, der: &[u8]) -> String {
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    pem::encode_config(&Pem::new(label, der), config)
}

fn sections<T: PemObject>(
    name: &Path,
    pem: &[u8],
    wanted: &'static str,
) -> Result<Vec<T>, HboneError> {
    let found: Vec<T> = T::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| problem(name, &error, wanted))?;
    if found.is_empty() {
        return Err(HboneError::credential(name, CredentialProblem::Empty(wanted)));
    }
    Ok(found)
}

fn problem(name: &Path, error: &pki::Error, wanted: &'static str) -> HboneError {
    HboneError::credential(
        name,
        match error {
            pki::Error::NoItemsFound => CredentialProblem::Empty(wanted),
            other => CredentialProblem::Pem(other.to_string()),
        },
    )
}
