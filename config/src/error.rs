//! Errors of a configuration: all mistakes at once, each with its key, value and remedy.

use std::fmt;

use crate::yaml::document::{Origin, SyntaxError};

/// The number of printed mistakes. More are usually the same mistake many times.
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
    /// The location of the value, if there is one.
    pub origin: Option<Origin>,
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
    pub(crate) fn one(reason: String, origin: Option<Origin>) -> Self {
        Self {
            problems: vec![Problem { key: String::new(), value: None, reason, origin }],
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
                shown.try_for_each(|problem| write!(f, "\n  {problem}"))?;
                match count.saturating_sub(MAX_SHOWN) {
                    0 => Ok(()),
                    more => write!(f, "\n  and {more} more"),
                }
            }
        }
    }
}

impl std::error::Error for ConfigErrors {}
