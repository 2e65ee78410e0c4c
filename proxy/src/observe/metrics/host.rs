//! Metrics of the host and of the program, which a scrape reads.

use underpass_interception::{
    conntrack_usage, is_ipv6_disabled_on_loopback, is_own_program_replaced,
};

use super::exposition::{Kind, Page};

const CONNTRACK: &str = "underpass_conntrack_entries";
const CONNTRACK_LIMIT: &str = "underpass_conntrack_entries_limit";
const REPLACED: &str = "underpass_program_replaced";
const IPV6_DISABLED: &str = "underpass_loopback_ipv6_disabled";

/// Appends the metrics of the network namespace and of the program file of this process.
pub(super) fn render(page: &mut Page) {
    let conntrack = conntrack_usage();
    let flag = |is_set: bool| Some(u64::from(is_set));
    let gauges = [
        (CONNTRACK, "Tracked connections of the network namespace.", conntrack.map(|all| all.used)),
        (CONNTRACK_LIMIT, "Limit of tracked connections.", conntrack.map(|all| all.limit)),
        (
            REPLACED,
            "Whether the program file was replaced after the start: 1, or 0.",
            flag(is_own_program_replaced()),
        ),
        (
            IPV6_DISABLED,
            "Whether IPv6 is disabled on the loopback interface: 1, or 0.",
            flag(is_ipv6_disabled_on_loopback()),
        ),
    ];
    for (name, help, value) in gauges {
        if let Some(value) = value {
            page.family(name, Kind::Gauge, help);
            page.line(format_args!("{name} {value}"));
        }
    }
}
