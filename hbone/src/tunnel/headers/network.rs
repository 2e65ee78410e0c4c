//! Istio's header `x-forwarded-network`: the sender's network, in the inner request through a
//! gateway.
//!
//! The gateway does not see the inner request. The network is a setting, which is empty by default.

use http::header::{HeaderMap, HeaderValue};
use underpass_config::Name;

use super::{NETWORK, OPTIONAL_WHITESPACE};

/// The maximum length of a network name. Kubernetes limits label values to 63 bytes, but a mesh
/// file may contain longer names.
const MAX_BYTES: usize = 253;

/// Parses the first line of the header. `None` if it is missing, too long, or not one word of
/// visible ASCII.
pub(super) fn read(headers: &HeaderMap) -> Option<Name> {
    let text = headers.get(NETWORK)?.to_str().ok()?.trim_matches(OPTIONAL_WHITESPACE);
    is_network(text).then(|| text.into())
}

/// Formats the header value, which is empty for the default network. `None` if the name is invalid.
pub(super) fn to_header(network: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(network).ok().filter(|_| is_network(network))
}

fn is_network(text: &str) -> bool {
    text.len() <= MAX_BYTES && text.bytes().all(|c| c.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_back(value: &[u8]) -> Option<Name> {
        let mut headers = HeaderMap::new();
        headers.insert(NETWORK, HeaderValue::from_bytes(value).unwrap());
        headers.append(NETWORK, HeaderValue::from_static("second"));
        read(&headers)
    }

    #[test]
    fn reads_and_writes_network_name() {
        for name in ["", "network-1", "Net.2_x"] {
            assert_eq!(read_back(name.as_bytes()).as_deref(), Some(name));
            assert_eq!(to_header(name).unwrap(), name);
        }
        assert_eq!(read_back(b" network-1\t").as_deref(), Some("network-1"));
        assert_eq!(read(&HeaderMap::new()), None);
    }

    #[test]
    fn rejects_invalid_or_long_name_in_both_directions() {
        let long = "n".repeat(MAX_BYTES + 1);
        for name in ["two words", "tab\there", "n\u{e9}t", &long] {
            assert_eq!((read_back(name.as_bytes()), to_header(name)), (None, None), "{name}");
        }
        assert_eq!(to_header("line\nbreak"), None);
        let longest = "n".repeat(MAX_BYTES);
        assert_eq!(read_back(longest.as_bytes()), Some(longest.into()));
    }
}
