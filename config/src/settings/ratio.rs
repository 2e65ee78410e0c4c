//! A fraction of connections, such as those that are traced.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

const MILLION: u32 = 1_000_000;
/// The number of decimal places of a ratio.
const PLACES: usize = 6;

/// A fraction from 0 to 1, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ratio(u32);

/// The reason why a text is not a [`Ratio`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("must be from 0 to 1 with at most 6 decimal places, such as 0.01")]
pub struct RatioError;

impl Ratio {
    /// Every connection.
    pub const ALL: Self = Self(MILLION);

    /// Whether the fraction includes a connection with these random bits. Equal bits have equal
    /// results, and a larger ratio includes all that a smaller one includes.
    #[must_use]
    pub fn includes(self, random: u64) -> bool {
        (u128::from(random) * u128::from(MILLION)) >> 64 < u128::from(self.0)
    }
}

impl FromStr for Ratio {
    type Err = RatioError;

    fn from_str(text: &str) -> Result<Self, RatioError> {
        let (whole, places) = text.split_once('.').unwrap_or((text, "0"));
        let is_number = |digits: &str| {
            let has_digits = (1..=PLACES).contains(&digits.len());
            has_digits && digits.bytes().all(|digit| digit.is_ascii_digit())
        };
        if !is_number(whole) || !is_number(places) {
            return Err(RatioError);
        }
        let number = |digits: &str| digits.parse::<u32>().map_err(|_| RatioError);
        let millionths = number(&format!("{places:0<PLACES$}"))?;
        let all = number(whole)?.checked_mul(MILLION).and_then(|all| all.checked_add(millionths));
        all.filter(|all| *all <= MILLION).map(Self).ok_or(RatioError)
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:0PLACES$}", self.0 / MILLION, self.0 % MILLION);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_prints_as_parsed() {
        for (text, printed) in
            [("0", "0"), ("1", "1"), ("1.0", "1"), ("0.25", "0.25"), ("0.000001", "0.000001")]
        {
            assert_eq!(text.parse::<Ratio>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn rejects_text_that_is_no_ratio() {
        for text in ["", ".", ".5", "1.", "-0", "1.1", "2", "0.0000001", "1e-3", "50%", "9999999"] {
            assert_eq!(text.parse::<Ratio>(), Err(RatioError), "{text}");
        }
    }

    #[test]
    fn ratio_includes_its_fraction_of_random_bits() {
        let ratio = |text: &str| text.parse::<Ratio>().unwrap();
        assert!(Ratio::ALL.includes(0) && Ratio::ALL.includes(u64::MAX));
        assert!(!ratio("0").includes(0));
        assert!(ratio("0.5").includes(u64::MAX / 2) && !ratio("0.5").includes(u64::MAX / 2 + 1));
    }
}
