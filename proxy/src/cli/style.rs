//! Colours of texts for people: only on a terminal, and not if `NO_COLOR` is set
//! (<https://no-color.org>).

use std::io;

use anstream::stream::RawStream;
use anstream::{AutoStream, ColorChoice};

/// Whether texts are coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Style {
    is_coloured: bool,
}

/// A colour of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    Green,
    Yellow,
    Red,
    Bold,
}

impl Colour {
    /// The parameter of the escape sequence SGR (ECMA-48).
    fn parameter(self) -> u8 {
        match self {
            Self::Green => 32,
            Self::Yellow => 33,
            Self::Red => 31,
            Self::Bold => 1,
        }
    }
}

impl Style {
    pub(super) fn of_stdout() -> Self {
        Self::of(&io::stdout())
    }

    pub(super) fn of_stderr() -> Self {
        Self::of(&io::stderr())
    }

    fn of(stream: &impl RawStream) -> Self {
        Self { is_coloured: AutoStream::choice(stream) != ColorChoice::Never }
    }

    /// Paints nothing.
    #[cfg(test)]
    pub(super) fn plain() -> Self {
        Self { is_coloured: false }
    }

    pub(super) fn paint(self, colour: Colour, text: &str) -> String {
        if self.is_coloured {
            format!("\u{1b}[{}m{text}\u{1b}[0m", colour.parameter())
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paints_only_if_coloured() {
        let painted = |is_coloured| Style { is_coloured }.paint(Colour::Red, "failure");
        assert_eq!(painted(false), "failure");
        assert_eq!(painted(true), "\u{1b}[31mfailure\u{1b}[0m");
    }

    #[test]
    fn captured_output_is_not_coloured() {
        // cargo and CI capture the output of tests; a terminal is used only with `--nocapture`.
        let is_terminal = io::IsTerminal::is_terminal(&io::stdout());
        assert!(is_terminal || Style::of_stdout() == Style { is_coloured: false });
    }
}
