//! Detects whether the kernel supports IPv6, and whether a network namespace has it enabled.
//!
//! `disable_ipv6` can change at any time. So protection against plaintext must not depend on it:
//! IPv6 rules and listeners exist wherever the kernel supports IPv6. Only routes and addresses of
//! the loopback interface need IPv6 to be enabled there. Without them, the workload's IPv6
//! connections are redirected to ::1 and fail.

use std::fs;
use std::path::Path;

use crate::namespace::Entered;

/// One directory per interface, and `default` for future ones. `/proc/sys/net` shows the namespace
/// of the reading thread. Absent without IPv6 in the kernel, or with `ipv6.disable=1`.
const INTERFACES: &str = "/proc/sys/net/ipv6/conf";

/// Returns true if the kernel supports IPv6, even if it is disabled on every interface.
#[must_use]
pub fn ipv6_available() -> bool {
    Path::new(INTERFACES).exists()
}

/// Returns true if the kernel currently accepts IPv6 routes and addresses on the loopback
/// interface.
pub(crate) fn on_loopback(_: &Entered) -> bool {
    let switch = Path::new(INTERFACES).join("lo/disable_ipv6");
    fs::read_to_string(switch).is_ok_and(|value| value.trim() == "0")
}
