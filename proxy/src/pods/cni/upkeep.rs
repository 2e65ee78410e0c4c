//! Keeps the plugin installed while the daemon runs.
//!
//! Network plugins and other chained plugins rewrite the network configuration. Without our entry a
//! new pod bypasses the mesh, so the node is unready until the entry is restored.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use underpass_config::{FileWatcher, FolderFilesWatch, Hint as _};

use super::install::{InstallError, Installation};
use super::report::{Condition, Report};
use crate::error::chain;

/// The pause after a repair, which limits the cost of a conflict with another program.
const DELAY_AFTER_REPAIR: Duration = Duration::from_millis(200);
/// The interval of checks while the folder cannot be watched, or an attempt failed.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Installs the plugin again whenever it is missing.
#[derive(Debug)]
pub(super) struct Upkeep {
    installation: Installation,
    watcher: FileWatcher,
}

impl Upkeep {
    pub(super) fn new(installation: Installation, watcher: FileWatcher) -> Self {
        Self { installation, watcher }
    }

    /// Never returns.
    pub(super) async fn run(self, report: Arc<Report>) {
        let mut was_installed = false;
        let mut logged = None;
        let mut watch = None;
        loop {
            // Watch the folder before reading it, so that no change is missed.
            let watched = watch.get_or_insert_with(|| self.watch());
            match self.install() {
                Ok(changes) => {
                    report.set(Condition::Installed, None);
                    logged = None;
                    let is_repair = std::mem::replace(&mut was_installed, true);
                    log_changes(changes, is_repair);
                    if changes > 0 && is_repair {
                        sleep(DELAY_AFTER_REPAIR).await;
                    }
                }
                Err(error) => {
                    let (error, hint) = (chain(&error), error.hint());
                    let problem = format!("the CNI plugin is not installed: {error}");
                    report.set(Condition::Installed, Some(problem));
                    if logged.as_ref() != Some(&error) {
                        let hint = hint.as_deref();
                        tracing::error!(
                            error,
                            hint,
                            "the CNI plugin is not installed: the node is not ready"
                        );
                        logged = Some(error);
                    }
                }
            }
            match watched {
                Some(watched) => watched.settled().await,
                None => {
                    sleep(CHECK_INTERVAL).await;
                    watch = None;
                }
            }
        }
    }

    fn watch(&self) -> Option<FolderFilesWatch> {
        let watch = self.watcher.watch_folder(&self.installation.network_folder);
        watch.inspect_err(|error| tracing::warn!("{error}")).ok()
    }

    /// Performs the missing steps of the installation; returns the number of changes.
    fn install(&self) -> Result<usize, InstallError> {
        let changes = self.installation.install()?;
        for change in &changes {
            change.apply()?;
        }
        Ok(changes.len())
    }
}

fn log_changes(changes: usize, is_repair: bool) {
    match changes {
        0 => {}
        _ if is_repair => {
            tracing::warn!(
                changes,
                "installed the CNI plugin again: another program had removed or changed it"
            );
        }
        _ => tracing::info!(changes, "installed the CNI plugin"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use underpass_interception::Inotify;

    use super::*;
    use crate::pods::cni::install::PLUGIN_NAME;
    use crate::pods::cni::testing::Folder;
    use crate::pods::source::SourceHealth;

    const LIST: &str = r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}"#;

    #[tokio::test]
    async fn removed_entry_makes_node_unready_until_it_is_restored() {
        let folder = Folder::new();
        for name in ["net.d", "bin"] {
            fs::create_dir(folder.path(name)).unwrap();
        }
        let installation = Installation {
            network_folder: folder.path("net.d"),
            program_folder: folder.path("bin"),
            socket: folder.path("cni.sock"),
            drop_in: false,
        };
        let report = Arc::new(Report::new(SourceHealth::default()));
        report.set(Condition::Facts, None);
        let mut not_ready = report.subscribe();
        let upkeep = Upkeep::new(installation, FileWatcher::new(Inotify::open));
        let running = tokio::spawn(upkeep.run(report));
        let is_missing = |reason: &Option<String>| {
            reason.as_ref().is_some_and(|reason| reason.contains("no network configuration yet"))
        };
        not_ready.wait_for(is_missing).await.unwrap();
        let list = folder.path("net.d/10-a.conflist");
        for _ in 0..2 {
            fs::write(&list, LIST).unwrap();
            not_ready.wait_for(|reason| reason.is_none()).await.unwrap();
            while !fs::read_to_string(&list).unwrap().contains(PLUGIN_NAME) {
                tokio::task::yield_now().await;
            }
            fs::remove_file(&list).unwrap();
            not_ready.wait_for(is_missing).await.unwrap();
        }
        running.abort();
    }
}
