//! A small file-based certificate authority: `underpass ca init`, `issue` and `serve`.
//!
//! A process that can read the CA's directory can issue any identity. Other processes request
//! certificates from the [`CaServer`].

mod clients;
mod files;
mod messages;
mod request;
mod revoke;
pub(crate) mod server;

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, DnsName};
use time::OffsetDateTime;
use underpass_config::{SpiffeId, TrustDomain};

use self::files::{create, read, replace, with_suffix};
use crate::clock;
use crate::error::{CredentialProblem, HboneError, SvidProblem};
use crate::identity::svid::spiffe_id;
use crate::trust::bundle::Bundle;

pub(crate) use self::clients::read_token;
pub(crate) use self::messages::{
    CREATE_CERTIFICATE, IMPERSONATED, IstioCertificateRequest, IstioCertificateResponse,
};
pub use self::request::CertificateRequest;
pub use self::revoke::Serial;
pub use self::server::{CaServer, CaServerSettings};

const ROOTS_FILE: &str = "roots.pem";
const CERTIFICATE_FILE: &str = "ca.pem";
const KEY_FILE: &str = "ca.key";

const CA_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 60 * 60);
/// Certificates are valid from this long before now, because a peer's clock may be behind.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

const BOTH_USAGES: [ExtendedKeyUsagePurpose; 2] =
    [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];

const PUBLIC: u32 = 0o644;
const PRIVATE: u32 = 0o600;

/// An authority that issues certificates for one trust domain.
#[derive(Debug)]
pub struct CertificateAuthority {
    trust_domain: TrustDomain,
    certificate_pem: String,
    roots_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A workload's certificate and key in PEM.
#[derive(Clone)]
pub struct IssuedCertificate {
    /// The leaf certificate. There are no intermediates: the root issues leaves directly.
    pub chain_pem: String,
    /// The private key of the leaf, PKCS#8.
    pub key_pem: String,
}

impl CertificateAuthority {
    /// Creates a certificate authority in memory.
    ///
    /// # Errors
    /// [`HboneError::Credential`] if the key or certificate cannot be generated.
    pub fn generate(trust_domain: TrustDomain) -> Result<Self, HboneError> {
        generate(trust_domain).map_err(|what| HboneError::credential(CERTIFICATE_FILE, what))
    }

    /// Creates a certificate authority in `dir`, and `dir` if it is missing. Writes `roots.pem` and
    /// `ca.pem` readable for all users, and `ca.key` readable only for the owner. Does not replace
    /// existing files.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the file that cannot be written.
    pub fn init(dir: &Path, trust_domain: TrustDomain) -> Result<Self, HboneError> {
        fs::create_dir_all(dir).map_err(|error| HboneError::file(dir, error))?;
        for name in [KEY_FILE, CERTIFICATE_FILE, ROOTS_FILE] {
            let file = dir.join(name);
            if file.symlink_metadata().is_ok() {
                return Err(HboneError::credential(file, CredentialProblem::Exists));
            }
        }
        let authority = Self::generate(trust_domain)?;
        // Create the key first: of several concurrent `ca init`, only the one that creates it
        // continues.
        create(&dir.join(KEY_FILE), &authority.issuer.key().serialize_pem(), PRIVATE)?;
        create(&dir.join(CERTIFICATE_FILE), &authority.certificate_pem, PUBLIC)?;
        create(&dir.join(ROOTS_FILE), &authority.certificate_pem, PUBLIC)?;
        Ok(authority)
    }

    /// Opens a certificate authority that [`CertificateAuthority::init`] created in `dir`.
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
        let mut authority = from_parts(certificate_pem, key_pair)
            .map_err(|what| HboneError::credential(certificate, what))?;
        let roots = dir.join(ROOTS_FILE);
        // During a rotation of the root, the file contains the old and the new root.
        if roots.symlink_metadata().is_ok() {
            authority.roots_pem = read(&roots)?;
            Bundle::from_pem(&roots, authority.roots_pem.as_bytes())?;
        }
        Ok(authority)
    }

