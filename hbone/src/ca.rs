//! A small certificate authority on files, for meshes without one: `underpass ca init` and `underpass ca issue`.
//!
//! Not here: proving to the authority who one is. Whoever can read the directory can be anybody.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use underpass_config::{SpiffeId, TrustDomain};

use crate::{CredentialProblem, HboneError, tls};

const ROOTS_FILE: &str = "roots.pem";
const CERTIFICATE_FILE: &str = "ca.pem";
const KEY_FILE: &str = "ca.key";

const CA_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 60 * 60);
/// How far a peer's clock may be behind ours.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

const PUBLIC: u32 = 0o644;
const PRIVATE: u32 = 0o600;

/// Issues certificates for the identities of one trust domain.
#[derive(Debug)]
pub struct CertificateAuthority {
    trust_domain: TrustDomain,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A workload's certificate and key, as PEM.
#[derive(Clone)]
pub struct IssuedCertificate {
    /// The leaf, then the chain below the root (empty: the root issues).
    pub chain_pem: String,
    /// The leaf's private key, PKCS#8.
    pub key_pem: String,
}

impl CertificateAuthority {
    /// A new authority in memory.
    ///
    /// # Errors
    /// [`HboneError::Credential`] when the key or certificate cannot be generated.
    pub fn generate(trust_domain: TrustDomain) -> Result<Self, HboneError> {
        generate(trust_domain).map_err(|what| HboneError::credential(CERTIFICATE_FILE, what))
    }

    /// A new authority in `dir`, created if need be: `roots.pem` and `ca.pem` for all to read, `ca.key` for the owner.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the file that cannot be written; existing files are never replaced.
    pub fn init(dir: &Path, trust_domain: TrustDomain) -> Result<Self, HboneError> {
        fs::create_dir_all(dir).map_err(|error| HboneError::file(dir, error))?;
        for name in [KEY_FILE, CERTIFICATE_FILE, ROOTS_FILE] {
            let file = dir.join(name);
            if file.symlink_metadata().is_ok() {
                return Err(HboneError::credential(file, CredentialProblem::Exists));
            }
        }
        let authority = Self::generate(trust_domain)?;
        // The key first: whoever wins the race for it owns the directory.
        create(&dir.join(KEY_FILE), &authority.issuer.key().serialize_pem(), PRIVATE)?;
        create(&dir.join(CERTIFICATE_FILE), &authority.certificate_pem, PUBLIC)?;
        create(&dir.join(ROOTS_FILE), &authority.certificate_pem, PUBLIC)?;
        Ok(authority)
    }

    /// The authority that [`CertificateAuthority::init`] left in `dir`.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the file that cannot be read or used.
    pub fn open(dir: &Path) -> Result<Self, HboneError> {
        let (certificate, key) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
        let certificate_pem = read(&certificate)?;
        let key_pem = read(&key)?;
        let key_pair = KeyPair::from_pem(&key_pem).map_err(|error| {
            HboneError::credential(&key, CredentialProblem::Key(error.to_string()))
        })?;
        from_parts(certificate_pem, key_pair)
            .map_err(|what| HboneError::credential(certificate, what))
    }

    /// The trust domain that it vouches for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The root to trust, as PEM.
    pub fn roots_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A certificate for `id` and a new key, valid from a few minutes ago (clocks differ) until `ttl` from now.
    ///
    /// # Errors
    /// [`HboneError::Credential`] for an identity of another trust domain, or a `ttl` beyond the year 9999.
    pub fn issue(&self, id: &SpiffeId, ttl: Duration) -> Result<IssuedCertificate, HboneError> {
        let now = SystemTime::now();
        let lifetime = now.checked_sub(CLOCK_SKEW).zip(now.checked_add(ttl));
        let (not_before, not_after) = lifetime.ok_or_else(|| out_of_range(id))?;
        self.issue_between(id, not_before, not_after)
    }

