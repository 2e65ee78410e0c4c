//! Formats numbers and addresses into strings without `std::fmt`, whose formatting of the headers
//! took a tenth of the instructions of a new connection.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};

/// The longest text of a socket address: an IPv6 address, brackets, a colon and a port.
const MAX_ADDRESS_BYTES: usize = 47;

const HEX_DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The text of a socket address, as [`SocketAddr`] is displayed.
pub fn socket_address_text(address: SocketAddr) -> String {
    let mut text = String::with_capacity(MAX_ADDRESS_BYTES);
    push_socket_address(&mut text, address);
    text
}

pub(super) fn push_socket_address(text: &mut String, address: SocketAddr) {
    match address {
        SocketAddr::V4(address) => {
            push_ipv4(text, *address.ip());
            text.push(':');
            push_decimal(text, address.port());
        }
        // Writing to a string cannot fail.
        SocketAddr::V6(address) => _ = write!(text, "{address}"),
    }
}

pub(super) fn push_ipv4(text: &mut String, ip: Ipv4Addr) {
    let [first, rest @ ..] = ip.octets();
    push_decimal(text, first.into());
    for octet in rest {
        text.push('.');
        push_decimal(text, octet.into());
    }
}

fn push_decimal(text: &mut String, number: u16) {
    if number >= 10 {
        push_decimal(text, number / 10);
    }
    push_digit(text, usize::from(number % 10));
}

/// Appends two hexadecimal digits for each byte.
pub(super) fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        push_digit(text, usize::from(byte >> 4));
        push_digit(text, usize::from(byte & 0xf));
    }
}

fn push_digit(text: &mut String, digit: usize) {
    text.push(HEX_DIGITS.get(digit).copied().unwrap_or_default().into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_text_equals_its_display() {
        for address in [
            "0.0.0.0:0",
            "9.10.99.100:9",
            "255.200.109.1:65535",
            "127.0.0.1:10000",
            "[::1]:80",
            "[::ffff:10.0.0.1]:1",
            "[2001:db8:1111:2222:3333:4444:5555:6666]:65535",
        ] {
            let parsed: SocketAddr = address.parse().unwrap();
            let text = socket_address_text(parsed);
            assert_eq!((text.as_str(), text.len() <= MAX_ADDRESS_BYTES), (address, true));
        }
    }

    #[test]
    fn hexadecimal_digits_are_padded() {
        let mut text = String::new();
        push_hex(&mut text, &[0, 0x0a, 0xbc]);
        push_hex(&mut text, &u64::MAX.to_be_bytes());
        assert_eq!(text, format!("000abc{:016x}", u64::MAX));
    }
}
