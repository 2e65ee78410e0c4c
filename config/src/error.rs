//! Errors of a configuration: all mistakes at once, each with its key, value and remedy.

use std::borrow::Cow;
use std::fmt;

use crate::hint::Hint;
use crate::yaml::document::{Origin, SyntaxError};

/// The maximum number of printed mistakes. More are usually one mistake repeated.
const MAX_SHOWN: usize = 20;

/// One mistake in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path of the key, such as `proxy.outbound_port` or `workloads[3].protocol`; empty for the
    /// entire document.
    pub key: String,
    /// The invalid value, if it is a scalar.
    pub value: Option<String>,
    /// The reason, with the expected value.
    pub reason: String,
    /// The remedy, if the reason does not imply it.
    pub hint: Option<String>,
    /// The location of the value, if there is one.
    pub origin: Option<Origin>,
}

impl Problem {
    /// The problem and its hint in one line, for lists of warnings.
    #[must_use]
    pub fn with_hint(&self) -> String {
        let hint = self.hint.iter().map(|hint| format!(" ({hint})"));
        hint.fold(self.to_string(), |text, hint| text + &hint)
    }
}

/// The reason of a mistake, with a remedy if the reason does not imply one.
#[derive(Debug)]
pub(crate) struct Reason {
    pub(crate) text: String,
    pub(crate) hint: Option<String>,
}

impl Reason {
    pub(crate) fn with_hint(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { text: text.into(), hint: Some(hint.into()) }
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self { text, hint: None }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        if let Some(value) = &self.value {
            write!(f, "{value:?}: ")?;
        }
        f.write_str(&self.reason)
    }
}

/// All mistakes of a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The mistakes in document order, limited to the first 1000.
    pub problems: Vec<Problem>,
    /// The number of further mistakes.
    pub more: usize,
}

impl ConfigErrors {
    pub(crate) fn one(reason: impl Into<Reason>, origin: Option<Origin>) -> Self {
        let Reason { text: reason, hint } = reason.into();
        Self {
            problems: vec![Problem { key: String::new(), value: None, reason, hint, origin }],
            more: 0,
        }
    }
}

impl From<SyntaxError> for ConfigErrors {
    fn from(error: SyntaxError) -> Self {
        Self::one(error.reason, Some(error.origin))
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [problem] => write!(f, "{problem}"),
            problems => {
                let count = problems.len() + self.more;
                write!(f, "{count} mistakes in the configuration:")?;
                let mut shown = problems.iter().take(MAX_SHOWN);
                shown.try_for_each(|problem| {
                    write!(f, "\n  {problem}")?;
                    problem.hint.iter().try_for_each(|hint| write!(f, "\n    hint: {hint}"))
                })?;
                match count.saturating_sub(MAX_SHOWN) {
                    0 => Ok(()),
                    more => write!(f, "\n  and {more} more"),
                }
            }
        }
    }
}

impl std::error::Error for ConfigErrors {}

impl Hint for ConfigErrors {
    /// The hint of a single mistake. `Display` prints the hints of several mistakes.
    fn hint(&self) -> Option<Cow<'static, str>> {
        let [problem] = self.problems.as_slice() else { return None };
        problem.hint.clone().map(Cow::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(key: &str, hint: Option<&str>) -> Problem {
        let (key, reason, hint) = (key.to_owned(), "wrong".to_owned(), hint.map(str::to_owned));
        Problem { key, value: None, reason, hint, origin: None }
    }

    #[test]
    fn prints_hint_after_each_of_several_mistakes() {
        let one = ConfigErrors { problems: vec![problem("a", Some("try b"))], more: 0 };
        assert_eq!((one.to_string().as_str(), one.hint()), ("a: wrong", Some("try b".into())));
        let problems = vec![problem("a", Some("try b")), problem("c", None)];
        let several = ConfigErrors { problems, more: 0 };
        let expected = "2 mistakes in the configuration:\n  a: wrong\n    hint: try b\n  c: wrong";
        assert_eq!((several.to_string().as_str(), several.hint()), (expected, None));
    }
}
