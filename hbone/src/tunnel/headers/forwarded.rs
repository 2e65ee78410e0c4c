//! The header `forwarded`: the source and the requested service of a tunnelled connection (RFC
//! 7239).
//!
//! Reads only the first element of a list, which describes the original client.

use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use http::header::{FORWARDED, HeaderMap, HeaderValue};

use super::{HeaderError, OPTIONAL_WHITESPACE, header};
use crate::tunnel::text::{push_ipv4, push_socket_address};

/// The maximum length of a host: a name (RFC 1035 section 2.3.4), a colon and a port.
const MAX_HOST_BYTES: usize = 253 + 6;

/// The length of a header value with an IPv6 address and no host.
const TYPICAL_LENGTH: usize = 56;

/// The source and the requested service of a tunnelled connection. Those of a peer are unverified
/// claims; the peer's own address is the source of its TCP connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forwarded {
    source: Option<SocketAddr>,
    host: Option<String>,
}

impl Forwarded {
    /// Creates a header for a connection from `source` to the service `host`. Omits an invalid
    /// host.
    pub fn new(source: SocketAddr, host: Option<&str>) -> Self {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        Self { source: Some(source), host: host.and_then(to_host) }
    }

    /// The source. Port 0 if the peer sent only an address.
    pub fn source(&self) -> Option<SocketAddr> {
        self.source
    }

    /// The requested service in lower case, with its port if known.
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// Formats the header value. `None` if it would be empty.
    pub fn to_header(&self) -> Option<HeaderValue> {
        header(self.to_text())
    }

    fn to_text(&self) -> String {
        let mut text = String::with_capacity(TYPICAL_LENGTH);
        if let Some(source) = self.source {
            text.push_str("for=\"");
            match (source.ip(), source.port()) {
                (IpAddr::V4(ip), 0) => push_ipv4(&mut text, ip),
                // Writing to a string cannot fail.
                (IpAddr::V6(ip), 0) => _ = write!(text, "[{ip}]"),
                _ => push_socket_address(&mut text, source),
            }
            text.push('"');
        }
        if let Some(host) = &self.host {
            let separator = if self.source.is_some() { ";" } else { "" };
            // A valid host contains no quotes or backslashes, so it needs no escapes.
            let quote = if host.bytes().all(is_token) { "" } else { "\"" };
            text.extend([separator, "host=", quote, host, quote]);
        }
        text
    }

    /// Parses the first line of the header. `None` if it is missing, malformed, or has no known
    /// parameter.
    pub(super) fn read(headers: &HeaderMap) -> Option<Self> {
        let read = Self::try_from(headers.get(FORWARDED)?);
        read.ok().filter(|forwarded| *forwarded != Self::default())
    }
}

impl FromStr for Forwarded {
    type Err = HeaderError;

    /// Parses `for` and `host`, and ignores other parameters. An address that is `unknown`,
    /// obfuscated (`_name`) or malformed counts as missing; so does a malformed host.
    fn from_str(text: &str) -> Result<Self, HeaderError> {
        let (mut source, mut host) = (None, None);
        // A list may contain empty elements (RFC 9110 section 5.6.1.2).
        let mut rest = text.trim_start_matches([' ', '\t', ',']);
        loop {
            rest = rest.trim_start_matches(OPTIONAL_WHITESPACE);
            if rest.is_empty() || rest.starts_with(',') {
                break;
            }
            if let Some(next) = rest.strip_prefix(';') {
                rest = next;
                continue;
            }
            let (name, value, next) = pair(rest).ok_or(HeaderError::Forwarded)?;
            let known = match name.to_ascii_lowercase().as_str() {
                "for" => Some(&mut source),
                "host" => Some(&mut host),
                _ => None,
            };
            if known.is_some_and(|known| known.replace(value).is_some()) {
                return Err(HeaderError::Forwarded);
            }
            rest = next;
        }
        let source = source.and_then(|node: String| address(&node));
        Ok(Self { source, host: host.and_then(|host: String| to_host(&host)) })
    }
}

