//! Prints the findings of the doctor as text or JSON.

use serde_json::{Value, json};

use super::check::{Category, Finding, Info, Level};
use crate::cli::style::{Colour, Style};
use crate::cli::verbosity::Verbosity;
use crate::version::VERSION;

/// The document whose sections explain the checks.
const DOCUMENT: &str = "docs/troubleshooting.md";
/// The width of the column of ids.
const ID_WIDTH: usize = 22;

/// All findings, in the order of the checks.
pub(super) struct Report {
    pub(super) findings: Vec<(Info, Finding)>,
}

impl Report {
    pub(super) fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|(_, finding)| finding.level == level).count()
    }

    pub(super) fn json(&self) -> Value {
        let checks = self.findings.iter().map(|(info, finding)| {
            let Finding { level, message, details, hint, command } = finding;
            json!({
                "id": info.id,
                "category": info.category.title(),
                "level": level.name(),
                "message": message,
                "details": details,
                "hint": hint,
                "command": command,
                "section": section(info.id),
            })
        });
        json!({
            "ok": self.count(Level::Failure) == 0,
            "failures": self.count(Level::Failure),
            "warnings": self.count(Level::Warning),
            "version": VERSION,
            "checks": checks.collect::<Vec<_>>(),
        })
    }

    pub(super) fn text(&self, style: Style, verbosity: Verbosity) -> String {
        let mut text = String::new();
        let mut category: Option<Category> = None;
        for (info, finding) in &self.findings {
            if verbosity.quiet && finding.level == Level::Ok {
                continue;
            }
            if category != Some(info.category) {
                category = Some(info.category);
                text += &format!("{}\n", style.paint(Colour::Bold, info.category.title()));
            }
            text += &lines(info, finding, style, verbosity);
        }
        let [failures, warnings] = [Level::Failure, Level::Warning].map(|level| self.count(level));
        if !verbosity.quiet || failures + warnings > 0 {
            let checks = self.findings.len();
            text += &format!("checks: {checks}, failures: {failures}, warnings: {warnings}\n");
        }
        text
    }
}

fn section(id: &str) -> String {
    format!("{DOCUMENT}#{id}")
}

fn lines(info: &Info, finding: &Finding, style: Style, verbosity: Verbosity) -> String {
    let Finding { level, message, details, hint, command } = finding;
    let colour = match level {
        Level::Ok => Colour::Green,
        Level::Warning => Colour::Yellow,
        Level::Failure => Colour::Red,
    };
    let word = style.paint(colour, &format!("{:7}", level.name()));
    let mut text = format!("  {word}  {:ID_WIDTH$}  {message}\n", info.id);
    let is_sound = *level == Level::Ok;
    if is_sound && !verbosity.verbose {
        return text;
    }
    let indent = " ".repeat(13 + ID_WIDTH);
    let mut add = |line: &str| text += &format!("{indent}{line}\n");
    details.iter().flat_map(|detail| detail.lines()).for_each(&mut add);
    if let Some(hint) = hint {
        add(&format!("hint: {hint}"));
    }
    if let Some(command) = command {
        add(&format!("run: {command}"));
    }
    if !is_sound {
        add(&format!("see {}", section(info.id)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let info = |id| Info::host(id, Category::Kernel);
        let bad = Finding::failure("it is too old").hint("update it").command("uname -r");
        let bad = bad.details(["one\ntwo".to_owned()]);
        let good = Finding::ok("it is there").details(["three".to_owned()]);
        Report { findings: vec![(info("kernel-version"), bad), (info("kernel-rules"), good)] }
    }

    fn text(verbosity: Verbosity) -> String {
        let text = report().text(Style::plain(), verbosity);
        text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn text_has_remedy_and_section_of_failure() {
        let text = text(Verbosity::default());
        let part = format!("\n{}", " ".repeat(13 + ID_WIDTH));
        let expected = [
            "kernel\n  failure  kernel-version          it is too old",
            "one",
            "two",
            "hint: update it",
            "run: uname -r",
            "see docs/troubleshooting.md#kernel-version\n  ok       kernel-rules            it is there\n\
             checks: 2, failures: 1, warnings: 0",
        ];
        assert_eq!(text, expected.join(&part));
    }

    #[test]
    fn verbosity_selects_details_of_sound_checks() {
        let verbose = text(Verbosity { verbose: true, quiet: false });
        assert!(verbose.contains("three") && !verbose.contains("#kernel-rules"), "{verbose}");
        let quiet = text(Verbosity { verbose: false, quiet: true });
        assert!(!quiet.contains("kernel-rules") && quiet.contains("kernel-version"), "{quiet}");
    }

    #[test]
    fn json_counts_failures_and_names_sections() {
        let json = report().json();
        assert_eq!((&json["ok"], &json["failures"]), (&false.into(), &1.into()));
        assert_eq!(json["checks"][1]["section"], "docs/troubleshooting.md#kernel-rules");
        assert_eq!(json["checks"][0]["command"], "uname -r");
    }
}
