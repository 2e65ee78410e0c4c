//! The settings of logging: levels by target, and the line format.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::Word;
use super::access_log::AccessLogSettings;

/// Log levels and log format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// Levels by target.
    pub filter: LogFilter,
    /// The format of a line.
    pub format: LogFormat,
    /// The connections that have a line in the access log.
    pub access: AccessLogSettings,
}

/// The format of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Human-readable: time, level, target, message, fields.
    Plain,
    /// One JSON object per line.
    Json,
}

impl Word for LogFormat {
    const WORDS: &'static [(&'static str, Self)] = &[("plain", Self::Plain), ("json", Self::Json)];
}

/// Levels by target in tracing's syntax: `info`, `info,access=off`.
///
/// A word without `=` must be a level. tracing would take another word for a target, so that `dbug`
/// would log nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter(String);

/// The reason why a text is not a [`LogFilter`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LogFilterError {
    /// The text is empty, or has two consecutive commas.
    #[error("a directive is empty")]
    Empty,
    /// The level is unknown.
    #[error("{0:?} is not a level: off, error, warn, info, debug or trace")]
    Level(String),
    /// The target is malformed.
    #[error("{0:?} is not a target: letters, digits, '_', '-', '.' and ':'")]
    Target(String),
}

const LEVELS: &[&str] = &["off", "error", "warn", "info", "debug", "trace"];

impl LogFilter {
    /// The filter as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for LogFilter {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl FromStr for LogFilter {
    type Err = LogFilterError;

    fn from_str(text: &str) -> Result<Self, LogFilterError> {
        for directive in text.split(',').map(str::trim) {
            if directive.is_empty() {
                return Err(LogFilterError::Empty);
            }
            let (target, level) = match directive.split_once('=') {
                Some((target, level)) => (Some(target), level),
                None => (None, directive),
            };
            if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
                return Err(LogFilterError::Level(level.to_owned()));
            }
            if let Some(target) = target.filter(|target| !is_target(target)) {
                return Err(LogFilterError::Target(target.to_owned()));
            }
        }
        let directives: Vec<&str> = text.split(',').map(str::trim).collect();
        Ok(Self(directives.join(",")))
    }
}

/// Whether the text is a module path or the name of a target. The name of a level is a mistake:
/// `debug=access`.
fn is_target(text: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-' | b'.' | b':');
    !text.is_empty()
        && text.bytes().all(allowed)
        && !LEVELS.iter().any(|level| level.eq_ignore_ascii_case(text))
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_levels_and_targets_with_levels() {
        for (text, kept) in [
            ("info", "info"),
            ("OFF", "OFF"),
            ("info,access=off", "info,access=off"),
            ("warn, underpass::inbound=trace", "warn,underpass::inbound=trace"),
            ("access=off", "access=off"),
        ] {
            assert_eq!(text.parse::<LogFilter>().unwrap().as_str(), kept);
        }
    }

    #[test]
    fn rejects_unknown_levels_and_malformed_directives() {
        use LogFilterError::{Empty, Level, Target};
        for (text, error) in [
            ("dbug", Level("dbug".into())),
            ("info,access", Level("access".into())),
            ("access=of", Level("of".into())),
            ("access=", Level(String::new())),
            ("a=b=info", Level("b=info".into())),
            ("", Empty),
            ("info,,access=off", Empty),
            ("=info", Target(String::new())),
            ("acc ess=info", Target("acc ess".into())),
            ("[span]=info", Target("[span]".into())),
            ("debug=info", Target("debug".into())),
        ] {
            assert_eq!(text.parse::<LogFilter>(), Err(error), "{text}");
        }
    }
}
