//! Kernel settings by which clients cannot reach a proxy that TPROXY leads them to.
//!
//! A packet whose mark leads to the table with `local default` is looked up again, from its source
//! (`__fib_validate_source`, net/ipv4/fib_frontend.c). Without the mark, which is the kernel's
//! default, that goes as ever. With it (`src_valid_mark`, as WireGuard's wg-quick sets it) every
//! client is found to be local, and its packets are dropped whatever `rp_filter` says, unless
//! `accept_local` is set. IPv6 has no such look. Not here: what this process sends over loopback,
//! which brings its route along and is not looked up again.

use std::fs;
use std::path::Path;

use underpass_config::{InboundMode, InterceptionSettings, Profile};

use crate::{Entered, InterceptionError};

const INTERFACES: &str = "/proc/sys/net/ipv4/conf";

/// Refuses TPROXY where some interface would let nobody in.
///
/// # Errors
///
/// [`InterceptionError::ClientsRefused`].
pub fn check_reverse_path(
    _: &Entered,
    settings: &InterceptionSettings,
) -> Result<(), InterceptionError> {
    let tproxy =
        settings.profile == Profile::Sidecar && settings.inbound.mode == InboundMode::Tproxy;
    let interfaces = fs::read_dir(INTERFACES).into_iter().flatten().flatten();
    let names = interfaces.filter_map(|interface| interface.file_name().into_string().ok());
    let mut outer = names.filter(|name| !matches!(&**name, "all" | "default" | "lo"));
    match outer.find(|interface| tproxy && refuses(interface)) {
        Some(interface) => Err(InterceptionError::ClientsRefused { interface }),
        None => Ok(()),
    }
}

fn refuses(interface: &str) -> bool {
    // Of both settings, either one's own or that of all counts (IN_DEV_ORCONF).
    let is_set = |setting: &str| [interface, "all"].iter().any(|of| is_one(of, setting));
    is_set("src_valid_mark") && !is_set("accept_local")
}

fn is_one(interface: &str, setting: &str) -> bool {
    let file = Path::new(INTERFACES).join(interface).join(setting);
    fs::read_to_string(file).is_ok_and(|value| value.trim() == "1")
}
