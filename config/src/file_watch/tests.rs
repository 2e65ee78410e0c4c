//! Files replaced in all the ways in which tools do it, on the real file system.

use std::fs;
use std::os::unix::fs::symlink;

use tokio::time::timeout;

use super::*;

/// A bound for what takes [`SETTLE`], less than [`LOOK`]: to be told, not to have looked after all.
const BOUND: Duration = Duration::from_secs(10);

/// A folder of its own for one test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let test = std::thread::current().name().unwrap().replace("::", "-");
        let path = std::env::temp_dir().join(format!("underpass-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).unwrap();
    }

    /// Puts a link to `target` in the place of `name` in one step.
    fn swap(&self, target: &str, name: &str) {
        symlink(target, self.path("tmp")).unwrap();
        self.rename("tmp", name);
    }

    fn watch(&self, name: &str) -> FileWatch {
        FileWatch::new(&self.path(name)).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

async fn wakes(watch: &mut FileWatch) {
    timeout(BOUND, watch.changed()).await.expect("it is told");
}

#[tokio::test]
async fn a_file_written_in_place_is_told() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = folder.watch("a.yaml");
    for text in ["2", "", "3"] {
        folder.write("a.yaml", text);
        wakes(&mut watch).await;
    }
}

#[tokio::test]
async fn a_file_renamed_over_is_told_again_and_again() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = folder.watch("a.yaml");
    for text in ["2", "3"] {
        folder.write("a.yaml.new", text);
        folder.rename("a.yaml.new", "a.yaml");
        wakes(&mut watch).await;
    }
    folder.write("a.yaml", "and in place");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn a_config_map_that_is_swapped_is_told_again_and_again() {
    let folder = Folder::new();
    folder.write("..1/a.yaml", "1");
    folder.swap("..1", "..data");
    folder.swap("..data/a.yaml", "a.yaml");
    let mut watch = folder.watch("a.yaml");
    for (old, new) in [(1, 2), (2, 3)] {
        folder.write(&format!("..{new}/a.yaml"), &new.to_string());
        folder.swap(&format!("..{new}"), "..data");
        fs::remove_dir_all(folder.path(&format!("..{old}"))).unwrap();
        wakes(&mut watch).await;
    }
    assert_eq!(watch.folders, [folder.0.clone(), folder.path("..3")].into());
    folder.write("..3/a.yaml", "in place");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn a_folder_that_is_a_link_and_swapped_is_told() {
    let folder = Folder::new();
    folder.write("releases/1/a.yaml", "1");
    folder.write("releases/2/a.yaml", "2");
    folder.swap("./releases/../releases/1", "current");
    let mut watch = folder.watch("current/a.yaml");
    folder.swap("releases/2", "current");
    wakes(&mut watch).await;
    folder.write("releases/2/a.yaml", "3");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn a_file_that_goes_and_comes_back_with_its_folder_is_told() {
    let folder = Folder::new();
    let mut watch = folder.watch("deep/down/a.yaml");
    assert_eq!(watch.folders, [folder.0.clone()].into());
    for text in ["1", "2"] {
        folder.write("deep/down/a.yaml", text);
        wakes(&mut watch).await;
        fs::remove_dir_all(folder.path("deep")).unwrap();
        wakes(&mut watch).await;
    }
}

#[tokio::test]
async fn a_burst_of_changes_is_told_once() {
    let folder = Folder::new();
    let mut watch = folder.watch("a.yaml");
    for text in 0..100 {
        folder.write("a.yaml", &text.to_string());
    }
    wakes(&mut watch).await;
    stays_silent(&mut watch).await;
}

#[tokio::test]
async fn other_files_and_the_same_content_are_not_told() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = folder.watch("a.yaml");
    for name in ["b.yaml", "a.yaml"] {
        folder.write(name, "1");
        timeout(BOUND, watch.told.notified()).await.expect("the folder is watched");
        watch.told.notify_one();
        stays_silent(&mut watch).await;
    }
}

/// However often it looks: the clock runs ahead.
async fn stays_silent(watch: &mut FileWatch) {
    tokio::time::pause();
    timeout(LOOK * 5, watch.changed()).await.expect_err("nothing to tell");
    tokio::time::resume();
    watch.look_at = Instant::now() + LOOK;
}

#[test]
fn reading_is_no_change() {
    for (access, reading) in [
        (AccessKind::Open(AccessMode::Any), true),
        (AccessKind::Close(AccessMode::Read), true),
        (AccessKind::Close(AccessMode::Write), false),
    ] {
        assert_eq!(is_reading(EventKind::Access(access)), reading);
    }
    assert!(!is_reading(EventKind::Other));
}

#[tokio::test]
async fn a_change_outlives_a_wait_that_is_cancelled() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = folder.watch("a.yaml");
    folder.write("a.yaml", "2");
    let impatient = async { while timeout(SETTLE / 20, watch.changed()).await.is_err() {} };
    timeout(BOUND, impatient).await.expect("it is told");
}

#[tokio::test]
async fn a_file_system_that_tells_nothing_is_looked_at() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = folder.watch("a.yaml");
    watch.watcher.unwatch(&folder.0).unwrap();
    folder.write("a.yaml", "2");
    tokio::time::pause();
    timeout(LOOK * 2, watch.changed()).await.expect("it is seen");
}

#[tokio::test]
async fn a_link_to_itself_does_not_hang() {
    let folder = Folder::new();
    folder.swap("a.yaml", "a.yaml");
    let mut watch = folder.watch("a.yaml");
    folder.write("b.yaml", "1");
    folder.rename("b.yaml", "a.yaml");
    wakes(&mut watch).await;
}
