//! Domain names as text in lower case: the keys of lookups in the mesh and the cache.

use std::fmt;
use std::fmt::Write as _;
use std::sync::Arc;

/// The maximum length of a name on the wire, including the root label (RFC 1035 section 2.3.4).
pub(super) const MAX_NAME: usize = 255;
/// The maximum length of a label.
pub(super) const MAX_LABEL: usize = 63;

/// A domain name in lower case without the final dot. Bytes that no hostname contains are escaped
/// as in a zone file (`\DDD`), so that different names have different texts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct DomainName {
    text: Arc<str>,
    labels: usize,
}

impl DomainName {
    /// The name with these labels.
    pub(super) fn of_labels<'a>(labels: impl Iterator<Item = &'a [u8]>) -> Self {
        let (mut text, mut count) = (String::new(), 0);
        for label in labels {
            if count > 0 {
                text.push('.');
            }
            count += 1;
            for &byte in label {
                if byte.is_ascii_graphic() && !matches!(byte, b'.' | b'\\') {
                    text.push(byte.to_ascii_lowercase().into());
                } else {
                    // Writing to a string cannot fail.
                    let _written = write!(text, "\\{byte:03}");
                }
            }
        }
        Self { text: text.into(), labels: count }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// The number of labels without the root.
    pub(super) fn labels(&self) -> usize {
        self.labels
    }

    /// Whether the name contains only characters that a hostname may contain in a mesh.
    pub(super) fn is_plain(&self) -> bool {
        !self.text.contains('\\')
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.text.is_empty() { f.write_str(".") } else { f.write_str(&self.text) }
    }
}

/// The wire form of a hostname; `None` if it is not a domain name. A final dot is allowed.
pub(super) fn encode(hostname: &str) -> Option<Vec<u8>> {
    let hostname = hostname.strip_suffix('.').unwrap_or(hostname);
    let mut wire = Vec::with_capacity(hostname.len() + 2);
    for label in hostname.split('.') {
        let length = u8::try_from(label.len()).ok()?;
        if !(1..=MAX_LABEL).contains(&label.len()) || !label.is_ascii() {
            return None;
        }
        wire.push(length);
        wire.extend_from_slice(label.as_bytes());
    }
    wire.push(0);
    (wire.len() <= MAX_NAME).then_some(wire)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(labels: &[&[u8]]) -> String {
        DomainName::of_labels(labels.iter().copied()).to_string()
    }

    #[test]
    fn name_is_lower_case_and_unambiguous() {
        assert_eq!(name(&[b"WWW", b"Example", b"com"]), "www.example.com");
        assert_eq!(name(&[]), ".");
        assert_eq!(name(&[b"a.b", b"c"]), "a\\046b.c");
        assert_eq!(name(&[b"a\\046b", b"c"]), "a\\092046b.c");
        assert_eq!(name(&[b"\0\xff "]), "\\000\\255\\032");
    }

    #[test]
    fn encodes_only_domain_names() {
        assert_eq!(encode("a.bc").unwrap(), b"\x01a\x02bc\0");
        assert_eq!(encode("a.bc."), encode("a.bc"));
        let label = |length| "a".repeat(length);
        let labels = |count| "a.".repeat(count);
        for wrong in ["", ".", "a..b", "ä.b", &label(64), &labels(128)] {
            assert_eq!(encode(wrong), None, "{wrong}");
        }
        assert!(encode(&label(63)).is_some() && encode(&labels(127)).is_some());
    }
}
