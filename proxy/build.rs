//! The version with the commit that it was built from: `0.1.0 (1a2b3c4d5e6f)`; the version alone
//! where there is no git.
//!
//! `UNDERPASS_COMMIT` names the commit where sources are built without their repository. No program
//! of git is run.

#![expect(clippy::disallowed_methods, reason = "cargo tells a build script by the environment")]

use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=UNDERPASS_COMMIT");
    println!("cargo::rerun-if-changed=build.rs");
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let given = std::env::var("UNDERPASS_COMMIT").ok().filter(|commit| !commit.is_empty());
    let version = match given.or_else(commit) {
        Some(commit) => format!("{version} ({})", commit.get(..12).unwrap_or(&commit)),
        None => version,
    };
    println!("cargo::rustc-env=UNDERPASS_VERSION={version}");
}

/// The commit that is checked out in the repository whose `proxy` this is
/// (gitrepository-layout(5)).
fn commit() -> Option<String> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").ok()?).parent()?.to_owned();
    let git = git_folder(&root)?;
    let head = read(&git.join("HEAD"))?;
    let Some(name) = head.strip_prefix("ref: ") else { return Some(head) };
    // A worktree has a HEAD of its own, and shares the branches.
    let shared = read(&git.join("commondir")).map(|folder| git.join(folder));
    let folders = [Some(git), shared];
    let mut folders = folders.iter().flatten();
    folders.find_map(|folder| read(&folder.join(name)).or_else(|| packed(folder, name)))
}

/// `.git`, or what that names in a worktree.
fn git_folder(root: &Path) -> Option<PathBuf> {
    let git = root.join(".git");
    if git.is_dir() {
        return Some(git);
    }
    let named = read(&git)?.strip_prefix("gitdir: ")?.to_owned();
    Some(root.join(named))
}

fn packed(folder: &Path, name: &str) -> Option<String> {
    let packed = read(&folder.join("packed-refs"))?;
    let line = packed.lines().find_map(|line| line.strip_suffix(name))?;
    Some(line.trim().to_owned())
}

/// The trimmed text of a small file. cargo watches the file from now on, or the nearest folder that
/// exists while the file does not: a branch that is packed has no file until its next commit.
fn read(file: &Path) -> Option<String> {
    if let Some(watched) = file.ancestors().find(|path| path.exists()) {
        println!("cargo::rerun-if-changed={}", watched.display());
    }
    let text = fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned())
}
