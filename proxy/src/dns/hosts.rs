//! The names that /etc/hosts has addresses for (hosts(5)).

use std::net::IpAddr;

/// The addresses of `hostname` in the content of the file.
pub(super) fn addresses(text: &str, hostname: &str) -> Vec<IpAddr> {
    let hostname = hostname.strip_suffix('.').unwrap_or(hostname);
    let address = |line: &str| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let address = words.next()?.parse::<IpAddr>().ok()?;
        words.any(|name| name.eq_ignore_ascii_case(hostname)).then(|| address.to_canonical())
    };
    text.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_all_addresses_of_names_and_aliases() {
        let text = "127.0.0.1 localhost # a.example\n\
                    10.0.0.1\ta.example  Alias\n::1 localhost\nx a.example\nfd00::1 alias\n";
        let found = |name| {
            addresses(text, name).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(found("localhost"), "127.0.0.1 ::1");
        assert_eq!(found("A.example."), "10.0.0.1");
        assert_eq!(found("alias"), "10.0.0.1 fd00::1");
        assert_eq!(found("example"), "");
    }
}
