//! Rejects TPROXY where kernel settings would drop all inbound connections.
//!
//! The kernel validates the source of a packet whose mark selects the table with `local default`
//! (`__fib_validate_source`, net/ipv4/fib_frontend.c). By default, this validation ignores the
//! mark. With `src_valid_mark`, which wg-quick of WireGuard sets, it uses the mark and considers
//! every client local. It then drops the packet regardless of `rp_filter`, unless `accept_local` is
//! set. IPv6 has no such validation. Packets that this process sends over loopback carry their
//! route and are not validated.

use std::fs;
use std::path::Path;

use underpass_config::{InboundMode, InterceptionSettings, Profile};

use crate::error::InterceptionError;
use crate::namespace::Entered;

const INTERFACES: &str = "/proc/sys/net/ipv4/conf";

/// Rejects TPROXY if an interface would drop inbound connections.
///
/// # Errors
///
/// [`InterceptionError::InboundDropped`].
pub(crate) fn check_reverse_path(
    entered: &Entered,
    settings: &InterceptionSettings,
) -> Result<(), InterceptionError> {
    match uses_tproxy(settings).then(|| dropping_interface(entered)).flatten() {
        Some(interface) => Err(InterceptionError::InboundDropped { interface }),
        None => Ok(()),
    }
}

/// Whether TPROXY captures inbound connections.
pub(crate) fn uses_tproxy(settings: &InterceptionSettings) -> bool {
    settings.profile == Profile::Sidecar && settings.inbound.mode == InboundMode::Tproxy
}

/// An interface that would drop inbound connections that TPROXY marks.
pub(crate) fn dropping_interface(_: &Entered) -> Option<String> {
    let interfaces = fs::read_dir(INTERFACES).into_iter().flatten().flatten();
    let names = interfaces.filter_map(|interface| interface.file_name().into_string().ok());
    let mut outer = names.filter(|name| !matches!(&**name, "all" | "default" | "lo"));
    outer.find(|interface| drops_inbound(interface))
}

fn drops_inbound(interface: &str) -> bool {
    // The setting of the interface or of `all` is enough (IN_DEV_ORCONF).
    let is_set = |setting: &str| [interface, "all"].iter().any(|of| is_one(of, setting));
    is_set("src_valid_mark") && !is_set("accept_local")
}

fn is_one(interface: &str, setting: &str) -> bool {
    let file = Path::new(INTERFACES).join(interface).join(setting);
    fs::read_to_string(file).is_ok_and(|value| value.trim() == "1")
}
