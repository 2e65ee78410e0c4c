//! Tests with several problems at once.

use std::fs;

use super::*;
use crate::ca::CertificateAuthority;
use crate::ca::tests::TempDir;
use crate::testing::{CLIENT, HOUR, authority, id};

/// The files of an identity in a folder of their own.
struct Files {
    dir: TempDir,
    files: IdentityFiles,
}

impl Files {
    fn new(name: &str, authority: &CertificateAuthority, lifetime: Duration) -> Self {
        let dir = TempDir::new(name);
        let file = |name: &str| dir.0.join(name);
        let files = IdentityFiles {
            certificate: file("a.pem"),
            key: file("a.key"),
            roots: file("roots.pem"),
        };
        authority.issue(&id(CLIENT), lifetime).unwrap().write(&file("a")).unwrap();
        fs::write(&files.roots, authority.roots_pem()).unwrap();
        Self { dir, files }
    }

    fn problems(&self) -> Vec<String> {
        let Inspection { identity, problems, .. } = Inspection::of_files(&self.files);
        assert_eq!(identity.is_some(), problems.is_empty());
        let folder = format!("{}/", self.dir.0.display());
        problems.iter().map(|problem| problem.to_string().replace(&folder, "")).collect()
    }
}

#[test]
fn sound_files_have_no_problem() {
    let files = Files::new("inspect-sound", &authority("td"), HOUR);
    assert_eq!(files.problems(), [""; 0]);
    assert_eq!(Inspection::of_files(&files.files).exposed_key, None);
}

#[test]
fn reports_foreign_key_and_foreign_roots_together() {
    let (one, other) = (authority("td"), authority("td"));
    let files = Files::new("inspect-foreign", &one, HOUR);
    let foreign = other.issue(&id(CLIENT), HOUR).unwrap();
    fs::write(&files.files.key, foreign.key_pem).unwrap();
    fs::write(&files.files.roots, other.roots_pem()).unwrap();
    let problems = files.problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert_eq!(problems[0], "a.key: the key does not belong to the certificate");
    assert!(problems[1].starts_with("a.pem: the roots do not verify the certificate"));
}

#[test]
fn reports_missing_and_malformed_files_together() {
    let files = Files::new("inspect-missing", &authority("td"), HOUR);
    fs::remove_file(&files.files.certificate).unwrap();
    fs::write(&files.files.key, "no key").unwrap();
    fs::write(&files.files.roots, "no roots").unwrap();
    let problems = files.problems();
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(problems[0].starts_with("a.pem: No such file"), "{problems:?}");
    assert!(problems[1].starts_with("a.key: the file has no PEM section"), "{problems:?}");
    assert!(problems[2].starts_with("roots.pem: the file has no PEM section"), "{problems:?}");
}

#[test]
fn expired_certificate_is_also_verified_by_roots() {
    let files = Files::new("inspect-expired", &authority("td"), Duration::from_millis(1));
    let problems = files.problems();
    assert!(matches!(&problems[..], [one] if one.contains("expired at")), "{problems:?}");
    fs::write(&files.files.roots, authority("td").roots_pem()).unwrap();
    assert_eq!(files.problems().len(), 2);
}
