//! Checks of the repository that the compiler does not perform: files, dependencies, documentation.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use underpass_config::Reference;
use underpass_tests::is_metric_name;

/// The maximum number of lines of a file; most should have fewer than 400.
const MAX_FILE_LINES: usize = 500;
const FOLDERS: [&str; 6] = ["proxy", "interception", "hbone", "config", "benches", "tests"];

const UPDATE_HINT: &str = "docs/settings.md is not as config/src/settings/resolve/ declares the settings: replace its \
                      table with the output of `cargo run -- config keys --markdown`";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| unreachable!("{}: {error}", path.display()))
}

/// All `.rs` files below these folders: relative path and text.
fn sources(folders: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = folders.iter().map(PathBuf::from).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).expect("a folder").flatten() {
            let path = folder.join(entry.file_name());
            if entry.file_type().expect("a type").is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((path.display().to_string(), read(&path)));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// The dependencies of all packages, including development ones: (package, dependency).
fn dependencies() -> BTreeSet<(String, String)> {
    let cargo = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--locked",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(root().join("Cargo.toml"))
        .output()
        .expect("cargo runs");
    let metadata: serde_json::Value =
        serde_json::from_slice(&cargo.stdout).unwrap_or_else(|error| {
            unreachable!("{error}: {}", String::from_utf8_lossy(&cargo.stderr))
        });
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap_or_default().to_owned();
    let packages = list(&metadata["packages"]);
    assert_eq!(packages.len(), FOLDERS.len());
    packages
        .iter()
        .flat_map(|package| {
            list(&package["dependencies"]).into_iter().map(move |to| (name(package), name(&to)))
        })
        .collect()
}

#[test]
fn every_file_has_header_and_at_most_500_lines() {
    for (path, text) in sources(&FOLDERS) {
        assert!(text.starts_with("//! "), "{path} does not begin with //!");
        let lines = text.lines().count();
        assert!(lines <= MAX_FILE_LINES, "{path} has {lines} lines");
        assert!(!path.ends_with("/mod.rs"), "{path}: foo.rs and foo/ instead");
    }
}

#[test]
fn crates_depend_only_on_allowed_crates() {
    let dependencies = dependencies();
    let ours = |to: &str| to == "underpass" || to.starts_with("underpass-");
    for (from, to) in &dependencies {
        let allowed = match from.as_str() {
            "underpass-config" => !ours(to),
            "underpass-interception" | "underpass-hbone" => !ours(to) || to == "underpass-config",
            "underpass" => !matches!(to.as_str(), "underpass-tests" | "underpass-benches"),
            "underpass-tests" => to != "underpass-benches",
            _ => true,
        };
        assert!(allowed, "{from} must not depend on {to}");
    }
    for to in ["underpass-config", "underpass-hbone", "underpass-interception"] {
        assert!(dependencies.contains(&("underpass".to_owned(), to.to_owned())), "{to}");
    }
}

#[test]
fn third_party_crates_are_used_by_their_owners_only() {
    let owners: [(&[&str], &[&str]); 4] = [
        (&["saphyr-parser"], &["underpass-config"]),
        // prost encodes the messages of control planes, of the CA, and of the node agent.
        (&["prost"], &["underpass-config", "underpass-hbone", "underpass"]),
        (
            &[
                "h2",
                "rustls",
                "rustls-webpki",
                "tokio-rustls",
                "rcgen",
                "x509-parser",
                "aws-lc-rs",
                "tonic",
                "spiffe",
            ],
            &["underpass-hbone"],
        ),
        (&["nix", "socket2", "nlink", "caps", "imara-diff"], &["underpass-interception"]),
    ];
    for (from, to) in dependencies() {
        assert!(
            !["anyhow", "eyre", "openssl", "native-tls", "async-trait"].contains(&to.as_str()),
            "{from} depends on {to}"
        );
        for (crates, owners) in owners {
            let is_test_crate = ["underpass-tests", "underpass-benches"].contains(&from.as_str());
            assert!(
                !crates.contains(&to.as_str()) || owners.contains(&from.as_str()) || is_test_crate,
                "{from} depends on {to}, which belongs to {owners:?}"
            );
        }
    }
}

#[test]
fn only_interception_makes_system_calls() {
    // Product crates other than interception make no system calls. Test crates may.
    let others = ["underpass-config", "underpass-hbone", "underpass"];
    for (from, to) in dependencies().iter().filter(|(from, _)| others.contains(&from.as_str())) {
        let wraps_system_calls = ["libc", "linux-raw-sys", "nix", "rustix", "socket2"];
        assert!(!wraps_system_calls.contains(&to.as_str()), "{from} depends on {to}");
    }
}

#[test]
fn forbids_unsafe_code_in_every_crate() {
    assert!(read("Cargo.toml").contains("unsafe_code = \"forbid\""));
    for folder in FOLDERS {
        let manifest = read(format!("{folder}/Cargo.toml"));
        assert!(manifest.contains("[lints]\nworkspace = true"), "{folder} has lints of its own");
    }
}

#[test]
fn rejects_ignored_tests_and_tests_that_sleep() {
    for (path, text) in sources(&FOLDERS).iter().filter(|(path, _)| path != "tests/tests/tidy.rs") {
        for word in ["#[ignore", "thread::sleep"] {
            assert!(!text.contains(word), "{path} has {word}");
        }
    }
    // Other tests use a paused clock; these run in real time.
    for (path, text) in sources(&["tests", "interception/tests"])
        .iter()
        .filter(|(path, _)| path != "tests/tests/tidy.rs")
    {
        assert!(!text.contains("sleep"), "{path} sleeps");
    }
}

#[test]
fn settings_and_their_documentation_agree() {
    let document = read("docs/settings.md");
    let table = Reference::table(underpass_config::reference());
    let rows = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("| `")).map(str::to_owned).collect()
    };
    for (documented, declared) in rows(&document).iter().zip(&rows(&table)) {
        assert_eq!(documented, declared, "{UPDATE_HINT}");
    }
    assert!(document.contains(&table), "{UPDATE_HINT}");
}

#[test]
fn readme_contains_two_commands() {
    let readme = read("README.md");
    for command in ["```\ncargo run --release -- demo\n```", "```\ncargo test --workspace\n```"] {
        assert!(readme.contains(command), "{command}");
    }
}

/// The names of metrics in a text, between `open` and `close`.
fn metric_names(text: &str, open: char, close: char) -> BTreeSet<String> {
    let names = text.split(open).skip(1).filter_map(|rest| rest.split(close).next());
    names.filter(|name| is_metric_name(name)).map(str::to_owned).collect()
}

#[test]
fn metrics_and_their_documentation_agree() {
    let code: BTreeSet<String> = sources(&["proxy/src/observe"])
        .iter()
        .flat_map(|(_, text)| metric_names(text.split("#[cfg(test)]").next().unwrap(), '"', '"'))
        .collect();
    let documented = metric_names(&read("docs/operations.md"), '`', '`');
    let undocumented: Vec<_> = code.difference(&documented).collect();
    let unknown: Vec<_> = documented.difference(&code).collect();
    assert!(!code.is_empty());
    assert!(undocumented.is_empty(), "docs/operations.md lacks {undocumented:?}");
    assert!(unknown.is_empty(), "docs/operations.md names metrics that do not exist: {unknown:?}");
}
