//! Checks documents: relative links, the headings that they refer to, and tables.

use std::fs;
use std::path::Path;

use crate::root;

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
pub(crate) fn link_problems(file: &Path, markdown: &str) -> Vec<String> {
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
pub(crate) fn table_problems(markdown: &str) -> Vec<String> {
    let cells = |row: &str| row.trim().trim_matches('|').replace("\\|", "").matches('|').count();
    let is_delimiter = |row: &str| row.chars().all(|c| ['|', '-', ':', ' '].contains(&c));
    let mut problems = Vec::new();
    let lines = prose(markdown);
    let (mut previous, mut columns) = (0, 0);
    for (index, &(number, line)) in lines.iter().enumerate() {
        if !line.starts_with('|') {
            continue;
        }
        let is_header = previous + 1 != number || previous == 0;
        if is_header {
            columns = cells(line);
        } else if cells(line) != columns {
            problems.push(format!("{number}: a row with another number of cells than its header"));
        }
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
    let row = "3: a row with another number of cells than its header";
    assert_eq!(table_problems("| a | b |\n|---|---|\n| 1 | 2 | 3 |"), [row]);
    assert_eq!(table_problems("| a | b |\n| 1 | 2 |"), ["1: a table that does not render"]);
    assert_eq!(
        table_problems("text\n\n| a | b |\n|---|"),
        [
            "3: a table that does not render",
            "4: a row with another number of cells than its header"
        ]
    );
}
