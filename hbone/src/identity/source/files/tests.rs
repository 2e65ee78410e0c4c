//! Tests with files that are replaced one by one or by links, malformed, delayed, or missing.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use underpass_config::Hint as _;

use super::*;
use crate::ca::tests::TempDir;
use crate::ca::{CertificateAuthority, IssuedCertificate};
use crate::clock;
use crate::error::CredentialProblem;
use crate::testing::{CLIENT, HOUR, SERVER, authority, id};

/// A time longer than any delay of the source and of its watcher.
const LONG: Duration = Duration::from_secs(600);

struct TestFolder {
    dir: TempDir,
    authority: CertificateAuthority,
}

impl TestFolder {
    fn new(name: &str) -> Self {
        let folder = Self { dir: TempDir::new(name), authority: authority("td") };
        folder.write("roots.pem", folder.authority.roots_pem());
        folder
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.0.join(name), text).unwrap();
    }

    fn issue(&self, who: &str) -> IssuedCertificate {
        self.authority.issue(&id(who), HOUR).unwrap()
    }

    fn write_pair(&self, issued: &IssuedCertificate) {
        self.write("key", &issued.key_pem);
        self.write("certificate", &issued.chain_pem);
    }

    fn source(&self) -> FileSource {
        let file = |name: &str| self.dir.0.join(name);
        let files = IdentityFiles {
            certificate: file("certificate"),
            key: file("key"),
            roots: file("roots.pem"),
        };
        FileSource::new(files, &FileWatcher::default())
    }
}

fn problem(error: HboneError) -> CredentialProblem {
    let HboneError::Credential { what, .. } = error else { panic!("{error}") };
    what
}

async fn stays_silent(source: &mut FileSource) {
    timeout(LONG, source.next()).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn renewed_key_and_certificate_are_used_once_both_match() {
    let folder = TestFolder::new("files-renewed");
    folder.write_pair(&folder.issue(CLIENT));
    let mut source = folder.source();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(CLIENT));
    stays_silent(&mut source).await;
    let renewed = folder.issue(SERVER);
    folder.write("certificate", &renewed.chain_pem);
    let error = source.next().await.unwrap_err();
    assert!(matches!(problem(error), CredentialProblem::KeyMismatch));
    stays_silent(&mut source).await;
    folder.write("key", &renewed.key_pem);
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(SERVER));
}

#[tokio::test(start_paused = true)]
async fn pem_form_is_the_identity_of_the_files() {
    let folder = TestFolder::new("files-pem");
    folder.write_pair(&folder.issue(CLIENT));
    let read = folder.source().next().await.unwrap();
    let pem = folder.source().next_pem().await.unwrap();
    let parsed = pem.identity(Path::new("pem")).unwrap();
    assert_eq!((parsed.spiffe_id(), parsed.expires()), (read.spiffe_id(), read.expires()));
    assert_eq!(parsed.roots().len(), read.roots().len());
    folder.write("key", "no key");
    assert!(matches!(
        problem(folder.source().next_pem().await.unwrap_err()),
        CredentialProblem::Empty(_)
    ));
}

#[tokio::test(start_paused = true)]
async fn ignores_unchanged_content() {
    let folder = TestFolder::new("files-same");
    let issued = folder.issue(CLIENT);
    folder.write_pair(&issued);
    let mut source = folder.source();
    source.next().await.unwrap();
    folder.write_pair(&issued);
    stays_silent(&mut source).await;
    // Returning from invalid content to the original content is not a change either.
    folder.write("key", "no key");
    source.next().await.unwrap_err();
    folder.write_pair(&issued);
    stays_silent(&mut source).await;
}

#[tokio::test(start_paused = true)]
async fn invalid_file_is_reported_once() {
    let folder = TestFolder::new("files-broken");
    let issued = folder.issue(CLIENT);
    folder.write_pair(&issued);
    let mut source = folder.source();
    source.next().await.unwrap();
    folder.write("certificate", "half");
    assert!(matches!(problem(source.next().await.unwrap_err()), CredentialProblem::Empty(_)));
    for half in ["half of", "half of it"] {
        folder.write("certificate", half);
        stays_silent(&mut source).await;
    }
    fs::remove_file(folder.dir.0.join("certificate")).unwrap();
    assert!(matches!(problem(source.next().await.unwrap_err()), CredentialProblem::Io(_)));
    let renewed = folder.issue(CLIENT);
    folder.write_pair(&renewed);
    source.next().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn renamed_files_and_new_roots_are_detected() {
    let folder = TestFolder::new("files-rename");
    folder.write_pair(&folder.issue(CLIENT));
    let mut source = folder.source();
    source.next().await.unwrap();
    folder.issue(SERVER).write(&folder.dir.0.join("new")).unwrap();
    for (from, to) in [("new.key", "key"), ("new.pem", "certificate")] {
        fs::rename(folder.dir.0.join(from), folder.dir.0.join(to)).unwrap();
    }
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(SERVER));
    let both = format!("{}{}", folder.authority.roots_pem(), authority("td").roots_pem());
    folder.write("roots.pem", &both);
    assert_eq!(source.next().await.unwrap().roots().len(), 2);
}

