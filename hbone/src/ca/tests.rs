//! Tests of the CA's files and certificates. openssl, which shares no code with this crate,
//! verifies them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};

use x509_parser::extensions::ParsedExtension;

use super::*;
use crate::identity::svid::workload_id;
use crate::testing::{CLIENT, HOUR, id};

/// A temporary directory, removed when dropped.
pub(crate) struct TempDir(pub(crate) PathBuf);

impl TempDir {
    pub(crate) fn new(name: &str) -> Self {
        let dir =
            std::env::temp_dir().join(format!("underpass-hbone-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

pub(crate) fn openssl(arguments: &[&str], directory: &Path) -> Output {
    let ran = Command::new("openssl").args(arguments).current_dir(directory).output();
    ran.expect("this test needs the openssl command (apt-get install openssl)")
}

fn mode(file: &Path) -> u32 {
    fs::metadata(file).unwrap().permissions().mode() & 0o777
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn trust_domain() -> TrustDomain {
    "td".parse().unwrap()
}

#[test]
fn init_writes_three_files_and_protects_key() {
    let dir = TempDir::new("init");
    let dir = dir.0.join("made/on/the/way");
    CertificateAuthority::init(&dir, trust_domain()).unwrap();
    assert_eq!(names(&dir), ["ca.key", "ca.pem", "roots.pem"]);
    assert_eq!(mode(&dir.join("ca.key")), 0o600);
    let opened = CertificateAuthority::open(&dir).unwrap();
    assert_eq!(opened.trust_domain(), &trust_domain());
    assert_eq!(opened.roots_pem(), read(&dir.join("roots.pem")).unwrap());
}

#[test]
fn authority_files_are_never_replaced() {
    for existing in ["ca.key", "ca.pem", "roots.pem"] {
        let dir = TempDir::new(existing);
        fs::write(dir.0.join(existing), "precious").unwrap();
        let error = CertificateAuthority::init(&dir.0, trust_domain()).unwrap_err();
        let HboneError::Credential { file, what: CredentialProblem::Exists } = error else {
            panic!()
        };
        assert_eq!(file, dir.0.join(existing));
        assert_eq!(names(&dir.0), [existing]);
        assert_eq!(read(&file).unwrap(), "precious");
        // The same in a race: another process creates the file after the check.
        let raced = create(&file, "other", PRIVATE).unwrap_err();
        assert!(matches!(raced, HboneError::Credential { what: CredentialProblem::Exists, .. }));
        assert_eq!((names(&dir.0).len(), read(&file).unwrap().as_str()), (1, "precious"));
    }
}

#[test]
fn rejects_key_of_other_authority() {
    let (dir, other) = (TempDir::new("mine"), TempDir::new("theirs"));
    CertificateAuthority::init(&dir.0, trust_domain()).unwrap();
    CertificateAuthority::init(&other.0, trust_domain()).unwrap();
    fs::copy(other.0.join(KEY_FILE), dir.0.join(KEY_FILE)).unwrap();
    let error = CertificateAuthority::open(&dir.0).unwrap_err();
    assert!(matches!(error, HboneError::Credential { what: CredentialProblem::KeyMismatch, .. }));
}

#[test]
fn leaf_has_critical_spiffe_name_and_both_usages() {
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    let issued = authority.issue(&id(CLIENT), HOUR).unwrap();
    let der = CertificateDer::from_pem_slice(issued.chain_pem.as_bytes()).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    assert_eq!(leaf.issuer().to_string(), "O=td");
    assert!(leaf.subject_alternative_name().unwrap().unwrap().critical);
    assert_eq!(workload_id(&der).unwrap(), id(CLIENT));
    assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth);
    let key_usage = leaf.key_usage().unwrap().unwrap();
    assert!(key_usage.critical);
    assert_eq!(key_usage.value.flags, 1, "digitalSignature only");
    let is_aki =
        |parsed: &ParsedExtension<'_>| matches!(parsed, ParsedExtension::AuthorityKeyIdentifier(_));
    assert!(leaf.extensions().iter().any(|extension| is_aki(extension.parsed_extension())));
    let validity = leaf.validity();
    let lifetime = validity.not_after.timestamp() - validity.not_before.timestamp();
    assert_eq!(lifetime, 3600 + 300);
}

#[test]
fn rejects_identity_of_other_trust_domain() {
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    let error = authority.issue(&id("spiffe://other/ns/a/sa/b"), HOUR).unwrap_err();
    assert!(matches!(
        error,
        HboneError::Credential { what: CredentialProblem::ForeignId { .. }, .. }
    ));
}

#[test]
fn rejects_identity_without_path() {
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    let error = authority.issue(&id("spiffe://td"), HOUR).unwrap_err();
    let HboneError::Credential { what: CredentialProblem::Svid(problem), .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(problem, SvidProblem::TrustDomainOnly(trust_domain()));
}

#[test]
fn rejects_lifetime_beyond_year_9999() {
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    for ttl in [Duration::MAX, Duration::from_secs(u64::from(u32::MAX) * 1000)] {
        let error = authority.issue(&id(CLIENT), ttl).unwrap_err();
        assert!(matches!(error, HboneError::Credential { what: CredentialProblem::Lifetime, .. }));
    }
}

#[test]
fn writes_certificate_and_private_key_and_replaces_them() {
    let dir = TempDir::new("issue");
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    // `v1` is part of the prefix, not an extension to replace.
    let prefix = dir.0.join("client.v1");
    for _ in 0..2 {
        let issued = authority.issue(&id(CLIENT), HOUR).unwrap();
        issued.write(&prefix).unwrap();
        assert_eq!(names(&dir.0), ["client.v1.key", "client.v1.pem"]);
        assert_eq!(mode(&dir.0.join("client.v1.key")), 0o600);
        assert_eq!(read(&dir.0.join("client.v1.key")).unwrap(), issued.key_pem);
        assert_eq!(read(&dir.0.join("client.v1.pem")).unwrap(), issued.chain_pem);
    }
}

#[test]
fn issued_certificate_hides_key_in_debug_output() {
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    let issued = authority.issue(&id(CLIENT), HOUR).unwrap();
    assert!(!format!("{issued:?}{authority:?}").contains("PRIVATE KEY"));
}

/// ztunnel renews when half of the total validity has passed.
#[test]
fn backdating_is_less_than_an_eighth_of_validity() {
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    for ttl in [10, 60, 600, 86_400] {
        let issued = authority.issue(&id(CLIENT), Duration::from_secs(ttl)).unwrap();
        let der = CertificateDer::from_pem_slice(issued.chain_pem.as_bytes()).unwrap();
        let (_, leaf) = x509_parser::parse_x509_certificate(&der).unwrap();
        let validity = leaf.validity();
        let seconds = validity.not_after.timestamp() - validity.not_before.timestamp();
        let skew = seconds - i64::try_from(ttl).unwrap();
        assert!(skew >= 1 && skew * 8 < seconds, "{ttl}: {skew}");
    }
}

#[test]
fn server_certificate_has_names_and_no_workload_identity() {
    let dir = TempDir::new("server-certificate");
    let authority = CertificateAuthority::generate(trust_domain()).unwrap();
    let names = ["ca.test", "10.0.0.1", "fd00::1"].map(str::to_owned);
    let issued = authority.issue_server(&names, HOUR).unwrap();
    fs::write(dir.0.join("leaf"), &issued.chain_pem).unwrap();
    fs::write(dir.0.join("roots"), authority.roots_pem()).unwrap();
    let verify = |more: &[&str]| {
        let arguments = ["verify", "-x509_strict", "-CAfile", "roots"];
        openssl(&[&arguments, more, &["leaf"]].concat(), &dir.0).status.success()
    };
    for good in [
        ["-verify_hostname", "ca.test"],
        ["-verify_ip", "10.0.0.1"],
        ["-verify_ip", "fd00::1"],
        ["-purpose", "sslserver"],
    ] {
        assert!(verify(&good), "{good:?}");
    }
    for bad in [["-verify_hostname", "other.test"], ["-purpose", "sslclient"]] {
        assert!(!verify(&bad), "{bad:?}");
    }
    let der = CertificateDer::from_pem_slice(issued.chain_pem.as_bytes()).unwrap();
    assert_eq!(workload_id(&der).unwrap_err(), SvidProblem::UriNames(0));
    for bad in ["", "not a name", "spiffe://td/x", "n\u{f6}n"] {
        let error = authority.issue_server(&[bad.to_owned()], HOUR).unwrap_err();
        assert!(matches!(
            error,
            HboneError::Credential { what: CredentialProblem::ServerName, .. }
        ));
    }
}