    /// The trust domain of the certificates that this authority issues.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The trusted roots in PEM: `roots.pem`, or the authority's certificate if that file is
    /// missing.
    pub fn roots_pem(&self) -> &str {
        &self.roots_pem
    }

    /// Issues a certificate for `id` with a new key. It is valid from slightly before now (clock
    /// skew) until `ttl` from now.
    ///
    /// # Errors
    /// [`HboneError::Credential`] for an identity of another trust domain, or a `ttl` beyond the
    /// year 9999.
    pub fn issue(&self, id: &SpiffeId, ttl: Duration) -> Result<IssuedCertificate, HboneError> {
        let (not_before, not_after) = lifetime(id, ttl)?;
        self.issue_between(id, not_before, not_after)
    }

    /// Issues a certificate like [`CertificateAuthority::issue`], but for the key of `request`. All
    /// other parts of the request are ignored. Returns PEM, leaf first.
    ///
    /// # Errors
    /// As [`CertificateAuthority::issue`].
    pub fn sign(
        &self,
        request: &CertificateRequest,
        id: &SpiffeId,
        ttl: Duration,
    ) -> Result<String, HboneError> {
        let (not_before, not_after) = lifetime(id, ttl)?;
        let params = self.svid_params(id, not_before, not_after, &BOTH_USAGES)?;
        let leaf = params.signed_by(request.public_key(), &self.issuer);
        leaf.map(|leaf| leaf.pem())
            .map_err(|error| HboneError::credential(id.to_string(), issue_problem(error)))
    }

    /// Issues a certificate and a new key for a server that is not a workload, such as `ca serve`.
    /// `names` are host names and IP addresses.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the invalid name, or for a `ttl` beyond the year 9999.
    pub fn issue_server(
        &self,
        names: &[String],
        ttl: Duration,
    ) -> Result<IssuedCertificate, HboneError> {
        let what = names.join(", ");
        let (not_before, not_after) = lifetime(&what, ttl)?;
        let names: Vec<_> = names.iter().map(|name| server_name(name)).collect::<Result<_, _>>()?;
        let problem = |problem| HboneError::credential(&what, problem);
        let mut params = leaf_params(names, not_before, not_after).map_err(problem)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.finish(&params).map_err(problem)
    }

    /// Issues a certificate with an explicit validity, which may be in the past.
    ///
    /// # Errors
    /// As [`CertificateAuthority::issue`].
    pub fn issue_between(
        &self,
        id: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<IssuedCertificate, HboneError> {
        self.issue_for(id, not_before, not_after, &BOTH_USAGES)
    }

    pub(crate) fn issue_for(
        &self,
        id: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
        usages: &[ExtendedKeyUsagePurpose],
    ) -> Result<IssuedCertificate, HboneError> {
        let params = self.svid_params(id, not_before, not_after, usages)?;
        self.finish(&params).map_err(|what| HboneError::credential(id.to_string(), what))
    }

    /// The parameters of an X.509-SVID.
    fn svid_params(
        &self,
        id: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
        usages: &[ExtendedKeyUsagePurpose],
    ) -> Result<CertificateParams, HboneError> {
        let problem = |what| HboneError::credential(id.to_string(), what);
        if id.trust_domain() != &self.trust_domain {
            let trust_domain = self.trust_domain.clone();
            return Err(problem(CredentialProblem::ForeignId { trust_domain, id: id.clone() }));
        }
        if !id.is_workload() {
            let nameless = SvidProblem::TrustDomainOnly(self.trust_domain.clone());
            return Err(problem(CredentialProblem::Svid(nameless)));
        }
        let name = uri_name(&id.to_string()).map_err(problem)?;
        let mut params = leaf_params(vec![name], not_before, not_after).map_err(problem)?;
        params.extended_key_usages = usages.to_vec();
        Ok(params)
    }

    fn finish(&self, params: &CertificateParams) -> Result<IssuedCertificate, CredentialProblem> {
        let key = new_key()?;
        let leaf = params.signed_by(&key, &self.issuer).map_err(issue_problem)?;
        Ok(IssuedCertificate { chain_pem: leaf.pem(), key_pem: key.serialize_pem() })
    }
}

impl IssuedCertificate {
    /// Writes `PREFIX.key` for the owner only, and `PREFIX.pem`. Replaces each file atomically.
    ///
    /// # Errors
    /// [`HboneError::Credential`] with the file that cannot be written.
    pub fn write(&self, prefix: &Path) -> Result<(), HboneError> {
        replace(&with_suffix(prefix, ".key"), &self.key_pem, PRIVATE)?;
        replace(&with_suffix(prefix, ".pem"), &self.chain_pem, PUBLIC)
    }
}

impl std::fmt::Debug for IssuedCertificate {
    /// Omits the private key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuedCertificate")
            .field("chain_pem", &self.chain_pem)
            .finish_non_exhaustive()
    }
}

