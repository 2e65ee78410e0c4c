//! Checks the language of comments, names of tests, and documents: plain technical English.
//!
//! Every crate is checked.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// The checked folders.
const FOLDERS: &[&str] = &["benches", "config", "hbone", "interception", "proxy", "tests"];

/// This file contains the banned words as data and as fixtures.
const OWN_FILE: &str = "tests/tests/language.rs";

/// The maximum width of a comment line in columns.
const MAX_COMMENT_WIDTH: usize = 100;

/// The maximum number of words of a sentence in a comment.
const MAX_SENTENCE_WORDS: usize = 30;

/// Words that are vague about the subject, or personify a program.
const BANNED_WORDS: &[&str] = &[
    "whoever",
    "whomever",
    "somebody",
    "someone",
    "nobody",
    "everybody",
    "anybody",
    "anew",
    "who has",
    "who is",
    "is told",
    "are told",
    "goes by it",
    "what is there",
    "at its leisure",
];

/// First words of a comment that leave its subject open.
const BANNED_OPENINGS: &[&str] = &["What", "Who", "Whom", "Whose", "Whoever", "Whatever"];

/// First words of a test name that do not name its subject.
const BANNED_TEST_OPENINGS: &[&str] =
    &["a", "an", "the", "it", "what", "who", "whoever", "whose", "whom", "whatever", "of", "how"];

/// First words of a trial's name, which is a sentence, that do not name its subject.
const BANNED_TRIAL_OPENINGS: &[&str] =
    &["it", "what", "who", "whoever", "whose", "whatever", "of", "how", "so", "nor", "and", "they"];

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

/// The text of a comment line without its marker; `None` for other lines.
fn comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    Some(text.strip_prefix(['/', '!']).unwrap_or(text).trim())
}

/// Problems in the comments of a source file, each with its line number.
fn comment_problems(text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut after_comment = false;
    for (number, line) in (1..).zip(text.lines()) {
        let Some(comment) = comment(line) else {
            after_comment = false;
            continue;
        };
        let mut report = |problem: String| problems.push(format!("{number}: {problem}"));
        let width = line.chars().count();
        if width > MAX_COMMENT_WIDTH {
            report(format!("{width} columns"));
        }
        let opening = comment.split(' ').next().unwrap_or_default();
        if !after_comment && BANNED_OPENINGS.contains(&opening) {
            report(format!("opening `{opening}`"));
        }
        for word in banned_words(comment) {
            report(format!("banned `{word}`"));
        }
        after_comment = true;
    }
    problems.extend(sentence_problems(text));
    problems
}

/// The banned words in a text.
fn banned_words(text: &str) -> impl Iterator<Item = &'static str> {
    let words: String =
        text.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let padded = format!(" {} ", words.split_whitespace().collect::<Vec<_>>().join(" "));
    BANNED_WORDS.iter().copied().filter(move |word| padded.contains(&format!(" {word} ")))
}

/// Sentences in comments that are too long, with the number of their paragraph's first line.
fn sentence_problems(text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut in_code = false;
    let mut paragraph = (0, String::new());
    for (number, line) in (1..).zip(text.lines().chain([""])) {
        let comment = comment(line).unwrap_or_default();
        let is_fence = comment.starts_with("```");
        in_code ^= is_fence;
        let is_item = comment.starts_with(['*', '-', '|', '#']);
        if comment.is_empty() || is_fence || in_code || is_item {
            let (number, paragraph) = std::mem::take(&mut paragraph);
            let long = sentences(&paragraph).filter(|words| *words > MAX_SENTENCE_WORDS);
            problems.extend(long.map(|words| format!("{number}: a sentence of {words} words")));
        }
        if !(is_fence || in_code || comment.is_empty()) {
            if paragraph.1.is_empty() {
                paragraph.0 = number;
            }
            paragraph.1 += comment;
            paragraph.1.push(' ');
        }
    }
    problems
}

