//! Facts about the kernel, the network namespace and this process that decide whether a proxy can
//! run here. Reading them changes nothing.
//!
//! `running_process` reads facts about another process, `disk` about a file system, and `ports`
//! about the sockets that listen.

pub(crate) mod disk;
pub(crate) mod ports;
pub(crate) mod running_process;

use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use caps::CapSet;
use nix::sys::resource::{Resource, getrlimit};
use underpass_config::InterceptionSettings;

use crate::backend::leftovers::legacy_tables;
use crate::namespace::ipv6::{ipv6_available, on_loopback};
use crate::namespace::reverse_path::{dropping_interface, uses_tproxy};
use crate::namespace::{Entered, host};
use crate::plan::{Environment, Family};

/// Facts about a network namespace, its host, and this process. A value that the kernel does not
/// show is `None` or empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// The kernel's release, such as `6.18.44-generic`.
    pub release: String,
    /// The kernel's major and minor version.
    pub kernel: Option<(u32, u32)>,
    /// The reason why this is, or may be, the host's own network namespace.
    pub host_network: Option<String>,
    /// The names of the interfaces that are up.
    pub interfaces: Vec<String>,
    /// The effective capabilities of this process, without `CAP_`, sorted.
    pub capabilities: Vec<String>,
    /// The tracked connections of the network namespace, and their limit.
    pub conntrack: Option<Usage>,
    /// The first and the last local port of outgoing connections.
    pub local_ports: Option<(u16, u16)>,
    /// The maximum number of connections that wait for an accept (`net.core.somaxconn`).
    pub backlog: Option<u32>,
    /// The IPv6 support of the kernel and of the loopback interface.
    pub ipv6: Ipv6Support,
    /// An interface on which the kernel drops inbound connections that TPROXY marks.
    pub drops_tproxy: Option<String>,
    /// The existing tables of legacy iptables, such as `nat` and `nat (IPv6)`.
    pub legacy_tables: Vec<String>,
    /// The soft and the hard limit of open files of this process.
    pub open_files: Option<(u64, u64)>,
    /// The time of the hardware clock, read as UTC.
    pub hardware_clock: Option<SystemTime>,
    /// The time at which the program file of this process was written.
    pub program_written: Option<SystemTime>,
}

/// The use of a limited resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The used amount.
    pub used: u64,
    /// The limit.
    pub limit: u64,
}

impl Usage {
    /// The used part in percent; 100 for a limit of zero.
    #[must_use]
    pub fn percent(self) -> u64 {
        self.used.saturating_mul(100).checked_div(self.limit).unwrap_or(100)
    }
}

/// The support of IPv6.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ipv6Support {
    /// The kernel has no IPv6.
    #[default]
    Absent,
    /// The kernel has IPv6, but the loopback interface does not.
    DisabledOnLoopback,
    /// IPv6 works on the loopback interface.
    Enabled,
}

impl HostFacts {
    /// Reads the facts of the entered namespace.
    #[must_use]
    pub fn read(entered: &Entered) -> Self {
        let release = host::release();
        let interfaces = Environment::of(entered).map(|environment| environment.interfaces);
        let interfaces = interfaces.unwrap_or_default().into_iter();
        Self {
            kernel: host::version(&release),
            host_network: host::evidence(entered),
            interfaces: interfaces.map(|interface| interface.name).collect(),
            capabilities: capabilities(),
            conntrack: conntrack_usage(),
            local_ports: local_ports(entered),
            backlog: number("/proc/sys/net/core/somaxconn"),
            ipv6: ipv6_support(entered),
            drops_tproxy: dropping_interface(entered),
            legacy_tables: all_legacy_tables(entered),
            open_files: getrlimit(Resource::RLIMIT_NOFILE).ok(),
            hardware_clock: number("/sys/class/rtc/rtc0/since_epoch").map(since_epoch),
            program_written: fs::metadata("/proc/self/exe").and_then(|file| file.modified()).ok(),
            release,
        }
    }

    /// Returns true if this process has the capability.
    #[must_use]
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|one| one == capability)
    }

    /// Returns true if the kernel drops inbound connections of these settings, because it validates
    /// the source of marked packets.
    #[must_use]
    pub fn drops_inbound(&self, settings: &InterceptionSettings) -> bool {
        uses_tproxy(settings) && self.drops_tproxy.is_some()
    }
}

fn capabilities() -> Vec<String> {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    let name =
        |capability: caps::Capability| capability.to_string().trim_start_matches("CAP_").to_owned();
    let mut names: Vec<_> = held.into_iter().map(name).collect();
    names.sort();
    names
}

/// The tracked connections of the calling thread's network namespace, and their limit, which is
/// that of the host. `None` if the kernel does not track connections.
#[must_use]
pub fn conntrack_usage() -> Option<Usage> {
    const FOLDER: &str = "/proc/sys/net/netfilter";
    let read = |name: &str| number(Path::new(FOLDER).join(name));
    Some(Usage { used: read("nf_conntrack_count")?, limit: read("nf_conntrack_max")? })
}

fn local_ports(_: &Entered) -> Option<(u16, u16)> {
    let text = read("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ports = text.split_whitespace().map(str::parse);
    Some((ports.next()?.ok()?, ports.next()?.ok()?))
}

fn ipv6_support(entered: &Entered) -> Ipv6Support {
    match (ipv6_available(), on_loopback(entered)) {
        (false, _) => Ipv6Support::Absent,
        (true, false) => Ipv6Support::DisabledOnLoopback,
        (true, true) => Ipv6Support::Enabled,
    }
}

fn all_legacy_tables(entered: &Entered) -> Vec<String> {
    let v6 = legacy_tables(entered, Family::V6).into_iter().map(|table| format!("{table} (IPv6)"));
    legacy_tables(entered, Family::V4).into_iter().chain(v6).collect()
}

fn since_epoch(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn number<T: FromStr>(path: impl AsRef<Path>) -> Option<T> {
    read(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_a_percentage_of_the_limit() {
        let percent = |used, limit| Usage { used, limit }.percent();
        assert_eq!([percent(0, 10), percent(9, 10), percent(3, 0)], [0, 90, 100]);
        assert_eq!(percent(u64::MAX, u64::MAX), 1, "saturates instead of overflowing");
    }
}
