//! Tests of the file watcher with real events: files are replaced in every common way.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use underpass_config::testing::Folder;
use underpass_config::{FileWatch, FileWatcher};

use super::*;

/// Longer than the watcher waits for further changes, but shorter than its polling interval: only
/// an event can report a change so early.
const EVENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Five polling intervals of 30 seconds, and a part of the next one.
const SEVERAL_POLL_INTERVALS: Duration = Duration::from_secs(155);
/// Shorter than the watcher waits for the end of a write.
const SHORT_PAUSE: Duration = Duration::from_millis(50);

fn watch(folder: &Folder, name: &str) -> FileWatch {
    FileWatcher::new(Inotify::open).watch(&folder.path(name)).unwrap()
}

/// Forwards the events of inotify, and records the watched folders.
#[derive(Debug)]
struct Recorded {
    inotify: Arc<dyn FolderEvents>,
    watched: Mutex<BTreeMap<i32, PathBuf>>,
}

impl Recorded {
    fn watch(folder: &Folder, name: &str) -> (FileWatch, Arc<Self>) {
        let (inotify, watched) = (Inotify::open().unwrap(), Mutex::default());
        let recorded = Arc::new(Self { inotify, watched });
        let events = recorded.clone();
        let watcher = FileWatcher::new(move || Ok(events.clone()));
        (watcher.watch(&folder.path(name)).unwrap(), recorded)
    }

    fn folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<_> = self.watched.lock().unwrap().values().cloned().collect();
        folders.sort();
        folders
    }

    /// Removes the watches in the kernel, as remounting a file system does.
    fn lose_watches(&self) {
        self.watched.lock().unwrap().keys().for_each(|&id| self.inotify.unwatch(FolderWatch(id)));
    }
}

impl FolderEvents for Recorded {
    fn watch(&self, path: &Path) -> io::Result<FolderWatch> {
        let watch = self.inotify.watch(path)?;
        self.watched.lock().unwrap().insert(watch.0, path.to_owned());
        Ok(watch)
    }

    fn unwatch(&self, watch: FolderWatch) {
        self.watched.lock().unwrap().remove(&watch.0);
        self.inotify.unwatch(watch);
    }

    fn read(&self, report: &mut dyn FnMut(FolderEvent<'_>)) {
        self.inotify.read(report);
    }

    fn queued(&self) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>> {
        self.inotify.queued()
    }
}

async fn wakes(watch: &mut FileWatch) {
    timeout(EVENT_TIMEOUT, watch.changed()).await.expect("the change is reported");
}

#[tokio::test]
async fn reports_file_written_in_place() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    for text in ["2", "", "3"] {
        folder.write("a.yaml", text);
        wakes(&mut watch).await;
    }
}

#[tokio::test]
async fn reports_each_rename_over_the_file() {
    let folder = Folder::of_test();
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
    let folder = Folder::of_test();
    folder.write("..1/a.yaml", "1");
    folder.swap("..1", "..data");
    folder.swap("..data/a.yaml", "a.yaml");
    let (mut watch, recorded) = Recorded::watch(&folder, "a.yaml");
    for (old, new) in [(1, 2), (2, 3)] {
        folder.write(&format!("..{new}/a.yaml"), &new.to_string());
        folder.swap(&format!("..{new}"), "..data");
        fs::remove_dir_all(folder.path(&format!("..{old}"))).unwrap();
        wakes(&mut watch).await;
    }
    assert_eq!(recorded.folders(), [folder.root(), folder.path("..3")]);
    folder.write("..3/a.yaml", "in place");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_swap_of_linked_folder() {
    let folder = Folder::of_test();
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
    let folder = Folder::of_test();
    let (mut watch, recorded) = Recorded::watch(&folder, "deep/down/a.yaml");
    assert_eq!(recorded.folders(), [folder.root()]);
    for text in ["1", "2"] {
        folder.write("deep/down/a.yaml", text);
        wakes(&mut watch).await;
        fs::remove_dir_all(folder.path("deep")).unwrap();
        wakes(&mut watch).await;
    }
}

#[tokio::test]
async fn reports_burst_of_changes_once() {
    let folder = Folder::of_test();
    let mut watch = watch(&folder, "a.yaml");
    for text in 0..100 {
        folder.write("a.yaml", &text.to_string());
    }
    wakes(&mut watch).await;
    stays_silent(&mut watch).await;
}

#[tokio::test]
async fn ignores_other_files_and_unchanged_content() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    folder.write("a.yaml", "1");
    stays_silent(&mut watch).await;
    folder.write("b.yaml", "1");
    stays_silent(&mut watch).await;
    folder.write("a.yaml", "2");
    wakes(&mut watch).await;
}

/// Asserts that no change is reported, not even by polling. The clock is paused and advances by
/// itself.
async fn stays_silent(watch: &mut FileWatch) {
    tokio::time::pause();
    timeout(SEVERAL_POLL_INTERVALS, watch.changed()).await.expect_err("nothing changed");
    tokio::time::resume();
}

#[tokio::test]
async fn cancelled_wait_loses_no_change() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    folder.write("a.yaml", "2");
    let impatient =
        async { while timeout(Duration::from_millis(2), watch.changed()).await.is_err() {} };
    timeout(EVENT_TIMEOUT, impatient).await.expect("the change is reported");
}

