//! Writes certificate revocation lists (RFC 5280 section 5): `underpass ca revoke`. `trust` reads
//! them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::SystemTime;

use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;
use x509_parser::revocation_list::{CertificateRevocationList, RevokedCertificate};

use super::{
    CA_LIFETIME, CERTIFICATE_FILE, CLOCK_SKEW, CertificateAuthority, PUBLIC, offset_date_time,
    replace,
};
use crate::error::{CredentialProblem, HboneError};
use crate::identity::pem;

/// The file name of the revocation list in the CA's directory.
const CRL_FILE: &str = "crl.pem";

/// The content of a revocation list: its number, and the revocation time of each serial number.
#[derive(Default)]
struct RevocationListContent {
    number: u64,
    serials: BTreeMap<Serial, OffsetDateTime>,
}

/// The serial number of a certificate (RFC 5280 section 4.1.2.2). It is written as openssl and the
/// log of `ca serve` print it: `0a:1b:2c`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Serial(Vec<u8>);

/// The maximum length of a serial number in bytes (RFC 5280 section 4.1.2.2).
const MAX_SERIAL: usize = 20;

impl FromStr for Serial {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let byte = |pair: &str| {
            let digits = pair.len() == 2 && pair.bytes().all(|c| c.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.filter(|bytes| bytes.len() <= MAX_SERIAL);
        bytes.map(Self).ok_or("must be a serial number in hexadecimal, such as 0a:1b:2c")
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<_> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.write_str(&bytes.join(":"))
    }
}

impl Serial {
    /// The serial number of the first certificate in `pem`.
    pub(crate) fn of(pem: &str) -> Result<Self, CredentialProblem> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| CredentialProblem::Pem(error.to_string()))?;
        Ok(Self(parse(&der)?.raw_serial().to_vec()))
    }
}

impl CertificateAuthority {
    /// Adds certificates and serial numbers to the revocation list `crl.pem` in `dir`. Creates the
    /// list if it is missing. Each file contains a PEM chain, of which the leaf is revoked. Returns
    /// the number of revoked certificates.
    ///
    /// The list expires with the CA's certificate, not earlier: only a revocation rewrites it, and
    /// proxies reject all peers if the list is expired.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the file that cannot be read or written, or whose
    /// certificate another CA issued.
    pub fn revoke<P: AsRef<Path>>(
        &self,
        dir: &Path,
        certificates: &[P],
        serials: &[Serial],
    ) -> Result<usize, HboneError> {
        let file = dir.join(CRL_FILE);
        let mut revoked = read_list(&file)?;
        let now = OffsetDateTime::from(SystemTime::now());
        for certificate in certificates.iter().map(AsRef::as_ref) {
            let serial = self.serial_of(certificate)?;
            revoked.serials.entry(serial).or_insert(now);
        }
        for serial in serials {
            revoked.serials.entry(serial.clone()).or_insert(now);
        }
        let pem = self.list(&revoked).map_err(|what| HboneError::credential(&file, what))?;
        replace(&file, &pem, PUBLIC)?;
        Ok(revoked.serials.len())
    }

    /// Reads the serial number of a certificate, which this CA must have issued.
    fn serial_of(&self, file: &Path) -> Result<Serial, HboneError> {
        let problem = |what| HboneError::credential(file, what);
        let chain = pem::certificates(file, &pem::read(file)?)?;
        let own = pem::certificates(Path::new(CERTIFICATE_FILE), self.certificate_pem.as_bytes())?;
        // The parser guarantees that a chain contains at least one certificate.
        let leaf = chain.first().map(AsRef::as_ref).unwrap_or_default();
        let own = own.first().map(AsRef::as_ref).unwrap_or_default();
        let (leaf, own) = (parse(leaf).map_err(problem)?, parse(own).map_err(problem)?);
        if leaf.verify_signature(Some(own.public_key())).is_err() {
            return Err(problem(CredentialProblem::ForeignIssuer));
        }
        Ok(Serial(leaf.raw_serial().to_vec()))
    }

    fn list(&self, revoked: &RevocationListContent) -> Result<String, CredentialProblem> {
        let now = SystemTime::now();
        let times = now.checked_sub(CLOCK_SKEW).zip(now.checked_add(CA_LIFETIME));
        let (this_update, next_update) = times.ok_or(CredentialProblem::Lifetime)?;
        let entry = |(serial, time): (&Serial, &OffsetDateTime)| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial.0),
            revocation_time: *time,
            reason_code: Some(RevocationReason::Unspecified),
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: offset_date_time(this_update)?,
            next_update: offset_date_time(next_update)?,
            crl_number: SerialNumber::from(revoked.number + 1),
            issuing_distribution_point: None,
            revoked_certs: revoked.serials.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer).and_then(|list| list.pem());
        list.map_err(super::issue_problem)
    }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, CredentialProblem> {
    let parsed = X509Certificate::from_der(der);
    parsed
        .map(|(_, certificate)| certificate)
        .map_err(|error| CredentialProblem::Certificate(error.to_string()))
}

