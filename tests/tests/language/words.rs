//! Banned words: vague about the subject, or personifying a program.

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
    "as long as that",
    "newcomer",
    "newcomers",
    "takes none",
    "the same of",
];

/// The banned words in a text.
pub(crate) fn banned_words(text: &str) -> impl Iterator<Item = &'static str> {
    let words: String =
        text.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let padded = format!(" {} ", words.split_whitespace().collect::<Vec<_>>().join(" "));
    BANNED_WORDS.iter().copied().filter(move |word| padded.contains(&format!(" {word} ")))
}

/// Banned words in code: in string literals, and in identifiers, whose parts are words.
pub(crate) fn code_problems(text: &str) -> Vec<String> {
    let lines = (1..).zip(text.lines());
    let code = lines.filter(|(_, line)| !line.trim_start().starts_with("//"));
    code.flat_map(|(number, line)| {
        banned_words(line).map(move |word| format!("{number}: banned `{word}` in code"))
    })
    .collect()
}

#[test]
fn code_check_reports_strings_and_identifiers() {
    let text = "let nobody = 1;\nlet a = \"whoever waits\";\nfn is_told() {}\n// Somebody.\nlet newcomer = 2;";
    let expected = [
        "1: banned `nobody` in code",
        "2: banned `whoever` in code",
        "3: banned `is told` in code",
        "5: banned `newcomer` in code",
    ];
    assert_eq!(code_problems(text), expected);
}
