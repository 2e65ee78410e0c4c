//! Detects whether the kernel supports IPv6, and whether a network namespace has it enabled.
//!
//! `disable_ipv6` can change at any time, so protection against plaintext must not depend on it:
//! IPv6 rules and listeners exist wherever the kernel supports IPv6. Only the IPv6 routes and
//! addresses of the loopback interface need it enabled. Without them, the workload's IPv6
//! connections are redirected to ::1 and fail.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::namespace::Entered;

/// Contains a directory for each interface, and `default` for future interfaces. Shows the
/// namespace of the reading thread. Missing if the kernel lacks IPv6, or was started with
/// `ipv6.disable=1`.
const INTERFACES: &str = "/proc/sys/net/ipv6/conf";

/// Returns true if the kernel supports IPv6, even if it is disabled on every interface.
#[must_use]
pub fn ipv6_available() -> bool {
    // The kernel can gain IPv6, but never unloads it: the module has no exit function
    // (net/ipv6/af_inet6.c). A lookup below /proc/sys/net takes longer the more namespaces exist.
    static FOUND: AtomicBool = AtomicBool::new(false);
    if FOUND.load(Relaxed) {
        return true;
    }
    let found = Path::new(INTERFACES).exists();
    FOUND.store(found, Relaxed);
    found
}

/// Returns true if the kernel currently accepts IPv6 routes and addresses on the loopback
/// interface.
pub(crate) fn on_loopback(_: &Entered) -> bool {
    is_enabled_on_loopback()
}

/// Returns true if the kernel supports IPv6, and the loopback interface of the calling thread's
/// network namespace does not accept it.
#[must_use]
pub fn is_ipv6_disabled_on_loopback() -> bool {
    ipv6_available() && !is_enabled_on_loopback()
}

fn is_enabled_on_loopback() -> bool {
    let switch = Path::new(INTERFACES).join("lo/disable_ipv6");
    fs::read_to_string(switch).is_ok_and(|value| value.trim() == "0")
}