/// The numbers of words of the sentences and clauses in a paragraph.
fn sentences(paragraph: &str) -> impl Iterator<Item = usize> {
    let mut counts = vec![0];
    for word in paragraph.split_whitespace() {
        if let Some(count) = counts.last_mut() {
            *count += 1;
        }
        if word.trim_end_matches([')', '"']).ends_with(['.', ':', ';', '?', '!']) {
            counts.push(0);
        }
    }
    counts.into_iter()
}

/// Names of test functions that do not follow subject_verb_result.
fn test_name_problems(text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut is_test = false;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        let Some((_, name)) = line.split_once("fn ") else { continue };
        let opening = name.split('_').next().unwrap_or_default();
        if is_test && BANNED_TEST_OPENINGS.contains(&opening) {
            let name = name.split(['(', '<']).next().unwrap_or_default();
            problems.push(format!("{number}: test name `{name}`"));
        }
        is_test = false;
    }
    problems
}

/// Names of trials in a suite that do not name their subject.
fn trial_name_problems(text: &str) -> Vec<String> {
    let calls = text.split(".test").skip(1).filter_map(|call| call.split_once('('));
    let suffixes = ["", "_both", "_with_users", "_both_with_users"];
    let names = calls.filter(|(suffix, _)| suffixes.contains(suffix)).filter_map(|(_, call)| {
        let name = call.trim_start().strip_prefix('"')?;
        name.split('"').next()
    });
    let is_banned = |name: &&str| {
        let opening = name.split(' ').next().unwrap_or_default();
        BANNED_TRIAL_OPENINGS.contains(&opening)
    };
    names.filter(is_banned).map(|name| format!("trial name `{name}`")).collect()
}