/// Kubernetes mounts a Secret like this: every file is a link through `..data`, which is replaced.
#[tokio::test(start_paused = true)]
async fn kubernetes_secret_swap_is_detected_atomically() {
    let folder = TestFolder::new("files-swap");
    let dir = &folder.dir.0;
    let fill = |version: &str, id: &str| {
        fs::create_dir(dir.join(version)).unwrap();
        let issued = folder.issue(id);
        folder.write(&format!("{version}/key"), &issued.key_pem);
        folder.write(&format!("{version}/certificate"), &issued.chain_pem);
    };
    fill("..1", CLIENT);
    symlink("..1", dir.join("..data")).unwrap();
    for name in ["key", "certificate"] {
        symlink(Path::new("..data").join(name), dir.join(name)).unwrap();
    }
    let mut source = folder.source();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(CLIENT));
    for (folder, who) in [("..2", SERVER), ("..3", CLIENT)] {
        fill(folder, who);
        symlink(folder, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        assert_eq!(source.next().await.unwrap().spiffe_id(), &id(who));
        stays_silent(&mut source).await;
    }
}

#[tokio::test(start_paused = true)]
async fn expired_certificate_file_is_rejected() {
    let folder = TestFolder::new("files-expired");
    folder.write_pair(&folder.issue(CLIENT));
    let mut source = folder.source();
    source.next().await.unwrap();
    let now = clock::now();
    let expired = folder.authority.issue_between(&id(CLIENT), now - 2 * HOUR, now - HOUR).unwrap();
    folder.write_pair(&expired);
    let error = source.next().await.unwrap_err();
    assert!(matches!(problem(error), CredentialProblem::Expired(_)));
    stays_silent(&mut source).await;
}

#[tokio::test(start_paused = true)]
async fn certificate_is_rejected_until_it_is_valid() {
    let folder = TestFolder::new("files-early");
    let now = clock::now();
    let early = folder.authority.issue_between(&id(CLIENT), now + HOUR, now + 2 * HOUR).unwrap();
    folder.write_pair(&early);
    let mut source = folder.source();
    let error = source.next().await.unwrap_err();
    assert!(matches!(problem(error), CredentialProblem::NotYetValid(_)));
    let asked = Instant::now();
    source.next().await.unwrap();
    let waited = asked.elapsed();
    assert!((HOUR - SECOND..HOUR + Duration::from_secs(181)).contains(&waited), "{waited:?}");
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn unreadable_key_error_has_hint() {
    let folder = TestFolder::new("files-denied");
    folder.write_pair(&folder.issue(CLIENT));
    let key = folder.dir.0.join("key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o000)).unwrap();
    let read = folder.source().next().await;
    match fs::read(&key) {
        // Root can read every file, so a test as root cannot check the error.
        Ok(_) => assert!(read.is_ok()),
        Err(_) => assert!(matches!(problem(read.unwrap_err()), CredentialProblem::Permission)),
    }
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let hint = HboneError::file(&key, denied).hint().unwrap_or_default();
    assert!(hint.contains("the user of this process"), "{hint}");
}

#[tokio::test(start_paused = true)]
async fn cancelled_wait_loses_no_identity() {
    let folder = TestFolder::new("files-cancel");
    folder.write_pair(&folder.issue(CLIENT));
    let mut source = folder.source();
    source.next().await.unwrap();
    folder.write_pair(&folder.issue(SERVER));
    for _ in 0..200 {
        // Cancel after a longer time in each round.
        if let Ok(next) = timeout(SECOND, source.next()).await {
            assert_eq!(next.unwrap().spiffe_id(), &id(SERVER));
            return;
        }
    }
    panic!("the new pair was never seen");
}
