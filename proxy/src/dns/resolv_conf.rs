//! The resolver settings of a pod: the format of resolv.conf(5).

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use underpass_config::MAX_NAME_SERVERS;

/// The port of DNS servers.
pub(super) const PORT: u16 = 53;
/// The limits of glibc (resolv.h: `RES_MAXRETRANS`, `RES_MAXRETRY`), so that an
/// application waits no longer than without the proxy.
const MAX_TIMEOUT: u64 = 30;
const MAX_ATTEMPTS: usize = 5;
/// More than Kubernetes allows (32), so that none is ignored there.
const MAX_SEARCH: usize = 64;

/// The resolver settings of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResolvConf {
    /// The servers, in order of preference.
    pub(super) servers: Vec<SocketAddr>,
    /// The search path, in lower case without final dots.
    pub(super) search: Vec<String>,
    /// How long to wait for a server before the next one is asked.
    pub(super) timeout: Duration,
    /// How often each server is asked.
    pub(super) attempts: usize,
    /// Whether the servers are asked in turn.
    pub(super) rotate: bool,
    /// Whether all queries use TCP.
    pub(super) use_tcp: bool,
}

impl Default for ResolvConf {
    /// The defaults of resolv.conf(5), without a server.
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            search: Vec::new(),
            timeout: Duration::from_secs(5),
            attempts: 2,
            rotate: false,
            use_tcp: false,
        }
    }
}

impl ResolvConf {
    /// Reads the content of a file. Like the resolvers of applications, ignores what it does not
    /// understand.
    pub(super) fn read(text: &str) -> Self {
        let mut settings = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    if let Some(server) = words.next().and_then(server) {
                        settings.add_server(server);
                    }
                }
                // The last of several lines counts.
                Some("search" | "domain") => {
                    settings.search.clear();
                    words.for_each(|domain| settings.add_search(domain));
                }
                Some("options") => words.for_each(|option| settings.set(option)),
                _ => {}
            }
        }
        settings
    }

    /// Whether every server is on the loopback interface.
    pub(super) fn is_loopback_only(&self) -> bool {
        !self.servers.is_empty() && self.servers.iter().all(|server| server.ip().is_loopback())
    }

    /// Adds a server after the others, unless there are enough.
    pub(super) fn add_server(&mut self, server: SocketAddr) {
        if self.servers.len() < MAX_NAME_SERVERS && !self.servers.contains(&server) {
            self.servers.push(server);
        }
    }

    /// Adds a domain to the end of the search path.
    pub(super) fn add_search(&mut self, domain: &str) {
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        let is_new = !domain.is_empty() && !self.search.contains(&domain);
        if is_new && self.search.len() < MAX_SEARCH {
            self.search.push(domain);
        }
    }

    /// Sets an option, such as `timeout:1`. Ignores those of other programs.
    pub(super) fn set(&mut self, option: &str) {
        let (name, value) = option.split_once(':').unwrap_or((option, ""));
        match (name, value.parse::<usize>()) {
            ("timeout", Ok(seconds)) => {
                let seconds = u64::try_from(seconds).unwrap_or(MAX_TIMEOUT);
                self.timeout = Duration::from_secs(seconds.clamp(1, MAX_TIMEOUT));
            }
            ("attempts", Ok(attempts)) => self.attempts = attempts.clamp(1, MAX_ATTEMPTS),
            ("rotate", _) => self.rotate = true,
            ("use-vc", _) => self.use_tcp = true,
            _ => {}
        }
    }
}

/// The address of a server. A link-local address may have the index of an interface as its scope.
fn server(text: &str) -> Option<SocketAddr> {
    let Some((address, scope)) = text.split_once('%') else {
        let address: IpAddr = text.parse().ok()?;
        return Some(SocketAddr::new(address.to_canonical(), PORT));
    };
    let (address, scope): (Ipv6Addr, u32) = (address.parse().ok()?, scope.parse().ok()?);
    Some(SocketAddrV6::new(address, PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_servers_search_path_and_options() {
        let read = ResolvConf::read(
            "# made by kubelet\nsearch Default.svc.cluster.local. svc.cluster.local\n\
             nameserver 10.96.0.10\nnameserver fd00::a\nnameserver fe80::1%2\nnameserver 10.0.0.9\n\
             options ndots:5 timeout:3 attempts:4 rotate use-vc edns0\n",
        );
        let servers = read.servers.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(servers, ["10.96.0.10:53", "[fd00::a]:53", "[fe80::1%2]:53"]);
        assert_eq!(read.search, ["default.svc.cluster.local", "svc.cluster.local"]);
        assert_eq!((read.timeout, read.attempts), (Duration::from_secs(3), 4));
        assert!(read.rotate && read.use_tcp);
    }

    #[test]
    fn ignores_what_it_does_not_understand_and_bounds_the_rest() {
        let read = ResolvConf::read(
            "nameserver\nnameserver x\nnameserver fe80::1%eth0\nfoo bar\nsearch .\n\
             options timeout:0 attempts:99 timeout:x :\n",
        );
        let expected =
            ResolvConf { timeout: Duration::from_secs(1), attempts: 5, ..ResolvConf::default() };
        assert_eq!(read, expected);
        let long = ResolvConf::read("options timeout:4000000000");
        assert_eq!(long.timeout, Duration::from_secs(30));
    }
}
