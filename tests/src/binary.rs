//! Builds the binary under test: cargo does not build binaries of other packages for a test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::or_fail::OrFail;

/// The path of `underpass`. The first call in a process builds it, with the profile and target
/// folder of the caller.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(build)
}

fn build() -> PathBuf {
    let target = TargetDir::of(&std::env::current_exe().or_fail("find this program"));
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([
        "build",
        "--quiet",
        "--locked",
        "--offline",
        "--package",
        "underpass",
        "--bin",
        "underpass",
    ]);
    cargo.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(&target.target);
    cargo.args(["--profile", &target.profile]);
    if let Some(triple) = &target.triple {
        cargo.args(["--target", triple]);
    }
    let status = cargo.status().or_fail("run cargo");
    assert!(status.success(), "cannot build underpass: cargo exited with {status}");
    target.folder.join("underpass")
}

/// The location of this program in the target directory: `TARGET[/TRIPLE]/PROFILE/deps/PROGRAM`.
struct TargetDir {
    target: PathBuf,
    triple: Option<String>,
    profile: String,
    folder: PathBuf,
}

impl TargetDir {
    fn of(program: &Path) -> Self {
        let name =
            |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut folder = program.parent().expect("a program is in a folder");
        // Tests are in `deps` and examples in `examples`; binaries are in the folder above.
        if folder.ends_with("deps") || folder.ends_with("examples") {
            folder = folder.parent().expect("these are in a folder");
        }
        let profile = match name(folder) {
            debug if debug == "debug" => "dev".to_owned(),
            other => other,
        };
        let above = folder.parent().expect("the profile's folder is in the target directory");
        let is_target = above.join("CACHEDIR.TAG").exists();
        let (target, triple) = match above.parent() {
            Some(target) if !is_target => (target, Some(name(above))),
            _ => (above, None),
        };
        Self { target: target.to_owned(), triple, profile, folder: folder.to_owned() }
    }
}
