//! The file with the resolver settings, which other programs replace while the proxy runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::resolv_conf::ResolvConf;

/// The interval at which the file is checked for a change. Inotify does not report changes of a
/// file that a container runtime has mounted.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// The file of systemd-resolved with the servers that it asks. The usual file names only
/// systemd-resolved itself. If queries are captured, asking it would cause a loop.
const SYSTEMD_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// A file in the format of resolv.conf(5), read again after a change.
#[derive(Debug)]
pub(crate) struct ResolvFile {
    path: PathBuf,
    /// The file to use instead if the first one names only servers on the loopback interface.
    beyond_loopback: Option<&'static Path>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    checked: Option<Instant>,
    /// The times of the last changes of the file and of the one beyond the loopback interface.
    changed: [Option<SystemTime>; 2],
    settings: Arc<ResolvConf>,
}

impl ResolvFile {
    pub(crate) fn new(path: &Path) -> Self {
        let beyond_loopback = Some(Path::new(SYSTEMD_RESOLVED));
        Self { path: path.to_owned(), beyond_loopback, state: Mutex::default() }
    }

    /// The current settings. Reads the file if it has changed.
    pub(crate) fn current(&self) -> Arc<ResolvConf> {
        // No code panics while it holds the lock.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if state.checked.is_none_or(|checked| now.duration_since(checked) >= CHECK_INTERVAL) {
            state.checked = Some(now);
            self.check(&mut state);
        }
        state.settings.clone()
    }

    fn check(&self, state: &mut State) {
        let time = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
        let changed = [time(&self.path), self.beyond_loopback.and_then(time)];
        let [of_file, _] = changed;
        if of_file.is_some() && changed == state.changed {
            return;
        }
        match fs::read(&self.path) {
            Ok(text) => {
                let settings = ResolvConf::read(&String::from_utf8_lossy(&text));
                let settings = self.beyond_loopback(&settings).unwrap_or(settings);
                if settings.servers.is_empty() {
                    let (file, hint) = (self.path.display(), "add a line `nameserver ADDRESS`");
                    tracing::warn!(%file, hint, "no DNS server: only names of the mesh are answered");
                }
                (state.settings, state.changed) = (Arc::new(settings), changed);
            }
            // The earlier settings stay in use.
            Err(error) => {
                let (file, hint) = (self.path.display(), "check dns.resolv_conf");
                tracing::warn!(%file, %error, hint, "cannot read the resolver settings");
            }
        }
    }

    /// The servers behind a resolver on the loopback interface.
    fn beyond_loopback(&self, settings: &ResolvConf) -> Option<ResolvConf> {
        let other = self.beyond_loopback.filter(|_| settings.is_loopback_only())?;
        let other = ResolvConf::read(&String::from_utf8_lossy(&fs::read(other).ok()?));
        let is_usable = !other.servers.is_empty() && !other.is_loopback_only();
        is_usable.then(|| ResolvConf { search: settings.search.clone(), ..other })
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;
    use underpass_config::testing::Folder;

    use super::*;

    fn servers(file: &ResolvFile) -> Vec<String> {
        file.current().servers.iter().map(|server| server.ip().to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn changed_file_is_read_again_and_missing_file_changes_nothing() {
        let folder = Folder::of_test();
        let path = folder.path("resolv.conf");
        let file = ResolvFile::new(&path);
        assert!(servers(&file).is_empty(), "there is no file");
        let replace = |text: &str, seconds| {
            fs::write(&path, text).unwrap();
            let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            fs::File::open(&path).unwrap().set_modified(changed).unwrap();
        };
        replace("nameserver 10.0.0.1", 1);
        advance(CHECK_INTERVAL).await;
        assert_eq!(servers(&file), ["10.0.0.1"]);
        replace("nameserver 10.0.0.2", 2);
        assert_eq!(servers(&file), ["10.0.0.1"], "the file is not checked yet");
        advance(CHECK_INTERVAL).await;
        assert_eq!(servers(&file), ["10.0.0.2"]);
        fs::remove_file(&path).unwrap();
        advance(CHECK_INTERVAL).await;
        assert_eq!(servers(&file), ["10.0.0.2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn servers_behind_local_resolver_are_used() {
        let folder = Folder::of_test();
        let [path, beyond] = ["resolv.conf", "beyond"].map(|name| folder.path(name));
        fs::write(&path, "nameserver 127.0.0.53\nsearch a.example").unwrap();
        let beyond: &'static Path = Box::leak(beyond.into_boxed_path());
        let mut file = ResolvFile::new(&path);
        file.beyond_loopback = Some(beyond);
        assert_eq!(
            servers(&file),
            ["127.0.0.53"],
            "without another file, the local server is used"
        );
        // Only this file changes, for example with each new DHCP lease.
        for (server, seconds) in [("10.0.0.1", 1), ("10.0.0.2", 2)] {
            fs::write(beyond, format!("nameserver {server}\nsearch b.example")).unwrap();
            let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            fs::File::open(beyond).unwrap().set_modified(changed).unwrap();
            advance(CHECK_INTERVAL).await;
            assert_eq!(servers(&file), [server]);
            assert_eq!(file.current().search, ["a.example"]);
        }
    }
}
