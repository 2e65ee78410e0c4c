//! The `:authority` of a CONNECT request: the destination of the tunnel (RFC 9113 section 8.5).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::error::HboneError;

/// The maximum length of a host name (RFC 1035 section 2.3.4).
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;

/// The destination of a CONNECT request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An IP address and a port.
    Address(SocketAddr),
    /// A host name in lower case, and a port.
    Name {
        /// The host name, which is not resolved.
        host: String,
        /// The port, which is not 0.
        port: u16,
    },
}

impl FromStr for Authority {
    type Err = HboneError;

    fn from_str(text: &str) -> Result<Self, HboneError> {
        parse(text).ok_or_else(|| HboneError::InvalidAuthority { authority: text.into() })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

fn parse(text: &str) -> Option<Authority> {
    let (host, port) = text.rsplit_once(':')?;
    let is_number = !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit());
    let port: u16 = if is_number {
        port.parse().ok()?
    } else {
        return None;
    };
    if port == 0 {
        return None;
    }
    if let Some(v6) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let ip: Ipv6Addr = v6.parse().ok()?;
        return Some(Authority::Address(SocketAddr::from((ip, port))));
    }
    match host.parse() {
        Ok(IpAddr::V4(ip)) => Some(Authority::Address(SocketAddr::from((ip, port)))),
        // RFC 3986 section 3.2.2: an IPv6 address must be in brackets.
        Ok(IpAddr::V6(_)) => None,
        Err(_) => is_name(host).then(|| Authority::Name { host: host.to_ascii_lowercase(), port }),
    }
}

fn is_name(host: &str) -> bool {
    let is_label = |label: &str| {
        let is_allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_');
        (1..=MAX_LABEL_BYTES).contains(&label.len()) && label.bytes().all(is_allowed)
    };
    // Some resolvers read a name with a numeric last label as an IPv4 address: `010.0.0.1`, `10.1`.
    let has_numeric_end =
        host.rsplit('.').next().is_some_and(|last| last.bytes().all(|c| c.is_ascii_digit()));
    host.len() <= MAX_NAME_BYTES && host.split('.').all(is_label) && !has_numeric_end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinguishes_addresses_and_names() {
        let address = |text: &str| Authority::Address(text.parse().unwrap());
        for (text, expected) in [
            ("10.0.1.7:8080", address("10.0.1.7:8080")),
            ("[fd00::7]:8080", address("[fd00::7]:8080")),
            ("[::ffff:10.0.0.1]:1", address("[::ffff:10.0.0.1]:1")),
            (
                "Server.default.svc.cluster.local:80",
                Authority::Name { host: "server.default.svc.cluster.local".to_owned(), port: 80 },
            ),
        ] {
            assert_eq!(text.parse::<Authority>().unwrap(), expected);
            assert_eq!(expected.to_string(), text.to_ascii_lowercase());
        }
    }

    #[test]
    fn rejects_authority_without_host_or_port() {
        for text in [
            "",
            ":",
            ":80",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "10.0.0.1:+80",
            "fd00::7:80",
            "[fd00::7]",
            "[fd00::7]80",
            "[fe80::1%eth0]:80",
            "[10.0.0.1]:80",
            "[]:80",
            "010.0.0.1:80",
            "10.1:80",
            "a..b:80",
            "a b:80",
            "user@host:80",
            "host:80:90",
            "http://a:80",
            "host.:80",
            "host:8 0",
        ] {
            assert!(text.parse::<Authority>().is_err(), "{text}");
        }
        let long = format!("{}:80", vec!["a".repeat(63); 5].join("."));
        long.parse::<Authority>().unwrap_err();
    }
}
