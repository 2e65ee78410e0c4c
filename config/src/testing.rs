//! A temporary folder for tests of this crate and of file events. The product does not use it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// A temporary folder, removed on drop.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn of_test() -> Self {
        let test = std::thread::current().name().unwrap().replace("::", "-");
        let path = std::env::temp_dir().join(format!("underpass-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    pub fn root(&self) -> PathBuf {
        self.0.clone()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    pub fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).unwrap();
    }

    /// Atomically replaces `name` by a symbolic link to `target`.
    pub fn swap(&self, target: &str, name: &str) {
        symlink(target, self.path("tmp")).unwrap();
        self.rename("tmp", name);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}