impl TryFrom<&HeaderValue> for Forwarded {
    type Error = HeaderError;

    fn try_from(value: &HeaderValue) -> Result<Self, HeaderError> {
        value.to_str().map_err(|_| HeaderError::NotText)?.parse()
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_text())
    }
}

/// Parses a parameter at the start of `text`: its name and value. The rest starts with `;` or `,`
/// or is empty.
fn pair(text: &str) -> Option<(&str, String, &str)> {
    let (name, text) = text.split_once('=')?;
    let (value, rest) = match text.strip_prefix('"') {
        Some(text) => quoted(text)?,
        // Accepts more characters than a token (RFC 7239 section 4): senders often forget quotes
        // around a colon.
        None => {
            let end = text.find([';', ',', ' ', '\t', '"']).unwrap_or(text.len());
            let (value, rest) = text.split_at_checked(end)?;
            (value.to_owned(), rest)
        }
    };
    let rest = rest.trim_start_matches(OPTIONAL_WHITESPACE);
    let is_name = !name.is_empty() && name.bytes().all(is_token);
    let is_complete = rest.is_empty() || rest.starts_with([';', ',']);
    (is_name && is_complete).then_some((name, value, rest))
}

/// Unescapes the text before the closing quote, and returns the rest (RFC 9110 section 5.6.4).
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.chars();
    loop {
        match chars.next()? {
            '"' => return Some((value, chars.as_str())),
            '\\' => value.push(chars.next()?),
            c => value.push(c),
        }
    }
}

