//! Checks comments: width, openings, banned words and the length of sentences.

use crate::words::banned_words;

/// The maximum width of a comment line in columns.
const MAX_COMMENT_WIDTH: usize = 100;

/// The maximum number of words of a sentence in a comment.
const MAX_SENTENCE_WORDS: usize = 30;

/// First words of a comment that leave its subject open.
const BANNED_OPENINGS: &[&str] = &["What", "Who", "Whom", "Whose", "Whoever", "Whatever"];

/// The text of a comment line without its marker; `None` for other lines.
pub(crate) fn comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    Some(text.strip_prefix(['/', '!']).unwrap_or(text).trim())
}

/// Problems in the comments of a source file, each with its line number.
pub(crate) fn comment_problems(text: &str) -> Vec<String> {
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

/// Overlong sentences in comments, with the number of their paragraph's first line.
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
