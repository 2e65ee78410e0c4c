//! Makes untrusted text safe to log: limited in size, on one line.
//!
//! Every text from a peer, a CA or another program's file passes through [`Quoted`] before it
//! becomes part of an error, a log line or a metric label. Otherwise one certificate of 60 KB could
//! produce a log line of several hundred KB.

use std::error::Error;
use std::fmt::{self, Write};

/// Untrusted text: at most [`Quoted::MAX_BYTES`] bytes, with control characters escaped.
///
/// ```
/// use underpass_config::Quoted;
/// assert_eq!(Quoted::new("two\nlines").as_str(), "two\\nlines");
/// assert!(Quoted::new("a".repeat(9999)).as_str().len() < 220);
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Quoted(Box<str>);

impl Quoted {
    /// The maximum size of a quote in bytes, without the truncation mark.
    pub const MAX_BYTES: usize = 200;
    /// The maximum size of a quoted error chain in bytes. Several messages with quotes fit.
    pub const MAX_CHAIN_BYTES: usize = 1024;

    /// Quotes the text that `value` displays. Formatting stops at the limit, so long texts cost no
    /// more than short ones.
    pub fn new(value: impl fmt::Display) -> Self {
        Self::bounded(value, Self::MAX_BYTES)
    }

    /// Like [`Quoted::new`] with another limit, for the texts of several causes.
    pub fn bounded(value: impl fmt::Display, max_bytes: usize) -> Self {
        let mut text = Bounded { text: String::new(), max_bytes };
        if write!(text, "{value}").is_err() {
            text.text.push_str("...");
        }
        Self(text.text.into_boxed_str())
    }

    /// Quotes an error with its causes, outermost first: `cannot connect: Connection refused`.
    pub fn chain(error: &(dyn Error + 'static)) -> Self {
        Self::bounded(Chain(error), Self::MAX_CHAIN_BYTES)
    }

    /// The quoted text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl From<&str> for Quoted {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for Quoted {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Collects text up to a limit. Exceeding it is an error, which ends the formatting.
struct Bounded {
    text: String,
    max_bytes: usize,
}

impl Bounded {
    fn push(&mut self, piece: &str) -> fmt::Result {
        if self.text.len() + piece.len() > self.max_bytes {
            return Err(fmt::Error);
        }
        self.text.push_str(piece);
        Ok(())
    }
}

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            // Escapes are ASCII and at most ten bytes (`\u{10ffff}`).
            if is_unsafe(character) {
                let escaped: String = character.escape_default().collect();
                self.push(&escaped)?;
            } else {
                self.push(character.encode_utf8(&mut [0; 4]))?;
            }
        }
        Ok(())
    }
}

/// Whether the character is a control character, a line break, or reorders text on a terminal.
fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_short_text_unchanged() {
        let text = "spiffe://cluster.local/ns/default/sa/clïent";
        assert_eq!(Quoted::new(text).as_str(), text);
        assert_eq!(Quoted::new("").as_str(), "");
    }

    #[test]
    fn escapes_control_and_direction_characters() {
        let quoted = Quoted::new("a\r\n\t\0\u{1b}[31m\u{7f}\u{9b}\u{2028}\u{202e}b");
        assert_eq!(quoted.as_str(), "a\\r\\n\\t\\u{0}\\u{1b}[31m\\u{7f}\\u{9b}\\u{2028}\\u{202e}b");
    }

    #[test]
    fn cuts_long_text_at_a_character() {
        for text in ["x".repeat(100_000), "ï".repeat(100_000), "\n".repeat(100_000)] {
            let quoted = Quoted::new(&text);
            let kept = quoted.as_str().strip_suffix("...").unwrap();
            assert!((190..=Quoted::MAX_BYTES).contains(&kept.len()), "{}", kept.len());
        }
        let whole = "x".repeat(Quoted::MAX_BYTES);
        assert_eq!(Quoted::new(&whole).as_str(), whole);
    }

    #[test]
    fn chain_has_every_cause_within_its_bound() {
        let cause = std::io::Error::other("the\ncause");
        let error = std::io::Error::other(Outer(cause));
        assert_eq!(Quoted::chain(&error).as_str(), "outer: the\\ncause");
        let long = std::io::Error::other("x".repeat(1 << 20));
        assert!(Quoted::chain(&long).as_str().len() <= Quoted::MAX_CHAIN_BYTES + 3);
    }

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn stops_formatting_at_the_bound() {
        struct Endless;
        impl fmt::Display for Endless {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                loop {
                    f.write_str("again ")?;
                }
            }
        }
        assert!(Quoted::new(Endless).as_str().starts_with("again again"));
    }
}
