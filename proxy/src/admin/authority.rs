//! Checks the host that a request names, against DNS rebinding.
//!
//! A web page can make its own name resolve to 127.0.0.1, and then read answers through a browser
//! on this host. Such a request names the page's host.

use std::net::IpAddr;

use http::request::Parts;
use http::{StatusCode, header};

use crate::admin::answer::Refusal;

/// Refuses a request whose host is neither `localhost` nor an address.
pub(super) fn check(request: &Parts) -> Result<(), Refusal> {
    let mut headers = request.headers.get_all(header::HOST).iter();
    let in_header = headers.next().and_then(|host| host.to_str().ok());
    let has_more = headers.next().is_some();
    let in_target = request.uri.authority().map(http::uri::Authority::as_str);
    match in_header {
        Some(host) if !has_more && is_local(host) && in_target.is_none_or(is_local) => Ok(()),
        _ => Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "the Host of the request must be localhost or an address, such as 127.0.0.1:15000",
        )),
    }
}

fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    match address {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            name.eq_ignore_ascii_case("localhost")
                || name.parse::<IpAddr>().is_ok_and(|address| address.is_ipv4())
        }
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn check_hosts(target: &str, hosts: &[&str]) -> bool {
        let mut request = Request::get(target);
        for host in hosts {
            request = request.header(header::HOST, *host);
        }
        check(&request.body(()).unwrap().into_parts().0).is_ok()
    }

    #[test]
    fn only_localhost_and_addresses_are_accepted_as_host() {
        for host in [
            "localhost",
            "LOCALHOST:15000",
            "127.0.0.1",
            "127.0.0.1:15000",
            "[::1]:15000",
            "[::1]",
            "10.0.0.1:1",
        ] {
            assert!(check_hosts("/version", &[host]), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:15000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "::1",
            "[localhost]",
            "127.0.0.1@evil.example",
            "evil.example#127.0.0.1",
        ] {
            assert!(!check_hosts("/version", &[host]), "{host}");
        }
    }

    #[test]
    fn missing_repeated_or_contradicting_host_is_refused() {
        assert!(!check_hosts("/version", &[]));
        assert!(!check_hosts("/version", &["localhost", "localhost"]));
        assert!(!check_hosts("http://evil.example/version", &["localhost"]));
        assert!(check_hosts("http://localhost:15000/version", &["localhost:15000"]));
    }
}
