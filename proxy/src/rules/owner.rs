//! The owner of rules: a proxy's role and start time.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use underpass_config::Profile;
use underpass_interception::Ports;

/// The role of a proxy in the owner mark of its rules: `profile sidecar ports 15001 15006 15008`.
pub(crate) fn role(profile: Profile, ports: Ports) -> String {
    let Ports { outbound, inbound, hbone, .. } = ports;
    format!("profile {profile} ports {outbound} {inbound} {hbone}")
}

/// The time at which this process became the owner of rules, in seconds since 1970. The owner mark
/// of the rules and the answers of `instance.rs` contain it.
pub(crate) fn started() -> u64 {
    static STARTED: OnceLock<u64> = OnceLock::new();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    *STARTED.get_or_init(now)
}
