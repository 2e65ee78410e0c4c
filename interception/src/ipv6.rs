//! Whether the kernel has IPv6, and where a network namespace has it enabled.
//!
//! `disable_ipv6` may be written at any time, so nothing that keeps traffic from leaving in plain
//! may depend on it: rules and listeners of IPv6 exist wherever the kernel has IPv6. Only the
//! routes and addresses of a loopback interface cannot, while IPv6 is disabled there. Until they
//! exist the workload's IPv6 goes nowhere: its connections are redirected to ::1, which takes no
//! packet.
//!
//! Not here: what is done about IPv6 traffic. That is a setting.

use std::fs;
use std::path::Path;

use crate::Entered;

/// One directory for each interface, and `default` for those to come. `/proc/sys/net` shows the
/// namespace of the thread that reads it. Absent when the kernel has no IPv6, or was started with
/// `ipv6.disable=1`.
const INTERFACES: &str = "/proc/sys/net/ipv6/conf";

/// Whether the kernel has IPv6, be it disabled on every interface.
#[must_use]
pub fn ipv6_available() -> bool {
    Path::new(INTERFACES).exists()
}

/// Whether the kernel takes IPv6 routes through the loopback interface, and addresses of it, now.
pub(crate) fn on_loopback(_: &Entered) -> bool {
    let switch = Path::new(INTERFACES).join("lo/disable_ipv6");
    fs::read_to_string(switch).is_ok_and(|value| value.trim() == "0")
}
