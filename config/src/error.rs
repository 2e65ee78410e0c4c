//! What is wrong with a configuration: every mistake at once, each with its key, its value and what would be right.

use std::fmt;

use crate::document::{Origin, SyntaxError};

/// More mistakes than one reads at once: often one mistake, many times.
const MAX_SHOWN: usize = 20;

/// One mistake in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path of the key, such as `proxy.outbound_port` or `workloads[3].protocol`; empty for the whole document.
    pub key: String,
    /// What was written there, if it was a single value.
    pub value: Option<String>,
    /// Why it cannot be used, and what would be right.
    pub reason: String,
    /// Where it was written, if it was written.
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

/// Every mistake of a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The mistakes, in the order of the document; the first 1000 if there are more.
    pub problems: Vec<Problem>,
    /// How many more there are.
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
