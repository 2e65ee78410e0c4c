//! Sysctls of the network namespace that limit connections or break interception.

use underpass_config::{Ipv6, Profile};
use underpass_interception::{InterceptionError, Ipv6Support};

use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome, at_once};
use crate::cli::doctor::subject::Subject;

/// Fewer ports limit the connections to one destination.
const MIN_PORTS: u16 = 10_000;
/// The backlog that the proxy requests for its listeners.
const MIN_BACKLOG: u32 = 1024;

/// The range of local ports.
pub(super) struct LocalPorts;

impl Check for LocalPorts {
    fn info(&self) -> Info {
        Info::host("sysctl-local-ports", Category::Sysctls)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(subject.facts.local_ports.map(|(first, last)| local_ports(first, last)))
    }
}

fn local_ports(first: u16, last: u16) -> Finding {
    let ports = last.saturating_sub(first).saturating_add(1);
    let message = format!("{ports} local ports for outgoing connections, {first} to {last}");
    if ports >= MIN_PORTS {
        return Finding::ok(message);
    }
    Finding::warning(format!("only {message}"))
        .hint("widen the range: each open connection to one destination needs a port")
        .command("sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\"")
}

/// The queue of connections that wait for an accept.
pub(super) struct Backlog;

impl Check for Backlog {
    fn info(&self) -> Info {
        Info::host("sysctl-backlog", Category::Sysctls)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(subject.facts.backlog.map(backlog))
    }
}

fn backlog(length: u32) -> Finding {
    let message = format!("net.core.somaxconn is {length}");
    if length >= MIN_BACKLOG {
        return Finding::ok(message);
    }
    Finding::warning(format!("{message}: bursts of connections are dropped by the kernel"))
        .command("sysctl -w net.core.somaxconn=4096")
}

/// The validation of the source of marked packets.
pub(super) struct ReversePath;

impl Check for ReversePath {
    fn info(&self) -> Info {
        Info::host("sysctl-reverse-path", Category::Sysctls)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let facts = &subject.facts;
        let dropping = facts.drops_tproxy.clone();
        let dropping = dropping.filter(|_| facts.drops_inbound(&subject.settings.interception));
        at_once(match dropping {
            Some(interface) => {
                // With slashes, the name of the interface may contain a dot.
                let own = format!("net/ipv4/conf/{interface}/src_valid_mark=0");
                let command = format!("sysctl -w net/ipv4/conf/all/src_valid_mark=0 {own}");
                Finding::of_error(&InterceptionError::InboundDropped { interface }).command(command)
            }
            None => Finding::ok("the kernel delivers packets that the rules mark"),
        })
    }
}

/// IPv6 on the loopback interface.
pub(super) struct Ipv6OnLoopback;

impl Check for Ipv6OnLoopback {
    fn info(&self) -> Info {
        Info::host("sysctl-ipv6", Category::Sysctls)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let interception = &subject.settings.interception;
        let captures = interception.ipv6 == Ipv6::Capture && interception.profile != Profile::None;
        at_once(ipv6(subject.facts.ipv6, captures))
    }
}

fn ipv6(support: Ipv6Support, captures: bool) -> Finding {
    match support {
        Ipv6Support::Enabled => Finding::ok("IPv6 works on the loopback interface"),
        Ipv6Support::Absent => Finding::ok("the kernel has no IPv6: only IPv4 is captured"),
        Ipv6Support::DisabledOnLoopback if captures => Finding::warning(
            "IPv6 is disabled on the loopback interface: captured IPv6 connections fail",
        )
        .hint("enable it, or set interception.ipv6: reject so that clients use IPv4 at once")
        .command("sysctl -w net.ipv6.conf.lo.disable_ipv6=0"),
        Ipv6Support::DisabledOnLoopback => {
            Finding::ok("IPv6 is disabled on the loopback interface, and is not captured")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::check::Level;

    #[test]
    fn warns_of_few_ports_and_of_short_backlog() {
        assert_eq!(local_ports(32_768, 60_999).level, Level::Ok);
        let few = local_ports(60_000, 60_999);
        assert!(few.level == Level::Warning && few.message.contains("1000"), "{few:?}");
        assert_eq!(local_ports(0, u16::MAX).level, Level::Ok);
        assert_eq!([backlog(4096).level, backlog(128).level], [Level::Ok, Level::Warning]);
    }

    #[test]
    fn disabled_ipv6_matters_only_if_it_is_captured() {
        use Ipv6Support::{Absent, DisabledOnLoopback, Enabled};
        let level = |support, captures| ipv6(support, captures).level;
        assert_eq!(level(DisabledOnLoopback, true), Level::Warning);
        for (support, captures) in [(Absent, true), (Enabled, true), (DisabledOnLoopback, false)] {
            assert_eq!(level(support, captures), Level::Ok);
        }
    }
}
