//! Computes the version with its commit: `0.1.0 (1a2b3c4d5e6f)`, or the version alone outside a
//! repository. Passes on the target and the features of the build.
//!
//! Builds without the repository can set the commit in `UNDERPASS_COMMIT`. The script does not run
//! git.

#![expect(
    clippy::disallowed_methods,
    reason = "cargo passes values to a build script in environment variables"
)]

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
    println!("cargo::rustc-env=UNDERPASS_TARGET={}", std::env::var("TARGET").unwrap_or_default());
    let features = std::env::var("CARGO_CFG_FEATURE").ok().filter(|features| !features.is_empty());
    let features = features.as_deref().unwrap_or("none");
    println!("cargo::rustc-env=UNDERPASS_FEATURES={features}");
}

/// The checked-out commit of the repository that contains this folder (gitrepository-layout(5)).
fn commit() -> Option<String> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").ok()?).parent()?.to_owned();
    let git = git_folder(&root)?;
    let head = read(&git.join("HEAD"))?;
    let Some(name) = head.strip_prefix("ref: ") else { return Some(head) };
    // A worktree has its own HEAD, but shares the branches.
    let shared = read(&git.join("commondir")).map(|folder| git.join(folder));
    let folders = [Some(git), shared];
    let mut folders = folders.iter().flatten();
    folders.find_map(|folder| read(&folder.join(name)).or_else(|| packed_commit(folder, name)))
}

/// `.git`, or the folder that a worktree's `.git` file names.
fn git_folder(root: &Path) -> Option<PathBuf> {
    let git = root.join(".git");
    if git.is_dir() {
        return Some(git);
    }
    let named = read(&git)?.strip_prefix("gitdir: ")?.to_owned();
    Some(root.join(named))
}

/// The commit of a branch that git has packed into one file with others.
fn packed_commit(folder: &Path, name: &str) -> Option<String> {
    let packed = read(&folder.join("packed-refs"))?;
    let line = packed.lines().find_map(|line| line.strip_suffix(name))?;
    Some(line.trim().to_owned())
}

/// The trimmed text of a small file. Makes cargo watch the file, or its nearest existing folder,
/// because a packed branch has no file until its next commit.
fn read(file: &Path) -> Option<String> {
    if let Some(watched) = file.ancestors().find(|path| path.exists()) {
        println!("cargo::rerun-if-changed={}", watched.display());
    }
    let text = fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned())
}