/// Reads the revocation list. A missing file is an empty list.
fn read_list(file: &Path) -> Result<RevocationListContent, HboneError> {
    if !file.try_exists().map_err(|error| HboneError::file(file, error))? {
        return Ok(RevocationListContent::default());
    }
    let lists = pem::revocation_lists(file, pem::read(file)?)?;
    let der = lists.first().map(AsRef::as_ref).unwrap_or_default();
    parse_list(der).map_err(|what| HboneError::credential(file, what))
}

fn parse_list(der: &[u8]) -> Result<RevocationListContent, CredentialProblem> {
    let (_, list) = CertificateRevocationList::from_der(der)
        .map_err(|error| CredentialProblem::RevocationList(error.to_string()))?;
    let number = list.crl_number().and_then(|number| u64::try_from(number).ok());
    let entry = |revoked: &RevokedCertificate<'_>| {
        (Serial(revoked.raw_serial().to_vec()), revoked.revocation_date.to_datetime())
    };
    let serials = list.iter_revoked_certificates().map(entry).collect();
    Ok(RevocationListContent { number: number.unwrap_or_default(), serials })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::ca::tests::TempDir;
    use crate::testing::{CLIENT, HOUR, SERVER, authority, id};

    fn issued(authority: &CertificateAuthority, dir: &Path, who: &str) -> PathBuf {
        let file = dir.join("leaf.pem");
        fs::write(&file, authority.issue(&id(who), HOUR).unwrap().chain_pem).unwrap();
        file
    }

    fn list(dir: &Path) -> RevocationListContent {
        read_list(&dir.join(CRL_FILE)).unwrap()
    }

    #[test]
    fn revocations_accumulate() {
        let dir = TempDir::new("revoke");
        let authority = authority("td");
        assert_eq!(authority.revoke::<&Path>(&dir.0, &[], &[]).unwrap(), 0);
        let client = issued(&authority, &dir.0, CLIENT);
        assert_eq!(authority.revoke(&dir.0, &[&client], &[]).unwrap(), 1);
        let first = list(&dir.0);
        let server = issued(&authority, &dir.0, SERVER);
        assert_eq!(authority.revoke(&dir.0, &[&server, &server], &[]).unwrap(), 2);
        let second = list(&dir.0);
        assert_eq!((first.number, second.number), (2, 3));
        for (serial, time) in first.serials {
            assert_eq!(second.serials.get(&serial), Some(&time));
        }
    }

    #[test]
    fn rejects_certificate_of_other_authority() {
        let dir = TempDir::new("revoke-foreign");
        let foreign = issued(&authority("td"), &dir.0, CLIENT);
        let refused = authority("td").revoke(&dir.0, &[&foreign], &[]).unwrap_err();
        assert!(matches!(
            refused,
            HboneError::Credential { what: CredentialProblem::ForeignIssuer, .. }
        ));
        assert!(!dir.0.join(CRL_FILE).exists());
    }

    #[test]
    fn revoking_serial_number_equals_revoking_its_certificate() {
        let dir = TempDir::new("revoke-serial");
        let authority = authority("td");
        let pem = authority.issue(&id(CLIENT), HOUR).unwrap().chain_pem;
        let serial = Serial::of(&pem).unwrap();
        assert_eq!(serial.to_string().parse(), Ok(serial.clone()));
        authority.revoke::<&Path>(&dir.0, &[], std::slice::from_ref(&serial)).unwrap();
        assert!(list(&dir.0).serials.contains_key(&serial));
        for bad in ["", "0", "0a:", "0a1b", "+1", "0a:1b:zz", &["00"; 21].join(":")] {
            assert!(bad.parse::<Serial>().is_err(), "{bad}");
        }
    }

    #[test]
    fn keeps_unreadable_revocation_list() {
        let dir = TempDir::new("revoke-damaged");
        fs::write(dir.0.join(CRL_FILE), "damaged").unwrap();
        authority("td").revoke::<&Path>(&dir.0, &[], &[]).unwrap_err();
        assert_eq!(fs::read(dir.0.join(CRL_FILE)).unwrap(), b"damaged");
    }
}
