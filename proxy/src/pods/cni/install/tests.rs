//! Tests of installing the plugin into temporary folders.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::*;
use crate::pods::cni::testing::Folder;

const LIST: &str = "{\n  \"name\": \"a\",\n  \"cniVersion\": \"1.0.0\",\n  \"plugins\": [\n    {\"type\": \"bridge\"}\n  ]\n}\n";
const SINGLE: &str = "{\"cniVersion\": \"0.4.0\", \"name\": \"s\", \"type\": \"bridge\"}\n";

/// A runtime's folders for configurations and plugins.
struct Runtime(Folder);

impl Runtime {
    fn new() -> Self {
        let folder = Folder::new();
        fs::create_dir_all(folder.path("net.d")).unwrap();
        fs::create_dir_all(folder.path("bin")).unwrap();
        Self(folder)
    }

    fn installation(&self) -> Installation {
        Installation {
            network_folder: self.0.path("net.d"),
            program_folder: self.0.path("bin"),
            socket: DEFAULT_SOCKET.into(),
            drop_in: false,
        }
    }

    fn drop_in(&self) -> Installation {
        Installation { drop_in: true, ..self.installation() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path("net.d").join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.file(name), text).unwrap();
        self.file(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap()
    }

    /// The names and contents of the files in the folder of network configurations.
    fn files(&self) -> Vec<(String, String)> {
        let entries = fs::read_dir(self.0.path("net.d")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let files = names.filter(|name| self.file(name).is_file());
        let mut files: Vec<_> = files.map(|name| (name.clone(), self.read(&name))).collect();
        files.sort();
        files
    }

    fn program(&self) -> PathBuf {
        self.0.path("bin").join(PLUGIN_NAME)
    }
}

/// Applies the changes, and returns each as it is printed.
fn apply(changes: Result<Vec<Change>, InstallError>) -> Vec<String> {
    let changes = changes.unwrap();
    changes.iter().for_each(|change| change.apply().unwrap());
    changes.iter().map(ToString::to_string).collect()
}

#[test]
fn installs_binary_before_entry_and_removes_it_after() {
    let runtime = Runtime::new();
    let list = runtime.write("10-a.conflist", LIST);
    let later = runtime.write("20-b.conflist", LIST);
    fs::set_permissions(&list, fs::Permissions::from_mode(0o600)).unwrap();
    let installation = runtime.installation();
    let (program, list_name) = (runtime.program(), list.display().to_string());
    let copied = format!("copy this binary to {}", program.display());
    assert_eq!(apply(installation.install()), [copied, format!("write {list_name}")]);
    assert!(runtime.read("10-a.conflist").contains(PLUGIN_NAME));
    assert_eq!(fs::read_to_string(later).unwrap(), LIST, "only the first list counts");
    assert_eq!(fs::metadata(&list).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(fs::read(&program).unwrap(), fs::read(OWN_BINARY).unwrap());
    assert!(installation.install().unwrap().is_empty(), "installing is idempotent");
    let removed = format!("remove {}", program.display());
    assert_eq!(apply(installation.uninstall()), [format!("write {list_name}"), removed]);
    assert_eq!(runtime.read("10-a.conflist"), LIST);
    assert!(installation.uninstall().unwrap().is_empty(), "removing is idempotent");
}

#[test]
fn repairs_list_that_another_program_rewrote() {
    let runtime = Runtime::new();
    runtime.write("10-a.conflist", LIST);
    let installation = runtime.installation();
    apply(installation.install());
    let list = runtime.write("10-a.conflist", &LIST.replace("bridge", "ptp"));
    assert_eq!(apply(installation.install()), [format!("write {}", list.display())]);
    assert!(runtime.read("10-a.conflist").contains(PLUGIN_NAME));
}

#[test]
fn adds_entry_to_configuration_that_now_comes_first() {
    let runtime = Runtime::new();
    runtime.write("10-a.conflist", LIST);
    let installation = runtime.installation();
    apply(installation.install());
    let first = runtime.write("05-b.conflist", LIST);
    assert_eq!(apply(installation.install()), [format!("write {}", first.display())]);
    apply(installation.uninstall());
    let restored = [("05-b.conflist", LIST), ("10-a.conflist", LIST)];
    assert_eq!(runtime.files(), restored.map(|(name, text)| (name.to_owned(), text.to_owned())));
}

#[test]
fn single_configuration_gets_list_beside_it() {
    let runtime = Runtime::new();
    runtime.write("10-a.conf", SINGLE);
    let installation = runtime.installation();
    apply(installation.install());
    assert_eq!(runtime.read("10-a.conf"), SINGLE);
    assert!(runtime.read("10-a-underpass.conflist").contains(SINGLE.trim()));
    assert!(installation.install().unwrap().is_empty());
    // A changed single configuration changes the derived list.
    runtime.write("10-a.conf", &SINGLE.replace("bridge", "ptp"));
    apply(installation.install());
    assert!(runtime.read("10-a-underpass.conflist").contains("ptp"));
    fs::remove_file(runtime.file("10-a.conf")).unwrap();
    runtime.write("20-b.conflist", LIST);
    apply(installation.install());
    assert_eq!(runtime.files().len(), 1, "the derived list is removed with its configuration");
    runtime.write("10-a.conf", SINGLE);
    apply(installation.install());
    apply(installation.uninstall());
    let restored = [("10-a.conf", SINGLE), ("20-b.conflist", LIST)];
    assert_eq!(runtime.files(), restored.map(|(name, text)| (name.to_owned(), text.to_owned())));
}

#[test]
fn drop_in_does_not_change_the_list() {
    let runtime = Runtime::new();
    runtime.write("10-a.conflist", LIST);
    apply(runtime.installation().install());
    let changes = apply(runtime.drop_in().install());
    assert_eq!(runtime.read("10-a.conflist"), LIST, "the entry moves to the drop-in");
    assert!(runtime.read("a/underpass.conf").contains(PLUGIN_NAME), "{changes:?}");
    assert!(runtime.drop_in().install().unwrap().is_empty());
    apply(runtime.installation().install());
    assert!(!runtime.file("a/underpass.conf").exists(), "the entry moves back to the list");
    apply(runtime.drop_in().install());
    apply(runtime.drop_in().uninstall());
    assert_eq!(runtime.files(), [("10-a.conflist".to_owned(), LIST.to_owned())]);
    assert!(!runtime.file("a/underpass.conf").exists());
}

#[test]
fn drop_in_is_refused_for_single_configuration() {
    let runtime = Runtime::new();
    runtime.write("10-a.conf", SINGLE);
    let error = runtime.drop_in().install().unwrap_err();
    assert_eq!(error.hint().as_deref(), Some("install without --drop-in"));
}

#[test]
fn symbolic_link_to_the_list_is_kept() {
    let runtime = Runtime::new();
    let target = runtime.0.path("list");
    fs::write(&target, LIST).unwrap();
    let link = runtime.file("10-a.conflist");
    symlink(&target, &link).unwrap();
    apply(runtime.installation().install());
    assert_eq!(fs::read_link(&link).unwrap(), target);
    assert!(fs::read_to_string(&target).unwrap().contains(PLUGIN_NAME));
}

#[test]
fn folder_without_configuration_is_an_error_with_a_hint() {
    let runtime = Runtime::new();
    let error = runtime.installation().install().unwrap_err();
    assert_eq!(error.hint().as_deref(), Some("install the network plugin of the cluster first"));
    let missing = Installation { network_folder: runtime.0.path("none"), ..runtime.installation() };
    assert!(matches!(missing.install(), Err(InstallError::NoConfiguration { .. })));
    assert!(missing.uninstall().unwrap().is_empty());
}

#[test]
fn invalid_configuration_is_not_changed() {
    let runtime = Runtime::new();
    let list = runtime.write("10-a.conflist", "{");
    let error = runtime.installation().install().unwrap_err();
    let expected = format!("the network configuration {} cannot be edited", list.display());
    assert_eq!(error.to_string(), expected);
    assert!(runtime.installation().uninstall().unwrap().is_empty());
    assert_eq!(runtime.read("10-a.conflist"), "{");
}
