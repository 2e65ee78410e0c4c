//! Checks the names of tests and of trials, which are sentences.

/// First words of a test name that do not name a subject.
const BANNED_TEST_OPENINGS: &[&str] =
    &["a", "an", "the", "it", "what", "who", "whoever", "whose", "whom", "whatever", "of", "how"];

/// First words of a trial's name, which is a sentence, that do not name a subject.
const BANNED_TRIAL_OPENINGS: &[&str] =
    &["it", "what", "who", "whoever", "whose", "whatever", "of", "how", "so", "nor", "and", "they"];

/// Names of test functions that do not follow subject_verb_result.
pub(crate) fn test_name_problems(text: &str) -> Vec<String> {
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
pub(crate) fn trial_name_problems(text: &str) -> Vec<String> {
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
