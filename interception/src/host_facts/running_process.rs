//! Facts about another process, as far as /proc shows them: its limit of open files, and whether it
//! runs the same program file as this process.
//!
//! A proxy is not dumpable, so the kernel shows them only to root or with SYS_PTRACE.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::Usage;
use crate::namespace::Entered;

/// Facts about a process in the entered network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunningProcess {
    /// The open files of the process or of its child that has the most, such as the proxy process
    /// of a broker, and the soft limit; `None` if they are not readable.
    pub open_files: Option<Usage>,
    /// Whether the process runs a program with the same content as this process; `None` if it is
    /// not readable.
    pub runs_same_program: Option<bool>,
    /// Its parent process; `None` if it is not visible.
    pub parent: Option<u32>,
}

impl RunningProcess {
    /// Reads the facts about the process `pid`. `None` if there is no such process in this network
    /// namespace: it has ended, or `pid` belongs to another PID namespace.
    #[must_use]
    pub fn read(entered: &Entered, pid: u32) -> Option<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let namespace = fs::metadata(folder.join("ns/net")).ok()?;
        if namespace.ino() != entered.namespace().id().inode() {
            return None;
        }
        let same = is_same(&folder.join("exe"), Path::new("/proc/self/exe"));
        let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
        let processes = children(&folder).into_iter().chain([folder]);
        let open_files = processes.filter_map(|folder| open_files(&folder));
        let open_files = open_files.max_by_key(|usage| usage.used);
        Some(Self { open_files, runs_same_program: same.ok(), parent: parent(&status) })
    }
}

/// Returns true if the program file of this process was removed or replaced after the start.
#[must_use]
pub fn is_own_program_replaced() -> bool {
    fs::metadata("/proc/self/exe").is_ok_and(|file| file.nlink() == 0)
}

/// The parent in `/proc/PID/status`. It is 0 if the PID namespace does not have it.
fn parent(status: &str) -> Option<u32> {
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    parent.trim().parse().ok().filter(|pid| *pid > 0)
}

/// The folders of the children of a process (proc_tid_children(5)).
fn children(folder: &Path) -> Vec<PathBuf> {
    let threads = fs::read_dir(folder.join("task")).into_iter().flatten().flatten();
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let folders = |list: String| -> Vec<PathBuf> {
        list.split_whitespace().map(|pid| Path::new("/proc").join(pid)).collect()
    };
    lists.flat_map(folders).collect()
}

fn open_files(folder: &Path) -> Option<Usage> {
    let limits = fs::read_to_string(folder.join("limits")).ok()?;
    let used = fs::read_dir(folder.join("fd")).ok()?.count();
    Some(Usage { used: u64::try_from(used).ok()?, limit: soft_limit(&limits)? })
}

/// The soft limit of open files in `/proc/PID/limits`.
fn soft_limit(text: &str) -> Option<u64> {
    let row = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match row.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// Compares two files: by inode, and otherwise by content.
fn is_same(one: &Path, other: &Path) -> io::Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let [first, second] = [one.metadata()?, other.metadata()?];
    if (first.dev(), first.ino()) == (second.dev(), second.ino()) {
        return Ok(true);
    }
    if first.len() != second.len() {
        return Ok(false);
    }
    const PIECE: usize = 64 << 10;
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    loop {
        let read = one.read(&mut left)?;
        let (Some(left), Some(right)) = (left.get(..read), right.get_mut(..read)) else {
            return Ok(false);
        };
        if read == 0 {
            return Ok(true);
        }
        other.read_exact(right)?;
        if left != &*right {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_soft_limit_of_open_files() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max processes             100                  200                  processes \n\
                    Max open files            1024                 4096                 files     \n";
        assert_eq!(soft_limit(text), Some(1024));
        assert_eq!(soft_limit("Max open files  unlimited unlimited files"), Some(u64::MAX));
        assert_eq!(soft_limit("Max open files  x"), None);
    }

    #[test]
    fn lists_children_of_this_process() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let found = children(Path::new("/proc/self"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&Path::new("/proc").join(child.id().to_string())), "{found:?}");
    }

    #[test]
    fn reads_parent_of_process() {
        assert_eq!(parent("Pid:\t7\nPPid:\t3\n"), Some(3));
        assert_eq!([parent("PPid:\t0\n"), parent("Pid:\t7\n")], [None, None]);
    }

    #[test]
    fn files_are_same_if_their_content_is() {
        let folder = std::env::temp_dir().join(format!("underpass-same-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: Vec<u8>| {
            let path = folder.join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let long = vec![7; 100_000];
        let mut changed = long.clone();
        changed[99_999] = 8;
        let (one, copy, other) =
            (write("one", long.clone()), write("copy", long), write("other", changed));
        assert!(is_same(&one, &one).unwrap() && is_same(&one, &copy).unwrap());
        assert!(!is_same(&one, &other).unwrap());
        assert!(!is_same(&one, &write("short", vec![7])).unwrap());
        is_same(&one, &folder.join("absent")).unwrap_err();
        fs::remove_dir_all(&folder).unwrap();
    }
}
