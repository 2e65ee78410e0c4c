//! `x-forwarded-network`: from which network a connection comes that crossed a gateway. Istio's; it goes with the inner request,
//! which the gateway does not see.
//!
//! Not here: what a network is. The sender tells the name that it is configured with, which is empty by default.

use http::header::{HeaderMap, HeaderValue};
use underpass_config::Name;

use super::{NETWORK, OWS};

/// A name of a network is a label's value in Kubernetes, of at most 63 bytes; a mesh file may have longer ones.
const MAX_BYTES: usize = 253;

/// Reads the first line of the header; `None` if it is absent, too long, or no single word of visible ASCII.
pub(super) fn read(headers: &HeaderMap) -> Option<Name> {
    let text = headers.get(NETWORK)?.to_str().ok()?.trim_matches(OWS);
    is_network(text).then(|| text.into())
}

/// The value of the header: empty for the network without a name; `None` for what would not be read.
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
    fn a_network_is_read_and_written_as_it_is_called() {
        for name in ["", "network-1", "Net.2_x"] {
            assert_eq!(read_back(name.as_bytes()).as_deref(), Some(name));
            assert_eq!(to_header(name).unwrap(), name);
        }
        assert_eq!(read_back(b" network-1\t").as_deref(), Some("network-1"));
        assert_eq!(read(&HeaderMap::new()), None);
    }

    #[test]
    fn what_is_no_word_or_too_long_is_neither_read_nor_written() {
        let long = "n".repeat(MAX_BYTES + 1);
        for name in ["two words", "tab\there", "n\u{e9}t", &long] {
            assert_eq!((read_back(name.as_bytes()), to_header(name)), (None, None), "{name}");
        }
        assert_eq!(to_header("line\nbreak"), None);
        let longest = "n".repeat(MAX_BYTES);
        assert_eq!(read_back(longest.as_bytes()), Some(longest.into()));
    }
}
