//! The findings that the doctor prints as JSON.

use serde_json::Value;
use underpass_tests::Printed;

use crate::text;

/// The findings of one run.
#[derive(Debug)]
pub(crate) struct Findings(Vec<Finding>);

/// One finding.
#[derive(Debug)]
pub(crate) struct Finding {
    id: String,
    level: String,
    message: String,
    rest: String,
}

impl Findings {
    /// Parses the output, whose exit code must agree with the findings.
    pub(crate) fn of(printed: Printed) -> Self {
        let Printed { status, out, err } = printed;
        let report: Value =
            serde_json::from_str(&out).unwrap_or_else(|error| unreachable!("{error}: {out}{err}"));
        let checks = report.get("checks").and_then(Value::as_array).expect("a list of checks");
        let finding = |check: &Value| {
            let field = |name: &str| check.get(name).cloned().unwrap_or_default();
            let id = text(&field("id"));
            let section = text(&field("section"));
            assert_eq!(section, format!("docs/troubleshooting.md#{id}"));
            let rest = ["details", "hint", "command"].map(|name| field(name).to_string()).join(" ");
            Finding { id, level: text(&field("level")), message: text(&field("message")), rest }
        };
        let findings = Self(checks.iter().map(finding).collect());
        let expected = if findings.failures().is_empty() { 0 } else { 1 };
        assert_eq!(status.code(), Some(expected), "{findings:?} {err}");
        findings
    }

    pub(crate) fn ids(&self) -> Vec<&str> {
        self.0.iter().map(|finding| finding.id.as_str()).collect()
    }

    /// The ids of the failed checks.
    pub(crate) fn failures(&self) -> Vec<&str> {
        let failed = self.0.iter().filter(|finding| finding.level == "failure");
        failed.map(|finding| finding.id.as_str()).collect()
    }

    pub(crate) fn find(&self, id: &str) -> Option<&Finding> {
        self.0.iter().find(|finding| finding.id == id)
    }

    /// Asserts that a check has this level, and that its finding contains `part`.
    #[track_caller]
    pub(crate) fn assert(&self, id: &str, level: &str, part: &str) {
        let finding = self.find(id).unwrap_or_else(|| unreachable!("no {id} in {self:?}"));
        let contains = finding.message.contains(part) || finding.rest.contains(part);
        assert!(finding.level == level && contains, "{level} {part:?}: {finding:?}");
    }
}
