//! The uid of a pod, which the source of the pod assigns.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// The maximum length in bytes, as for the name of a Kubernetes object.
const MAX_BYTES: usize = 253;

/// The uid of a pod: 1 to 253 visible ASCII characters without `/`, such as the UUID that
/// Kubernetes gives it.
///
/// ```
/// use underpass_config::PodUid;
/// let uid: PodUid = "6f1b8a42-0f0e-4cb2-9b2a-0f6d6a3c8f11".parse().unwrap();
/// assert_eq!(uid.as_str().len(), 36);
/// assert!("two words".parse::<PodUid>().is_err());
/// ```
///
/// Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(Arc<str>);

/// The error of a text that is not the uid of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("must be the uid of a pod: 1 to 253 visible ASCII characters without '/'")]
pub struct PodUidError;

impl PodUid {
    /// The uid as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PodUid {
    type Err = PodUidError;

    fn from_str(text: &str) -> Result<Self, PodUidError> {
        let allowed = |c: u8| c.is_ascii_graphic() && c != b'/';
        let fits = (1..=MAX_BYTES).contains(&text.len());
        if fits && text.bytes().all(allowed) { Ok(Self(text.into())) } else { Err(PodUidError) }
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uid_prints_as_parsed() {
        let longest = "a".repeat(253);
        for text in ["a", "6f1b8a42-0f0e-4cb2-9b2a-0f6d6a3c8f11", "Pod_7.x", &longest] {
            assert_eq!(text.parse::<PodUid>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn rejects_invalid_uid() {
        let too_long = "a".repeat(254);
        for text in ["", "a/b", "a b", "a\n", "\u{e4}", "\0", &too_long] {
            assert_eq!(text.parse::<PodUid>(), Err(PodUidError), "{text:?}");
        }
    }
}
