//! Tests with valid and invalid credentials.

use std::fs;

use super::*;
use crate::ca::IssuedCertificate;
use crate::ca::tests::TempDir;
use crate::error::SvidProblem;
use crate::testing::{CLIENT, HOUR, authority, id};

fn issued() -> (IssuedCertificate, String) {
    let authority = authority("td");
    (authority.issue(&id(CLIENT), HOUR).unwrap(), authority.roots_pem().to_owned())
}

fn problem(certificate: &str, key: &str, roots: &str) -> (String, CredentialProblem) {
    let identity = Identity::from_pem(certificate.as_bytes(), key.as_bytes(), roots.as_bytes());
    let error = identity.unwrap_err();
    let HboneError::Credential { file, what } = error else { panic!("{error:?}") };
    (file.display().to_string(), what)
}

#[test]
fn identity_has_name_and_validity() {
    let (issued, roots) = issued();
    let identity = Identity::from_pem(
        issued.chain_pem.as_bytes(),
        issued.key_pem.as_bytes(),
        roots.as_bytes(),
    )
    .unwrap();
    assert_eq!(identity.spiffe_id(), &id(CLIENT));
    let lifetime = identity.expires().duration_since(identity.not_before()).unwrap();
    assert_eq!(lifetime, HOUR + Duration::from_secs(300));
}

#[test]
fn identity_requires_roots_of_its_trust_domain() {
    let (issued, roots) = issued();
    let name = Path::new("issued");
    let with = |trust_domain: &str| {
        let bundle = Bundle::from_pem(name, roots.as_bytes()).unwrap();
        let chain = pem::certificates(name, issued.chain_pem.as_bytes()).unwrap();
        let key = pem::private_key(name, issued.key_pem.as_bytes()).unwrap();
        let bundles = BTreeMap::from([(trust_domain.parse().unwrap(), bundle)]);
        Identity::new(name, chain, key, bundles)
    };
    assert_eq!(with("td").unwrap().spiffe_id(), &id(CLIENT));
    let HboneError::Credential { file, what } = with("other").unwrap_err() else { panic!() };
    assert_eq!(file, name);
    assert!(matches!(what, CredentialProblem::NoRoots(domain) if domain.as_str() == "td"));
}

#[test]
fn rejects_missing_or_malformed_part() {
    let (IssuedCertificate { chain_pem, key_pem }, roots) = issued();
    let broken = "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let is = |found: (String, CredentialProblem),
              file: &str,
              expected: fn(&CredentialProblem) -> bool| {
        assert!(found.0 == file && expected(&found.1), "{found:?}");
    };
    use CredentialProblem as P;
    is(problem("", &key_pem, &roots), "certificate", |p| matches!(p, P::Empty("certificate")));
    is(problem(&chain_pem, "", &roots), "key", |p| matches!(p, P::Empty("private key")));
    is(problem(&chain_pem, &key_pem, ""), "roots", |p| matches!(p, P::Empty("certificate")));
    is(problem(broken, &key_pem, &roots), "certificate", |p| matches!(p, P::Pem(_)));
    is(problem(garbage, &key_pem, &roots), "certificate", |p| matches!(p, P::Certificate(_)));
    is(problem(&chain_pem, &key_pem, garbage), "roots", |p| matches!(p, P::Certificate(_)));
    let mixed = format!("{roots}{garbage}");
    is(problem(&chain_pem, &key_pem, &mixed), "roots", |p| matches!(p, P::Certificate(_)));
}

#[test]
fn rejects_key_of_other_certificate() {
    let (ours, roots) = issued();
    let (other, _) = issued();
    let (file, what) = problem(&ours.chain_pem, &other.key_pem, &roots);
    assert_eq!(file, "key");
    assert!(matches!(what, CredentialProblem::KeyMismatch));
}

#[test]
fn leaf_certificate_requires_exactly_one_spiffe_id() {
    let issue = |uris: &[&str]| {
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names =
            uris.iter().map(|uri| rcgen::SanType::URI((*uri).try_into().unwrap())).collect();
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Identity::from_pem(pem.as_bytes(), key.serialize_pem().as_bytes(), pem.as_bytes())
    };
    issue(&[CLIENT]).unwrap();
    let two = [CLIENT, "spiffe://td/ns/x/sa/y"];
    for wrong in [&[][..], &["https://example.com"], &["https://example.com", CLIENT], &two] {
        let Err(HboneError::Credential { what: CredentialProblem::Svid(problem), .. }) =
            issue(wrong)
        else {
            panic!("{wrong:?}");
        };
        match wrong {
            [name] => assert!(matches!(problem, SvidProblem::Name { .. }), "{name}: {problem}"),
            names => assert_eq!(problem, SvidProblem::UriNames(names.len())),
        }
    }
}

#[test]
fn rejects_expired_certificate_with_file_and_time() {
    let authority = authority("td");
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let issued = authority.issue_between(&id(CLIENT), end - HOUR, end).unwrap();
    let dir = TempDir::new("expired");
    let files = write(&dir, &issued, authority.roots_pem());
    let error = Identity::from_files(&files).unwrap_err().to_string();
    assert!(error.starts_with(&files.certificate.display().to_string()), "{error}");
    assert!(error.contains("expired at 2023-11-14 22:13:20 UTC"), "{error}");
}

#[test]
fn reads_files_and_names_missing_one() {
    let (issued, roots) = issued();
    let dir = TempDir::new("identity");
    let files = write(&dir, &issued, &roots);
    assert_eq!(Identity::from_files(&files).unwrap().spiffe_id(), &id(CLIENT));
    fs::remove_file(&files.roots).unwrap();
    let error = Identity::from_files(&files).unwrap_err();
    assert_eq!(error.fault(), crate::error::Fault::Configuration);
    assert!(error.to_string().starts_with(&files.roots.display().to_string()), "{error}");
}

fn write(dir: &TempDir, issued: &IssuedCertificate, roots: &str) -> IdentityFiles {
    issued.write(&dir.0.join("client")).unwrap();
    fs::write(dir.0.join("roots.pem"), roots).unwrap();
    IdentityFiles {
        certificate: dir.0.join("client.pem"),
        key: dir.0.join("client.key"),
        roots: dir.0.join("roots.pem"),
    }
}
