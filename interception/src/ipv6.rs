//! Whether the calling thread's network namespace has IPv6.
//!
//! Not here: what is done about IPv6 traffic. That is a setting.

use std::fs;
use std::path::Path;

/// One directory for each interface, and `default` for those to come. `/proc/sys/net` shows the
/// reader's own namespace. Absent when the kernel has no IPv6, or was started with
/// `ipv6.disable=1`.
const INTERFACES: &str = "/proc/sys/net/ipv6/conf";

/// Whether any IPv6 packet can be sent or received here.
///
/// `all` does not count: writing it sets the interfaces, but an interface may be enabled again
/// after that, and traffic that could flow must be caught.
#[must_use]
pub fn ipv6_available() -> bool {
    let Ok(interfaces) = fs::read_dir(INTERFACES) else {
        return false;
    };
    interfaces
        .flatten()
        .filter(|interface| interface.file_name() != "all")
        .any(|interface| enabled(&interface.path()))
}

/// Whether the kernel takes IPv6 routes through the loopback interface.
pub(crate) fn on_loopback() -> bool {
    enabled(&Path::new(INTERFACES).join("lo"))
}

/// Whether the kernel knows IPv6 at all, be it disabled everywhere.
pub(crate) fn known() -> bool {
    Path::new(INTERFACES).exists()
}

fn enabled(interface: &Path) -> bool {
    fs::read_to_string(interface.join("disable_ipv6")).is_ok_and(|value| value.trim() == "0")
}
