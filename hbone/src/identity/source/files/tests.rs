//! Pairs that are replaced file by file or by links, malformed, delayed, or missing.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::*;
use crate::ca::tests::TempDir;
use crate::ca::{CertificateAuthority, IssuedCertificate};
use crate::clock;
use crate::error::CredentialProblem;
use crate::testing::{CLIENT, HOUR, SERVER, authority, id};

/// Longer than any delay of the source or its watch.
const LONG: Duration = Duration::from_secs(600);

struct Place {
    dir: TempDir,
    authority: CertificateAuthority,
}

impl Place {
    fn new(name: &str) -> Self {
        let place = Self { dir: TempDir::new(name), authority: authority("td") };
        place.write("roots.pem", place.authority.roots_pem());
        place
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
async fn uses_renewed_pair_once_complete() {
    let place = Place::new("files-renewed");
    place.write_pair(&place.issue(CLIENT));
    let mut source = place.source();
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(CLIENT));
    stays_silent(&mut source).await;
    let renewed = place.issue(SERVER);
    place.write("certificate", &renewed.chain_pem);
    let error = source.next().await.unwrap_err();
    assert!(matches!(problem(error), CredentialProblem::KeyMismatch));
    stays_silent(&mut source).await;
    place.write("key", &renewed.key_pem);
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(SERVER));
}

#[tokio::test(start_paused = true)]
async fn ignores_unchanged_content() {
    let place = Place::new("files-same");
    let issued = place.issue(CLIENT);
    place.write_pair(&issued);
    let mut source = place.source();
    source.next().await.unwrap();
    place.write_pair(&issued);
    stays_silent(&mut source).await;
    // The original content after an invalid one is unchanged too.
    place.write("key", "no key");
    source.next().await.unwrap_err();
    place.write_pair(&issued);
    stays_silent(&mut source).await;
}

#[tokio::test(start_paused = true)]
async fn reports_broken_file_once() {
    let place = Place::new("files-broken");
    let issued = place.issue(CLIENT);
    place.write_pair(&issued);
    let mut source = place.source();
    source.next().await.unwrap();
    place.write("certificate", "half");
    assert!(matches!(problem(source.next().await.unwrap_err()), CredentialProblem::Empty(_)));
    for half in ["half of", "half of it"] {
        place.write("certificate", half);
        stays_silent(&mut source).await;
    }
    fs::remove_file(place.dir.0.join("certificate")).unwrap();
    assert!(matches!(problem(source.next().await.unwrap_err()), CredentialProblem::Io(_)));
    let renewed = place.issue(CLIENT);
    place.write_pair(&renewed);
    source.next().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn detects_renamed_pair_and_new_roots() {
    let place = Place::new("files-rename");
    place.write_pair(&place.issue(CLIENT));
    let mut source = place.source();
    source.next().await.unwrap();
    place.issue(SERVER).write(&place.dir.0.join("new")).unwrap();
    for (from, to) in [("new.key", "key"), ("new.pem", "certificate")] {
        fs::rename(place.dir.0.join(from), place.dir.0.join(to)).unwrap();
    }
    assert_eq!(source.next().await.unwrap().spiffe_id(), &id(SERVER));
    let both = format!("{}{}", place.authority.roots_pem(), authority("td").roots_pem());
    place.write("roots.pem", &both);
    assert_eq!(source.next().await.unwrap().roots().len(), 2);
}

/// Like a Secret in a pod: every file is a link through `..data`, which is swapped.
#[tokio::test(start_paused = true)]
async fn detects_kubernetes_secret_swap_atomically() {
    let place = Place::new("files-swap");
    let dir = &place.dir.0;
    let fill = |folder: &str, who: &str| {
        fs::create_dir(dir.join(folder)).unwrap();
        let issued = place.issue(who);
        place.write(&format!("{folder}/key"), &issued.key_pem);
        place.write(&format!("{folder}/certificate"), &issued.chain_pem);
    };
    fill("..1", CLIENT);
    symlink("..1", dir.join("..data")).unwrap();
    for name in ["key", "certificate"] {
        symlink(Path::new("..data").join(name), dir.join(name)).unwrap();
    }
    let mut source = place.source();
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
async fn rejects_expired_pair() {
    let place = Place::new("files-expired");
    place.write_pair(&place.issue(CLIENT));
    let mut source = place.source();
    source.next().await.unwrap();
    let now = clock::now();
    let expired = place.authority.issue_between(&id(CLIENT), now - 2 * HOUR, now - HOUR).unwrap();
    place.write_pair(&expired);
    let error = source.next().await.unwrap_err();
    assert!(matches!(problem(error), CredentialProblem::Expired(_)));
    stays_silent(&mut source).await;
}

#[tokio::test(start_paused = true)]
async fn rejects_pair_until_it_is_valid() {
    let place = Place::new("files-early");
    let now = clock::now();
    let early = place.authority.issue_between(&id(CLIENT), now + HOUR, now + 2 * HOUR).unwrap();
    place.write_pair(&early);
    let mut source = place.source();
    let error = source.next().await.unwrap_err();
    assert!(matches!(problem(error), CredentialProblem::NotYetValid(_)));
    let asked = Instant::now();
    source.next().await.unwrap();
    let waited = asked.elapsed();
    assert!((HOUR - SECOND..HOUR + Duration::from_secs(181)).contains(&waited), "{waited:?}");
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn unreadable_key_error_states_remedy() {
    let place = Place::new("files-denied");
    place.write_pair(&place.issue(CLIENT));
    let key = place.dir.0.join("key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o000)).unwrap();
    let read = place.source().next().await;
    match fs::read(&key) {
        // Root can read every file, so only the message is checked.
        Ok(_) => assert!(read.is_ok()),
        Err(_) => assert!(matches!(problem(read.unwrap_err()), CredentialProblem::Permission)),
    }
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let message = HboneError::file(&key, denied).to_string();
    assert!(message.contains("the user that this process runs as"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn cancelled_wait_loses_no_identity() {
    let place = Place::new("files-cancel");
    place.write_pair(&place.issue(CLIENT));
    let mut source = place.source();
    source.next().await.unwrap();
    place.write_pair(&place.issue(SERVER));
    for _ in 0..200 {
        // Cancel a little later each time.
        if let Ok(next) = timeout(SECOND, source.next()).await {
            assert_eq!(next.unwrap().spiffe_id(), &id(SERVER));
            return;
        }
    }
    panic!("the new pair was never seen");
}