/// The anchors of a document: its headings in GitHub's form.
fn anchors(markdown: &str) -> Vec<String> {
    let headings = prose(markdown).into_iter().filter_map(|(_, line)| {
        let title = line.trim_start_matches('#');
        (title.len() < line.len()).then(|| title.trim().to_lowercase())
    });
    let slug = |title: String| -> String {
        let kept = title.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

/// The lines of a document outside of code blocks, with their numbers.
fn prose(markdown: &str) -> Vec<(usize, &str)> {
    let mut in_code = false;
    let lines = (1..).zip(markdown.lines());
    lines
        .filter(|(_, line)| {
            let is_fence = line.trim_start().starts_with("```");
            in_code ^= is_fence;
            !in_code && !is_fence
        })
        .collect()
}

/// Relative links to files or headings that do not exist. `file` is the path of the document.
fn link_problems(file: &Path, markdown: &str) -> Vec<String> {
    let folder = file.parent().expect("a document is in a folder");
    let mut problems = Vec::new();
    for (number, line) in prose(markdown) {
        let targets = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://")) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let linked = if path.is_empty() { file.to_owned() } else { folder.join(path) };
            let is_broken = if anchor.is_empty() {
                !linked.exists()
            } else {
                let text = fs::read_to_string(&linked).unwrap_or_default();
                let text = if path.is_empty() { markdown } else { &text };
                !anchors(text).iter().any(|found| found == anchor)
            };
            if is_broken {
                problems.push(format!("{number}: broken link `{target}`"));
            }
        }
    }
    problems
}

/// Tables whose delimiter row is missing or has another number of cells than the header.
fn table_problems(markdown: &str) -> Vec<String> {
    let cells = |row: &str| row.trim().trim_matches('|').replace("\\|", "").matches('|').count();
    let is_delimiter = |row: &str| row.chars().all(|c| ['|', '-', ':', ' '].contains(&c));
    let mut problems = Vec::new();
    let lines = prose(markdown);
    let mut previous = 0;
    for (index, &(number, line)) in lines.iter().enumerate() {
        if !line.starts_with('|') {
            continue;
        }
        let is_header = previous + 1 != number || previous == 0;
        previous = number;
        let next = lines.get(index + 1).map_or("", |&(_, next)| next);
        let renders = next.starts_with('|') && is_delimiter(next) && cells(next) == cells(line);
        if is_header && !renders {
            problems.push(format!("{number}: a table that does not render"));
        }
    }
    problems
}

#[test]
fn files_use_plain_technical_english() {
    let root = root();
    let mut problems = Vec::new();
    for cleaned in FOLDERS {
        for file in files(&root.join(cleaned), "rs") {
            if file.ends_with(OWN_FILE) {
                continue;
            }
            let text = fs::read_to_string(&file).expect("a source file");
            let found = comment_problems(&text)
                .into_iter()
                .chain(test_name_problems(&text))
                .chain(trial_name_problems(&text));
            let file = file.strip_prefix(&root).expect("a file of the repository");
            problems.extend(found.map(|problem| format!("{}:{problem}", file.display())));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn documents_have_working_links_and_tables() {
    let root = root();
    let mut documents = files(&root.join("docs"), "md");
    documents.push(root.join("README.md"));
    let mut problems = Vec::new();
    for file in documents {
        let text = fs::read_to_string(&file).expect("a document");
        let found = link_problems(&file, &text).into_iter().chain(table_problems(&text));
        problems.extend(found.map(|problem| format!("{}:{problem}", file.display())));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn comment_check_reports_width_words_openings_and_sentences() {
    let wide = format!("// {}", "x".repeat(MAX_COMMENT_WIDTH));
    assert_eq!(comment_problems(&wide), ["1: 103 columns"]);
    assert_eq!(
        comment_problems("/// Whoever has a permit."),
        ["1: opening `Whoever`", "1: banned `whoever`",]
    );
    assert_eq!(
        comment_problems("let x = 1;\n    // Every worker\n    // is told."),
        ["3: banned `is told`",]
    );
    let long = format!("//! Words:\n//! {}end.", "word ".repeat(MAX_SENTENCE_WORDS));
    let reported = comment_problems(&long);
    assert_eq!(reported.last().map(String::as_str), Some("1: a sentence of 31 words"));
    let good =
        "/// Closes the tunnel.\n///\n/// ```\n/// somebody\n/// ```\nlet nobody = \"anew\";";
    assert_eq!(comment_problems(good), ["4: banned `somebody`"], "code is checked for words only");
}

#[test]
fn test_name_check_reports_openings_of_tests_only() {
    for opening in BANNED_TEST_OPENINGS {
        let text = format!("#[test]\nfn {opening}_port_is_refused() {{}}");
        assert_eq!(
            test_name_problems(&text),
            [format!("2: test name `{opening}_port_is_refused`")]
        );
    }
    let asynchronous = "#[tokio::test(start_paused = true)]\n    async fn what_waits_ends() {}";
    assert_eq!(test_name_problems(asynchronous), ["2: test name `what_waits_ends`"]);
    let good = "#[test]\nfn rejects_port() {}\nfn a_helper() {}\n#[test]\nfn answer_arrives() {}";
    assert_eq!(test_name_problems(good), [""; 0]);
}

#[test]
fn trial_name_check_reports_openings() {
    let text = "suite.test(\"who is denied\", a); suite\n.test_both(\n    \"so is a port\",\n b);";
    let expected = ["trial name `who is denied`", "trial name `so is a port`"];
    assert_eq!(trial_name_problems(text), expected);
    let good = "suite.test(\"a port is refused\", a); suite.tests(\"who\"); suite.test(name, b);";
    assert_eq!(trial_name_problems(good), [""; 0]);
}

#[test]
fn link_check_reports_missing_files_and_headings() {
    let file = root().join("docs/example.md");
    let text = "# One & two\n[a](#one--two) [b](../README.md) [c](https://x.test/y)\n\
                ```\n[d](nowhere.md)\n```\n[e](nowhere.md) and [f](#three)";
    let expected = ["6: broken link `nowhere.md`", "6: broken link `#three`"];
    assert_eq!(link_problems(&file, text), expected);
}

#[test]
fn table_check_reports_missing_or_unequal_delimiter() {
    let good = "| a | b |\n|---|:-:|\n| 1 | `x \\| y` |\n\ntext\n| a |\n|---|";
    assert_eq!(table_problems(good), [""; 0]);
    assert_eq!(table_problems("| a | b |\n| 1 | 2 |"), ["1: a table that does not render"]);
    assert_eq!(table_problems("text\n\n| a | b |\n|---|"), ["3: a table that does not render"]);
}
