//! Files replaced in every common way, on the real file system.

use std::fs;
use std::io::Write as _;

use tokio::time::timeout;

use super::hub::WRITTEN;
use super::relevant::Relevant;
use super::*;
use crate::test_folder::Folder;

/// A bound above `WRITING` and below [`LOOK`]: the change is reported by an event, not by polling.
const BOUND: Duration = Duration::from_secs(10);

fn watch(folder: &Folder, name: &str) -> FileWatch {
    FileWatcher::default().watch(&folder.path(name)).unwrap()
}

fn folders(watch: &FileWatch) -> Vec<PathBuf> {
    watch.path.subscription.folders()
}

async fn wakes(watch: &mut FileWatch) {
    timeout(BOUND, watch.changed()).await.expect("the change is reported");
}

#[tokio::test]
async fn reports_file_written_in_place() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    for text in ["2", "", "3"] {
        folder.write("a.yaml", text);
        wakes(&mut watch).await;
    }
}

#[tokio::test]
async fn reports_each_rename_over_the_file() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    for text in ["2", "3"] {
        folder.write("a.yaml.new", text);
        folder.rename("a.yaml.new", "a.yaml");
        wakes(&mut watch).await;
    }
    folder.write("a.yaml", "and in place");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_each_config_map_swap() {
    let folder = Folder::new();
    folder.write("..1/a.yaml", "1");
    folder.swap("..1", "..data");
    folder.swap("..data/a.yaml", "a.yaml");
    let mut watch = watch(&folder, "a.yaml");
    for (old, new) in [(1, 2), (2, 3)] {
        folder.write(&format!("..{new}/a.yaml"), &new.to_string());
        folder.swap(&format!("..{new}"), "..data");
        fs::remove_dir_all(folder.path(&format!("..{old}"))).unwrap();
        wakes(&mut watch).await;
    }
    assert_eq!(folders(&watch), [folder.root(), folder.path("..3")]);
    folder.write("..3/a.yaml", "in place");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_swap_of_linked_folder() {
    let folder = Folder::new();
    folder.write("releases/1/a.yaml", "1");
    folder.write("releases/2/a.yaml", "2");
    folder.swap("./releases/../releases/1", "current");
    let mut watch = watch(&folder, "current/a.yaml");
    folder.swap("releases/2", "current");
    wakes(&mut watch).await;
    folder.write("releases/2/a.yaml", "3");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_file_recreated_with_its_folder() {
    let folder = Folder::new();
    let mut watch = watch(&folder, "deep/down/a.yaml");
    assert_eq!(folders(&watch), [folder.root()]);
    for text in ["1", "2"] {
        folder.write("deep/down/a.yaml", text);
        wakes(&mut watch).await;
        fs::remove_dir_all(folder.path("deep")).unwrap();
        wakes(&mut watch).await;
    }
}

#[tokio::test]
async fn reports_burst_of_changes_once() {
    let folder = Folder::new();
    let mut watch = watch(&folder, "a.yaml");
    for text in 0..100 {
        folder.write("a.yaml", &text.to_string());
    }
    wakes(&mut watch).await;
    stays_silent(&mut watch).await;
}

#[tokio::test]
async fn ignores_other_files_and_unchanged_content() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    folder.write("a.yaml", "1");
    timeout(BOUND, watch.path.subscription.event()).await.expect("the folder is watched");
    folder.write("a.yaml", "1");
    stays_silent(&mut watch).await;
    folder.write("b.yaml", "1");
    stays_silent(&mut watch).await;
}

#[test]
fn wakes_only_for_events_that_can_change_content() {
    let folder = Folder::new();
    folder.write("mesh/..1/a.yaml", "1");
    folder.swap("..1", "mesh/..data");
    folder.swap("..data/a.yaml", "mesh/a.yaml");
    let has =
        |of: &str, name: &str| Relevant::of(&folder.root().join(of)).has(&folder.root().join(name));
    for relevant in ["mesh/a.yaml", "mesh/..data", "mesh/..1/a.yaml"] {
        assert!(has("mesh/a.yaml", relevant), "{relevant}");
    }
    for other in ["mesh/b.yaml", "mesh/proxy.log", "mesh/..1/b.yaml", "mesh/..2"] {
        assert!(!has("mesh/a.yaml", other), "{other}");
    }
    for relevant in ["mesh/a.yaml", "mesh/..data", "mesh/b.yaml", "mesh/c.json"] {
        assert!(has("mesh", relevant), "{relevant}");
    }
    for other in ["mesh/proxy.log", "mesh/.hidden.yaml", "b.yaml"] {
        assert!(!has("mesh", other), "{other}");
    }
    assert!(has("missing/a.yaml", "missing"));
}

/// Asserts that no change is reported, even by polling: the clock is paused and advances by itself.
async fn stays_silent(watch: &mut FileWatch) {
    tokio::time::pause();
    timeout(LOOK * 5, watch.changed()).await.expect_err("nothing to tell");
    tokio::time::resume();
    watch.path.look_at = Instant::now() + LOOK;
}

#[tokio::test]
async fn cancelled_wait_keeps_the_change() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    folder.write("a.yaml", "2");
    let impatient = async { while timeout(WRITTEN / 5, watch.changed()).await.is_err() {} };
    timeout(BOUND, impatient).await.expect("the change is reported");
}

#[tokio::test]
async fn polls_file_systems_without_events() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    watch.path.subscription.lose_watches();
    folder.write("a.yaml", "2");
    tokio::time::pause();
    timeout(LOOK * 2, watch.changed()).await.expect("it is seen");
}