#[tokio::test]
async fn polls_after_watches_are_lost() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    let (mut watch, recorded) = Recorded::watch(&folder, "a.yaml");
    recorded.lose_watches();
    folder.write("a.yaml", "2");
    tokio::time::pause();
    timeout(SEVERAL_POLL_INTERVALS, watch.changed()).await.expect("the change is seen");
    tokio::time::resume();
    folder.write("a.yaml", "3");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn link_to_itself_does_not_block_the_watcher() {
    let folder = Folder::of_test();
    folder.swap("a.yaml", "a.yaml");
    let mut watch = watch(&folder, "a.yaml");
    folder.write("b.yaml", "1");
    folder.rename("b.yaml", "a.yaml");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reports_every_document_change_in_folder() {
    let folder = Folder::of_test();
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
    let folder = Folder::of_test();
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
    let folder = Folder::of_test();
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
    let folder = Folder::of_test();
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
    let folder = Folder::of_test();
    folder.write("elsewhere/a.yaml", "1");
    folder.write("mesh/b.yaml", "1");
    folder.swap("../elsewhere/a.yaml", "mesh/a.yaml");
    let mut watch = watch(&folder, "mesh");
    folder.write("elsewhere/a.yaml", "2");
    wakes(&mut watch).await;
}

#[tokio::test]
async fn ignores_reads_and_appends_to_neighbouring_log() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    let mut log = fs::File::create(folder.root().join("proxy.log")).unwrap();
    let inotify = Inotify::open().unwrap();
    let watch = inotify.watch(&folder.root()).unwrap();
    for _ in 0..100 {
        log.write_all(b"a line\n").unwrap();
        fs::read(folder.root().join("a.yaml")).unwrap();
    }
    inotify.read(&mut |event| panic!("{event:?}"));
    drop(log);
    inotify.queued().await.unwrap();
    let (mut events, name) = (0, Some(OsStr::new("proxy.log")));
    inotify.read(&mut |event| {
        assert_eq!(event, FolderEvent::Changed { watch, name, step: ChangeStep::Complete });
        events += 1;
    });
    assert_eq!(events, 1);
}

#[tokio::test]
async fn waits_until_file_is_written() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    let mut file = fs::File::create(folder.root().join("a.yaml")).unwrap();
    file.write_all(b"half").unwrap();
    timeout(SHORT_PAUSE, watch.changed()).await.expect_err("it is not whole");
    file.write_all(b" and half").unwrap();
    drop(file);
    wakes(&mut watch).await;
}

#[tokio::test]
async fn reads_file_that_is_never_closed() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    let mut watch = watch(&folder, "a.yaml");
    let mut file = fs::File::create(folder.root().join("a.yaml")).unwrap();
    file.write_all(b"more").unwrap();
    tokio::time::pause();
    timeout(SEVERAL_POLL_INTERVALS, watch.changed()).await.expect("the change is seen");
}

#[tokio::test]
async fn watches_share_one_instance_and_end_independently() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "1");
    folder.write("b.yaml", "1");
    let watcher = FileWatcher::new(Inotify::open);
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

/// The number of inotify instances of this process that watch `folder`.
fn inotify_instances(folder: &Path) -> usize {
    use std::os::unix::fs::MetadataExt as _;
    let inode = format!(" ino:{:x} ", fs::metadata(folder).unwrap().ino());
    let infos = fs::read_dir("/proc/self/fdinfo").unwrap();
    // Another test may close a descriptor at the same time.
    let read = |entry: io::Result<fs::DirEntry>| fs::read_to_string(entry.ok()?.path()).ok();
    infos.filter_map(read).filter(|info| info.contains(&inode)).count()
}

#[tokio::test]
async fn constantly_changing_file_is_reported() {
    let folder = Folder::of_test();
    folder.write("a.yaml", "0");
    let mut watch = watch(&folder, "a.yaml");
    let writes = async {
        for n in 1.. {
            folder.write("a.yaml.new", &n.to_string());
            folder.rename("a.yaml.new", "a.yaml");
            sleep(SHORT_PAUSE / 10).await;
        }
    };
    tokio::select! {
        () = writes => {}
        () = wakes(&mut watch) => {}
    }
}

#[test]
fn created_file_counts_as_incomplete_until_it_is_closed() {
    let watch = FolderWatch(1);
    let of = |flags| convert_event(flags, watch, None);
    for (flags, step) in [
        (ReadFlags::CREATE, ChangeStep::Writing),
        (ReadFlags::CREATE | ReadFlags::ISDIR, ChangeStep::Complete),
        (ReadFlags::ATTRIB, ChangeStep::Writing),
        (ReadFlags::CLOSE_WRITE, ChangeStep::Complete),
        (ReadFlags::MOVED_TO, ChangeStep::Complete),
        (ReadFlags::DELETE, ChangeStep::Complete),
    ] {
        assert_eq!(of(flags), Some(FolderEvent::Changed { watch, name: None, step }), "{flags:?}");
    }
    assert_eq!(of(ReadFlags::QUEUE_OVERFLOW), Some(FolderEvent::Lost));
    assert_eq!(of(ReadFlags::IGNORED), None);
}