/// Parses the address of a node (RFC 7239 section 6). A missing port becomes 0.
fn address(node: &str) -> Option<SocketAddr> {
    let (ip, port): (IpAddr, _) = match node.strip_prefix('[') {
        Some(rest) => {
            let (ip, port) = rest.split_once(']')?;
            (ip.parse::<Ipv6Addr>().ok()?.into(), port)
        }
        None => {
            let (ip, port) = node.split_at_checked(node.find(':').unwrap_or(node.len()))?;
            (ip.parse::<Ipv4Addr>().ok()?.into(), port)
        }
    };
    let port = match port.strip_prefix(':') {
        Some(hidden) if hidden.starts_with('_') => 0,
        Some(digits) if digits.bytes().all(|c| c.is_ascii_digit()) => digits.parse().ok()?,
        None if port.is_empty() => 0,
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

/// Parses a name or address, with or without a port, and converts it to lower case. `*` is the
/// first label of a wildcard service.
fn to_host(text: &str) -> Option<String> {
    let is_allowed = |c: u8| {
        c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'*' | b':' | b'[' | b']')
    };
    let is_host = (1..=MAX_HOST_BYTES).contains(&text.len()) && text.bytes().all(is_allowed);
    is_host.then(|| text.to_ascii_lowercase())
}

/// Returns true for the characters of a token (RFC 9110 section 5.6.2).
fn is_token(c: u8) -> bool {
    c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Option<String>, Option<String>) {
        let read: Forwarded = text.parse().unwrap();
        (read.source().map(|source| source.to_string()), read.host().map(str::to_owned))
    }

    fn parsed_as(source: &str, host: &str) -> (Option<String>, Option<String>) {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        (some(source), some(host))
    }

    #[test]
    fn writes_format_of_ztunnel() {
        for (source, host, text) in [
            ("10.0.0.5:41234", None, "for=\"10.0.0.5:41234\""),
            ("10.0.0.5:1", Some("Web.default.svc"), "for=\"10.0.0.5:1\";host=web.default.svc"),
            ("[fd00::1]:2", Some("*.example.org"), "for=\"[fd00::1]:2\";host=*.example.org"),
            ("[::ffff:10.0.0.5]:3", Some("web:80"), "for=\"10.0.0.5:3\";host=\"web:80\""),
            ("10.0.0.5:4", Some("a\";for=b"), "for=\"10.0.0.5:4\""),
            ("10.0.0.5:0", None, "for=\"10.0.0.5\""),
            ("[fd00::1]:0", None, "for=\"[fd00::1]\""),
        ] {
            let forwarded = Forwarded::new(source.parse().unwrap(), host);
            assert_eq!(forwarded.to_string(), text);
            assert_eq!(text.parse::<Forwarded>().unwrap(), forwarded);
        }
        assert_eq!(Forwarded::default().to_header(), None);
    }

    #[test]
    fn reads_examples_of_standard() {
        for (text, expected) in [
            ("for=\"_gazonk\"", parsed_as("", "")),
            ("For=\"[2001:db8:cafe::17]:4711\"", parsed_as("[2001:db8:cafe::17]:4711", "")),
            ("for=192.0.2.60;proto=http;by=203.0.113.43", parsed_as("192.0.2.60:0", "")),
            ("for=192.0.2.43, for=198.51.100.17", parsed_as("192.0.2.43:0", "")),
            ("for=_hidden, for=_SEVKISEK", parsed_as("", "")),
            ("for=unknown;host=example.com", parsed_as("", "example.com")),
            ("for=\"192.0.2.43:_port\"", parsed_as("192.0.2.43:0", "")),
        ] {
            assert_eq!(read(text), expected, "{text}");
        }
    }

    #[test]
    fn ignores_spaces_case_order_quotes_and_empty_parts() {
        let expected = parsed_as("1.2.3.4:5", "a.b");
        for text in [
            "for=1.2.3.4:5;host=a.b",
            " , ,;HOST=\"A.b\" ;\t; fOr=\"1.2.3.4:5\" ;, for=9.9.9.9",
            "host=\"\\a\\.b\";for=\"1.2.3.4:5\";secret=\"a,b;host=c\\\"\"",
            "for=\"1.2.3.4:5\";host=a.b,}{",
        ] {
            assert_eq!(read(text), expected, "{text}");
        }
        assert_eq!(read(""), parsed_as("", ""));
    }

    #[test]
    fn invalid_address_is_absent() {
        for node in [
            "",
            "::1",
            "[::1",
            "[::1]5",
            "[1.2.3.4]:5",
            "1.2.3.4:",
            "1.2.3.4:+5",
            "1.2.3.4:65536",
            "1.2.3:5",
            "1.2.3.4:5:6",
            "[fe80::1%eth0]:5",
            "UNKNOWN",
            "[::1]:",
            "name:5",
        ] {
            let text = format!("for=\"{node}\";host=a");
            assert_eq!(read(&text), parsed_as("", "a"), "{node}");
        }
    }

    #[test]
    fn invalid_host_is_absent() {
        let long = "a".repeat(MAX_HOST_BYTES + 1);
        for host in ["", "a b", "a,b", "a;b", "a\\\"b", "a\\\\b", "a/b", "a%0ab", "a@b", &long] {
            assert_eq!(
                read(&format!("for=1.2.3.4;host=\"{host}\"")),
                parsed_as("1.2.3.4:0", ""),
                "{host}"
            );
        }
    }

    #[test]
    fn rejects_malformed_value() {
        for text in [
            "for",
            "=",
            "=a",
            "for=\"1.2.3.4",
            "for=\"a\\",
            "for=a;for=b",
            "host=a;HOST=b",
            "for=a b",
            "for=\"a\"b",
            "for=a\"b\"",
            "for =a",
            "f(r=a",
            "for=a;x",
        ] {
            assert_eq!(text.parse::<Forwarded>(), Err(HeaderError::Forwarded), "{text}");
        }
        let bytes = HeaderValue::from_bytes(b"for=\xff").unwrap();
        assert_eq!(Forwarded::try_from(&bytes), Err(HeaderError::NotText));
    }
}
