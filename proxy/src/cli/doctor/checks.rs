//! All checks of the doctor, in their order: the host first, then the configured proxy.

mod capabilities;
mod certificates;
mod configuration;
mod control_plane;
mod dns;
mod kernel;
mod namespaces;
mod peers;
mod ports;
mod process;
mod resources;
mod rules;
mod sysctls;

use super::check::Check;

/// All checks.
pub(super) const ALL: &[&dyn Check] = &[
    &kernel::KernelVersion,
    &kernel::KernelRules,
    &sysctls::LocalPorts,
    &sysctls::Backlog,
    &sysctls::ReversePath,
    &sysctls::Ipv6OnLoopback,
    &capabilities::Required,
    &capabilities::Bypass,
    &namespaces::Network,
    &namespaces::Users,
    &rules::LegacyTables,
    &resources::Conntrack,
    &resources::Clock,
    &resources::Disk,
    &resources::OpenFiles,
    &resources::Watches,
    &dns::Servers,
    &configuration::Mistakes,
    &configuration::SameNodeDirect,
    &ports::Free,
    &certificates::Own,
    &certificates::Trusted,
    &rules::Installed,
    &rules::Foreign,
    &rules::Leftovers,
    &rules::SelfTest,
    &dns::Names,
    &control_plane::State,
    &peers::Handshakes,
    &process::Version,
    &process::Ready,
    &process::Reported,
    &process::DescriptorsInUse,
    &process::FailedConnections,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const DOCUMENT: &str = include_str!("../../../../docs/troubleshooting.md");

    #[test]
    fn every_check_has_section_and_every_section_a_check() {
        let ids: Vec<_> = ALL.iter().map(|check| check.info().id).collect();
        let known: BTreeSet<_> = ids.iter().copied().collect();
        assert_eq!(ids.len(), known.len(), "an id occurs twice: {ids:?}");
        let (_, checks) = DOCUMENT.split_once("\n## Checks\n").unwrap();
        let checks = checks.split("\n## ").next().unwrap();
        let sections: BTreeSet<_> =
            checks.lines().filter_map(|line| line.strip_prefix("### ")).collect();
        assert_eq!(sections, known);
    }

    #[test]
    fn checks_of_one_category_follow_each_other() {
        let mut categories: Vec<_> = ALL.iter().map(|check| check.info().category).collect();
        categories.dedup();
        let titles: BTreeSet<_> = categories.iter().map(|category| category.title()).collect();
        assert_eq!(titles.len(), categories.len(), "{categories:?}");
    }
}
