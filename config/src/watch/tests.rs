//! Tests of watching, with events from the test. The interception crate has tests with real events.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::pin::Pin;
use std::sync::Mutex;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::events::{ChangeStep, FolderEvent, FolderWatch};
use super::relevant::{FilesOfFolder, RelevantEntries};
use super::*;
use crate::hint::Hint as _;
use crate::testing::Folder;

/// The maximum delay of a change that an event reports. Shorter than the polling interval.
const MAX_EVENT_DELAY: Duration = Duration::from_secs(10);

/// Events without folders, which a test queues.
#[derive(Debug, Default)]
struct Queue {
    events: Mutex<VecDeque<FolderEvent<'static>>>,
    queued: Notify,
    watches: Mutex<i32>,
}

impl Queue {
    fn push(&self, event: FolderEvent<'static>) {
        self.events.lock().unwrap().push_back(event);
        self.queued.notify_one();
    }
}

impl FolderEvents for Queue {
    fn watch(&self, _: &Path) -> io::Result<FolderWatch> {
        *self.watches.lock().unwrap() += 1;
        Ok(FolderWatch(0))
    }

    fn unwatch(&self, _: FolderWatch) {
        *self.watches.lock().unwrap() = 0;
    }

    fn read(&self, report: &mut dyn FnMut(FolderEvent<'_>)) {
        self.events.lock().unwrap().drain(..).for_each(report);
    }

    fn queued(&self) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>> {
        Box::pin(async {
            self.queued.notified().await;
            Ok(())
        })
    }
}

fn watch(folder: &Folder, name: &str) -> (FileWatch, Arc<Queue>) {
    let queue = Arc::new(Queue::default());
    let events = queue.clone();
    let watcher = FileWatcher::new(move || Ok(events.clone()));
    (watcher.watch(&folder.path(name)).unwrap(), queue)
}

fn changed(name: &'static str, step: ChangeStep) -> FolderEvent<'static> {
    FolderEvent::Changed { watch: FolderWatch(0), name: Some(OsStr::new(name)), step }
}

/// The delay of the report after an event of a changed file.
async fn delay(event: FolderEvent<'static>) -> Duration {
    let folder = Folder::of_test();
    let (mut watch, queue) = watch(&folder, "a.yaml");
    folder.write("a.yaml", "1");
    queue.push(event);
    let start = Instant::now();
    watch.changed().await;
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn waits_longer_while_file_is_written() {
    let (written, writing) = (Duration::from_millis(50), Duration::from_millis(100));
    assert!(delay(changed("a.yaml", ChangeStep::Complete)).await < written);
    let delay = delay(changed("a.yaml", ChangeStep::Writing)).await;
    assert!((writing..MAX_EVENT_DELAY).contains(&delay), "{delay:?}");
}

#[tokio::test(start_paused = true)]
async fn every_path_is_checked_after_lost_events() {
    assert!(delay(FolderEvent::Lost).await < MAX_EVENT_DELAY);
}

#[tokio::test(start_paused = true)]
async fn event_of_another_file_wakes_no_watch() {
    assert!(
        delay(changed("b.yaml", ChangeStep::Complete)).await > MAX_EVENT_DELAY,
        "polling reports it"
    );
}

#[tokio::test(start_paused = true)]
async fn polls_without_events() {
    let folder = Folder::of_test();
    let mut watch = FileWatcher::default().watch(&folder.path("a.yaml")).unwrap();
    folder.write("a.yaml", "1");
    timeout(POLL_INTERVAL * 2, watch.changed()).await.expect("the change is seen");
    timeout(POLL_INTERVAL * 5, watch.changed()).await.expect_err("nothing changed");
}

#[test]
fn source_that_cannot_be_opened_is_error_with_hint() {
    let folder = Folder::of_test();
    let watcher = FileWatcher::new(|| Err(io::ErrorKind::QuotaExceeded.into()));
    let hint = watcher.watch(&folder.path("a.yaml")).unwrap_err().hint().unwrap_or_default();
    assert!(hint.contains("fs.inotify.max_user_instances"), "{hint}");
}

#[test]
fn dropped_watch_ends_its_folder_watches() {
    let folder = Folder::of_test();
    let (watch, queue) = watch(&folder, "a.yaml");
    assert_ne!(*queue.watches.lock().unwrap(), 0);
    drop(watch);
    assert_eq!(*queue.watches.lock().unwrap(), 0);
}

#[test]
fn wakes_only_for_events_that_can_change_content() {
    let folder = Folder::of_test();
    folder.write("mesh/..1/a.yaml", "1");
    folder.swap("..1", "mesh/..data");
    folder.swap("..data/a.yaml", "mesh/a.yaml");
    let is_relevant = |of: &str, name: &str, kind| {
        RelevantEntries::new(&folder.root().join(of), kind).has(&folder.root().join(name))
    };
    let has = |of: &str, name: &str| is_relevant(of, name, FilesOfFolder::Documents);
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
    for (name, expected) in [("mesh/10-a.conflist", true), ("10-a.conflist", false)] {
        assert_eq!(is_relevant("mesh", name, FilesOfFolder::All), expected, "{name}");
    }
}