#[tokio::test]
async fn link_to_itself_does_not_hang() {
    let folder = Folder::new();
    folder.swap("a.yaml", "a.yaml");
    let mut watch = watch(&folder, "a.yaml");
    folder.write("b.yaml", "1");
    folder.rename("b.yaml", "a.yaml");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_every_document_change_in_folder() {
    let folder = Folder::new();
    folder.write("mesh/a.yaml", "1");
    let mut watch = watch(&folder, "mesh");
    folder.write("mesh/a.yaml", "2");
    wakes(&mut watch).await;
    folder.write("mesh/b.json", "1");
    wakes(&mut watch).await;
    folder.rename("mesh/b.json", "mesh/c.yml");
    wakes(&mut watch).await;
    fs::remove_file(folder.path("mesh/c.yml")).unwrap();
    wakes(&mut watch).await;
}

#[tokio::test]
async fn ignores_other_files_in_folder() {
    let folder = Folder::new();
    folder.write("mesh/a.yaml", "1");
    let mut watch = watch(&folder, "mesh");
    for name in ["mesh/.a.yaml.swp", "mesh/.b.yaml", "mesh/README", "mesh/below/c.yaml", "a.yaml"] {
        folder.write(name, "1");
    }
    stays_silent(&mut watch).await;
    folder.write("mesh/b.yaml", "1");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_each_swap_of_config_map_mounted_as_folder() {
    let folder = Folder::new();
    folder.write("mesh/..1/a.yaml", "1");
    folder.swap("..1", "mesh/..data");
    folder.swap("..data/a.yaml", "mesh/a.yaml");
    let mut watch = watch(&folder, "mesh");
    for (old, new) in [(1, 2), (2, 3)] {
        folder.write(&format!("mesh/..{new}/a.yaml"), &new.to_string());
        folder.swap(&format!("..{new}"), "mesh/..data");
        fs::remove_dir_all(folder.path(&format!("mesh/..{old}"))).unwrap();
        wakes(&mut watch).await;
    }
    folder.write("mesh/..3/a.yaml", "in place");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_folder_replaced_by_another() {
    let folder = Folder::new();
    folder.write("mesh/a.yaml", "1");
    folder.write("next/a.yaml", "2");
    let mut watch = watch(&folder, "mesh");
    folder.rename("mesh", "last");
    folder.rename("next", "mesh");
    wakes(&mut watch).await;
    folder.write("mesh/a.yaml", "3");
    wakes(&mut watch).await;
    fs::remove_dir_all(folder.path("mesh")).unwrap();
    wakes(&mut watch).await;
    folder.write("mesh/a.yaml", "4");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn follows_link_out_of_the_folder() {
    let folder = Folder::new();
    folder.write("elsewhere/a.yaml", "1");
    folder.write("mesh/b.yaml", "1");
    folder.swap("../elsewhere/a.yaml", "mesh/a.yaml");
    let mut watch = watch(&folder, "mesh");
    folder.write("elsewhere/a.yaml", "2");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn ignores_reads_and_appends_to_neighbouring_log() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut log = fs::File::create(folder.root().join("proxy.log")).unwrap();
    let watch = watch(&folder, "a.yaml");
    for _ in 0..100 {
        log.write_all(b"a line\n").unwrap();
        fs::read(folder.root().join("a.yaml")).unwrap();
    }
    assert_eq!(watch.path.subscription.pending_events(), 0);
}

#[tokio::test]
async fn waits_until_file_is_written() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    let mut file = fs::File::create(folder.root().join("a.yaml")).unwrap();
    file.write_all(b"half").unwrap();
    timeout(WRITTEN * 5, watch.changed()).await.expect_err("it is not whole");
    file.write_all(b" and half").unwrap();
    drop(file);
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reads_file_that_is_never_closed() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    let mut file = fs::File::create(folder.root().join("a.yaml")).unwrap();
    file.write_all(b"more").unwrap();
    tokio::time::pause();
    timeout(LOOK * 2, watch.changed()).await.expect("it is seen");
}

#[tokio::test]
async fn watches_share_one_instance_and_end_independently() {
    let folder = Folder::new();
    folder.write("a.yaml", "1");
    folder.write("b.yaml", "1");
    let watcher = FileWatcher::default();
    let open = |name: &str| watcher.watch(&folder.path(name)).unwrap();
    let (mut a, mut same, b) = (open("a.yaml"), open("a.yaml"), open("b.yaml"));
    assert_eq!(inotify_instances(&folder.root()), 1);
    folder.write("a.yaml", "2");
    wakes(&mut a).await;
    wakes(&mut same).await;
    drop((a, b));
    folder.write("a.yaml", "3");
    wakes(&mut same).await;
    drop((same, watcher));
    tokio::task::yield_now().await;
    assert_eq!(inotify_instances(&folder.root()), 0);
}

/// How many inotify instances of this process watch `folder`.
fn inotify_instances(folder: &Path) -> usize {
    use std::os::unix::fs::MetadataExt as _;
    let inode = format!(" ino:{:x} ", fs::metadata(folder).unwrap().ino());
    let infos = fs::read_dir("/proc/self/fdinfo").unwrap();
    // Another test may close a descriptor concurrently.
    let read = |entry: io::Result<fs::DirEntry>| fs::read_to_string(entry.ok()?.path()).ok();
    infos.filter_map(read).filter(|info| info.contains(&inode)).count()
}