    /// The same with an explicit validity, which may have passed.
    ///
    /// # Errors
    /// As [`CertificateAuthority::issue`].
    pub fn issue_between(
        &self,
        id: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<IssuedCertificate, HboneError> {
        let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue_for(id, not_before, not_after, &usages)
    }

    pub(crate) fn issue_for(
        &self,
        id: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
        usages: &[ExtendedKeyUsagePurpose],
    ) -> Result<IssuedCertificate, HboneError> {
        let problem = |what| HboneError::credential(id.to_string(), what);
        if id.trust_domain() != &self.trust_domain {
            let trust_domain = self.trust_domain.clone();
            return Err(problem(CredentialProblem::ForeignId { trust_domain, id: id.clone() }));
        }
        let mut params = leaf_params(id, not_before, not_after).map_err(problem)?;
        params.extended_key_usages = usages.to_vec();
        let key = new_key().map_err(problem)?;
        let leaf = params.signed_by(&key, &self.issuer).map_err(|error| problem(issue(error)))?;
        Ok(IssuedCertificate { chain_pem: leaf.pem(), key_pem: key.serialize_pem() })
    }
}

impl IssuedCertificate {
    /// Writes `PREFIX.key`, for the owner only, and `PREFIX.pem`, replacing older ones, each in one step.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the file that cannot be written.
    pub fn write(&self, prefix: &Path) -> Result<(), HboneError> {
        replace(&with_suffix(prefix, ".key"), &self.key_pem, PRIVATE)?;
        replace(&with_suffix(prefix, ".pem"), &self.chain_pem, PUBLIC)
    }
}

impl std::fmt::Debug for IssuedCertificate {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuedCertificate")
            .field("chain_pem", &self.chain_pem)
            .finish_non_exhaustive()
    }
}

fn generate(trust_domain: TrustDomain) -> Result<CertificateAuthority, CredentialProblem> {
    let now = SystemTime::now();
    let lifetime = now.checked_sub(CLOCK_SKEW).zip(now.checked_add(CA_LIFETIME));
    let (not_before, not_after) = lifetime.ok_or(CredentialProblem::Lifetime)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
    params.not_before = offset(not_before)?;
    params.not_after = offset(not_after)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = new_key()?;
    let certificate_pem = params.self_signed(&key).map_err(issue)?.pem();
    Ok(CertificateAuthority { trust_domain, certificate_pem, issuer: Issuer::new(params, key) })
}

fn from_parts(
    certificate_pem: String,
    key: KeyPair,
) -> Result<CertificateAuthority, CredentialProblem> {
    let malformed = |error: String| CredentialProblem::Certificate(error);
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
        .map_err(|error| CredentialProblem::Pem(error.to_string()))?;
    let (_, certificate) =
        x509_parser::parse_x509_certificate(&der).map_err(|error| malformed(error.to_string()))?;
    if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err(CredentialProblem::KeyMismatch);
    }
    let names = tls::uri_names(&der).unwrap_or_default();
    let ids: Vec<SpiffeId> = names.iter().filter_map(|name| name.parse().ok()).collect();
    let [id] = ids.as_slice() else {
        return Err(CredentialProblem::Names(names));
    };
    let trust_domain = id.trust_domain().clone();
    let issuer =
        Issuer::from_ca_cert_der(&der, key).map_err(|error| malformed(error.to_string()))?;
    Ok(CertificateAuthority { trust_domain, certificate_pem, issuer })
}

/// The X.509-SVID of the SPIFFE standard: an empty subject makes the one URI name critical (RFC 5280 section 4.1.2.6).
fn leaf_params(
    id: &SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, CredentialProblem> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(&id.to_string())?];
    params.not_before = offset(not_before)?;
    params.not_after = offset(not_after)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn new_key() -> Result<KeyPair, CredentialProblem> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(issue)
}

fn uri(text: &str) -> Result<SanType, CredentialProblem> {
    Ia5String::try_from(text).map(SanType::URI).map_err(issue)
}

fn issue(error: rcgen::Error) -> CredentialProblem {
    CredentialProblem::Issue(error.to_string())
}

fn out_of_range(id: &SpiffeId) -> HboneError {
    HboneError::credential(id.to_string(), CredentialProblem::Lifetime)
}

fn offset(time: SystemTime) -> Result<OffsetDateTime, CredentialProblem> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = i64::try_from(since).map_err(|_| CredentialProblem::Lifetime)?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| CredentialProblem::Lifetime)
}

fn read(file: &Path) -> Result<String, HboneError> {
    fs::read_to_string(file).map_err(|error| HboneError::file(file, error))
}

fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Writes a new file in one step: a hard link, unlike a rename, does not replace.
fn create(file: &Path, text: &str, mode: u32) -> Result<(), HboneError> {
    let written = with_temporary(file, text, mode, |temporary| {
        let linked = fs::hard_link(temporary, file);
        linked.and_then(|()| fs::remove_file(temporary))
    });
    written.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => HboneError::credential(file, CredentialProblem::Exists),
        _ => HboneError::file(file, error),
    })
}

fn replace(file: &Path, text: &str, mode: u32) -> Result<(), HboneError> {
    with_temporary(file, text, mode, |temporary| fs::rename(temporary, file))
        .map_err(|error| HboneError::file(file, error))
}

/// The mode is the file's from the start, so that a key is never readable for a moment.
fn with_temporary(
    file: &Path,
    text: &str,
    mode: u32,
    publish: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = with_suffix(file, &format!(".{}.tmp", std::process::id()));
    let options = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary);
    let written = options.and_then(|opened| fill(opened, text)).and_then(|()| publish(&temporary));
    if written.is_err() {
        // It may not exist, and the first error is the one to report.
        let _removed = fs::remove_file(&temporary);
    }
    written
}

fn fill(mut file: File, text: &str) -> io::Result<()> {
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
pub(crate) mod tests;
