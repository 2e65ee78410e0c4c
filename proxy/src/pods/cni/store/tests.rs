//! Tests of storing pods.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::pods::cni::attachment::AttachedPod;
use crate::pods::cni::testing::{Folder, attached, namespace};
use crate::pods::facts::tests::facts;

fn permit(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn pods_stay_stored_until_they_are_removed() {
    let folder = Folder::new();
    let id = namespace("uts").id();
    let (web, db) = (attached("web", &["10.0.0.1", "fd00::1"]), attached("db", &[]));
    let store = Store::open(folder.path("pods")).unwrap();
    let stored = |pod: &AttachedPod, facts| {
        let (pod, device, inode) = (pod.clone(), id.device(), id.inode());
        StoredPod { pod, device, inode, facts }
    };
    let (web, first, db) =
        (stored(&web, Some(facts())), stored(&db, None), stored(&db, Some(facts())));
    for pod in [&web, &first, &db] {
        store.save(pod).unwrap();
    }
    let again = Store::open(folder.path("pods")).unwrap();
    let mut loaded = again.load().unwrap();
    loaded.sort_by(|a, b| a.pod.attachment.cmp(&b.pod.attachment));
    assert_eq!(loaded, [db.clone(), web.clone()]);
    again.remove(&db.pod.attachment).unwrap();
    again.remove(&db.pod.attachment).unwrap();
    assert_eq!(again.load().unwrap(), [web]);
}

#[test]
fn broken_and_unfinished_files_are_discarded() {
    let folder = Folder::new();
    let store = Store::open(folder.path("pods")).unwrap();
    for (name, content) in [("a:eth0.pod", "{"), ("b:eth0.pod", "\u{fffd}"), ("c:eth0.new", "{}")] {
        fs::write(folder.path("pods").join(name), content).unwrap();
    }
    assert_eq!(store.load().unwrap(), []);
    assert_eq!(fs::read_dir(folder.path("pods")).unwrap().count(), 0);
}

#[test]
fn folder_writable_by_other_users_is_refused() {
    let folder = Folder::new();
    let path = folder.path("pods");
    drop(Store::open(path.clone()).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    for mode in [0o777, 0o770, 0o707] {
        permit(&path, mode);
        let error = Store::open(path.clone()).unwrap_err();
        assert!(matches!(error, StoreError::Unsafe { .. }), "{mode:o}: {error}");
    }
    permit(&path, 0o755);
    drop(Store::open(path.clone()).unwrap());
    fs::remove_dir(&path).unwrap();
    std::os::unix::fs::symlink("/tmp", &path).unwrap();
    assert!(matches!(Store::open(path), Err(StoreError::Unsafe { .. })));
}
