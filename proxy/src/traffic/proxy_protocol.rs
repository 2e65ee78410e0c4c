//! Writes PROXY protocol headers, version 2. They report a connection's addresses and proven
//! identity to a workload that forwards tunnelled connections, such as a waypoint.
//!
//! The proxy never reads such a header: only a peer's certificate proves an identity.
//!
//! Source: HAProxy, "The PROXY protocol", section 2.2.

use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut, Bytes, BytesMut};
use underpass_config::SpiffeId;

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2_PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// The type of the identity field in ztunnel and Istio's waypoints, in the range for private use
/// (section 2.2.8).
const TLV_IDENTITY: u8 = 0xD0;

/// Encodes the header of a connection from `source` to `destination`. `identity` is the client's,
/// proven by its certificate.
///
/// The header has one address family: if the families differ, the IPv4 address is mapped into IPv6.
/// ztunnel declares both addresses unknown in that case.
pub(crate) fn header(
    source: SocketAddr,
    destination: SocketAddr,
    identity: Option<&SpiffeId>,
) -> Bytes {
    let mut body = BytesMut::new();
    let family = put_addresses(&mut body, source, destination);
    if let Some(identity) = identity {
        let text = identity.to_string();
        body.put_u8(TLV_IDENTITY);
        body.put_u16(length(&text));
        body.put_slice(text.as_bytes());
    }
    let mut header = BytesMut::with_capacity(SIGNATURE.len() + 4 + body.len());
    header.put_slice(SIGNATURE);
    header.put_u8(VERSION_2_PROXY);
    header.put_u8(family);
    header.put_u16(length(&body));
    header.put(body);
    header.freeze()
}

/// Appends both addresses and then both ports. Returns the code of their family.
fn put_addresses(body: &mut BytesMut, source: SocketAddr, destination: SocketAddr) -> u8 {
    let family = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.put_slice(&source.octets());
            body.put_slice(&destination.octets());
            TCP_OVER_IPV4
        }
        (source, destination) => {
            for ip in [source, destination] {
                let ip = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                body.put_slice(&ip.octets());
            }
            TCP_OVER_IPV6
        }
    };
    body.put_u16(source.port());
    body.put_u16(destination.port());
    family
}

/// The length always fits: an identity has at most 2048 bytes, the rest 39.
fn length(bytes: impl AsRef<[u8]>) -> u16 {
    u16::try_from(bytes.as_ref().len()).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_to(source: &str, destination: &str, identity: Option<&str>) -> Bytes {
        let identity = identity.map(|text| text.parse().unwrap());
        header(source.parse().unwrap(), destination.parse().unwrap(), identity.as_ref())
    }

    /// The expected bytes are written by hand from the tables of section 2.2.
    #[test]
    fn ipv4_header_matches_standard_and_ztunnel() {
        let identity = "spiffe://cluster.local/ns/a/sa/b";
        let expected = [
            &[0x0D, 0x0A, 0x0D, 0x0A, 0x00, 0x0D, 0x0A, 0x51, 0x55, 0x49, 0x54, 0x0A][..],
            // Version 2, PROXY; TCP over IPv4; 12 + 3 + 32 bytes follow.
            &[0x21, 0x11, 0x00, 0x2F],
            &[10, 1, 2, 3],
            &[192, 168, 0, 254],
            // Ports 41234 and 80.
            &[0xA1, 0x12, 0x00, 0x50],
            &[0xD0, 0x00, 0x20],
            identity.as_bytes(),
        ];
        let written = from_to("10.1.2.3:41234", "192.168.0.254:80", Some(identity));
        assert_eq!(written, expected.concat());
    }

    #[test]
    fn ipv6_header_matches_standard() {
        let mut addresses = [0; 36];
        (addresses[0], addresses[1], addresses[15]) = (0xFD, 0x00, 0x01);
        (addresses[16], addresses[17], addresses[31]) = (0x20, 0x01, 0x02);
        (addresses[33], addresses[34], addresses[35]) = (0x07, 0x1F, 0x90);
        let expected = [SIGNATURE, &[0x21, 0x21, 0x00, 0x24], &addresses].concat();
        assert_eq!(from_to("[fd00::1]:7", "[2001::2]:8080", None), expected);
    }

    #[test]
    fn maps_ipv4_address_into_ipv6_if_families_differ() {
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 10, 0, 0, 1];
        let from_v4 = from_to("10.0.0.1:1", "[fd00::1]:2", None);
        assert_eq!((from_v4[13], &from_v4[16..32]), (0x21, &mapped[..]));
        let to_v4 = from_to("[fd00::1]:2", "10.0.0.1:1", None);
        assert_eq!((to_v4[13], &to_v4[32..48]), (0x21, &mapped[..]));
        assert_eq!((from_v4.len(), to_v4.len()), (52, 52));
    }

    #[test]
    fn writes_mapped_addresses_as_ipv4() {
        let mapped = from_to("[::ffff:10.0.0.1]:1", "[::ffff:10.0.0.2]:2", None);
        assert_eq!(mapped, from_to("10.0.0.1:1", "10.0.0.2:2", None));
        assert_eq!(mapped.len(), 28);
    }

    #[test]
    fn longest_identity_fits_proxy_header() {
        let identity = format!("spiffe://td/{}", "a".repeat(2048 - "spiffe://td/".len()));
        let written = from_to("[fd00::1]:1", "[fd00::2]:2", Some(&identity));
        assert_eq!(written[14..16], [0x08, 0x27]);
        assert_eq!(written[52..55], [0xD0, 0x08, 0x00]);
        assert!(written.ends_with(identity.as_bytes()));
    }
}
