//! Checks the language of comments, messages, names of tests, and documents: plain technical
//! English.
//!
//! Every crate is checked.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod comments;
mod documents;
mod items;
mod messages;
mod names;
mod words;

use std::fs;
use std::path::{Path, PathBuf};

use crate::comments::comment_problems;
use crate::documents::{link_problems, table_problems};
use crate::items::item_problems;
use crate::messages::message_problems;
use crate::names::{test_name_problems, trial_name_problems};
use crate::words::code_problems;

/// The checked folders.
const FOLDERS: &[&str] = &["benches", "config", "hbone", "interception", "proxy", "tests"];

/// This test contains the banned words as data and as fixtures.
const OWN_FOLDER: &str = "tests/tests/language";

/// The documents outside of docs/.
const DOCUMENTS: &[&str] = &["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All files with this extension at `path`, which is a file or a folder.
fn files(path: &Path, extension: &str) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).expect("a folder of the repository");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let is_wanted = |path: &PathBuf| path.extension().is_some_and(|found| found == extension);
    paths
        .filter(|path| path.is_dir() || is_wanted(path))
        .flat_map(|path| files(&path, extension))
        .collect()
}

/// Applies a check to every source file, and fails with all problems.
fn check_sources(is_checked: impl Fn(&Path) -> bool, check: impl Fn(&str) -> Vec<String>) {
    let root = root();
    let mut problems = Vec::new();
    for folder in FOLDERS {
        for file in files(&root.join(folder), "rs") {
            let path = file.strip_prefix(&root).expect("a file of the repository");
            if path.starts_with(OWN_FOLDER) || !is_checked(path) {
                continue;
            }
            let text = fs::read_to_string(&file).expect("a source file");
            let found = check(&text).into_iter();
            problems.extend(found.map(|problem| format!("{}:{problem}", path.display())));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Whether the file is part of a library or binary, and not only of tests.
fn is_product(path: &Path) -> bool {
    let folders: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    folders.get(1) == Some(&"src") && !folders.contains(&"tests") && !path.ends_with("tests.rs")
}

#[test]
fn files_use_plain_technical_english() {
    check_sources(
        |_| true,
        |text| {
            let problems = comment_problems(text).into_iter().chain(code_problems(text));
            problems.chain(test_name_problems(text)).chain(trial_name_problems(text)).collect()
        },
    );
}

#[test]
fn messages_say_what_failed_without_advice() {
    check_sources(is_product, message_problems);
}

#[test]
fn types_and_traits_are_documented() {
    check_sources(is_product, item_problems);
}

#[test]
fn documents_have_working_links_and_tables() {
    let root = root();
    let mut documents = files(&root.join("docs"), "md");
    documents.extend(DOCUMENTS.iter().map(|name| root.join(name)));
    let mut problems = Vec::new();
    for file in documents {
        let text = fs::read_to_string(&file).expect("a document");
        let found = link_problems(&file, &text).into_iter().chain(table_problems(&text));
        problems.extend(found.map(|problem| format!("{}:{problem}", file.display())));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
