//! Names the owner of rules: its role, and when it started.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use underpass_config::Profile;
use underpass_interception::Ports;

/// What two proxies of one network namespace have to have in common: `profile sidecar ports 15001
/// 15006 15008`.
pub(crate) fn role(profile: Profile, ports: Ports) -> String {
    let Ports { outbound, inbound, hbone, .. } = ports;
    format!("profile {profile} ports {outbound} {inbound} {hbone}")
}

/// When this process started to own rules, in seconds since 1970: one value for the mark in the table
/// and for the answers of `instance.rs`.
pub(crate) fn started() -> u64 {
    static STARTED: OnceLock<u64> = OnceLock::new();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    *STARTED.get_or_init(now)
}