fn generate(trust_domain: TrustDomain) -> Result<CertificateAuthority, CredentialProblem> {
    let now = clock::now();
    let lifetime = now.checked_sub(CLOCK_SKEW).zip(now.checked_add(CA_LIFETIME));
    let (not_before, not_after) = lifetime.ok_or(CredentialProblem::Lifetime)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.subject_alt_names = vec![uri_name(&format!("spiffe://{trust_domain}"))?];
    params.not_before = offset_date_time(not_before)?;
    params.not_after = offset_date_time(not_after)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = new_key()?;
    let certificate_pem = params.self_signed(&key).map_err(issue_problem)?.pem();
    let roots_pem = certificate_pem.clone();
    let issuer = Issuer::new(params, key);
    Ok(CertificateAuthority { trust_domain, certificate_pem, roots_pem, issuer })
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
    let id = spiffe_id(&certificate).map_err(CredentialProblem::Authority)?;
    let trust_domain = id.trust_domain().clone();
    let issuer =
        Issuer::from_ca_cert_der(&der, key).map_err(|error| malformed(error.to_string()))?;
    let roots_pem = certificate_pem.clone();
    Ok(CertificateAuthority { trust_domain, certificate_pem, roots_pem, issuer })
}

/// An empty subject makes the alternative names critical (RFC 5280 section 4.2.1.6), as the SPIFFE
/// standard recommends.
fn leaf_params(
    names: Vec<SanType>,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, CredentialProblem> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.not_before = offset_date_time(not_before)?;
    params.not_after = offset_date_time(not_after)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// The validity of a certificate: `ttl` from now, and a margin for clock skew before now. The
/// margin depends on `ttl`: ztunnel renews at half of the total validity, and a margin longer than
/// `ttl` would make it renew in a loop.
fn lifetime(what: &impl ToString, ttl: Duration) -> Result<(SystemTime, SystemTime), HboneError> {
    let now = clock::now();
    let skew = CLOCK_SKEW.min(ttl / 10);
    let lifetime = now.checked_sub(skew).zip(now.checked_add(ttl));
    lifetime.ok_or_else(|| HboneError::credential(what.to_string(), CredentialProblem::Lifetime))
}

fn server_name(name: &str) -> Result<SanType, HboneError> {
    let problem = || HboneError::credential(name, CredentialProblem::ServerName);
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    DnsName::try_from(name).map_err(|_| problem())?;
    Ia5String::try_from(name).map(SanType::DnsName).map_err(|_| problem())
}

fn new_key() -> Result<KeyPair, CredentialProblem> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(issue_problem)
}

fn uri_name(text: &str) -> Result<SanType, CredentialProblem> {
    Ia5String::try_from(text).map(SanType::URI).map_err(issue_problem)
}

fn issue_problem(error: rcgen::Error) -> CredentialProblem {
    CredentialProblem::Issue(error.to_string())
}

fn offset_date_time(time: SystemTime) -> Result<OffsetDateTime, CredentialProblem> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = i64::try_from(since).map_err(|_| CredentialProblem::Lifetime)?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| CredentialProblem::Lifetime)
}

#[cfg(test)]
pub(crate) mod tests;
