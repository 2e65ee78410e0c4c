//! One installation of the rules: what is checked before, in which order it is done, and how it is
//! undone.
//!
//! Not here: the rules (`plan.rs`) and the sockets that fit them (`socket.rs`). Everything acts on
//! the network namespace of the thread that calls.

use std::fs;

use underpass_config::{InterceptionSettings, Ipv6, Profile};

use crate::nftables::{self, RuleCounter};
use crate::plan::{Families, Ports, RulePlan};
use crate::{InterceptionError, host, ipv6_available, routes};

/// Interception that has been checked and can be installed.
#[derive(Debug, Clone)]
pub struct Interception {
    plan: RulePlan,
    ipv6_absent: bool,
}

impl Interception {
    /// Checks whether and how the rules can be installed here, and changes nothing. `None` for the
    /// profile without rules.
    ///
    /// # Errors
    ///
    /// In this order: the capability NET_ADMIN is missing, this is the host's own namespace (and
    /// `allow_host` is off), the kernel has no nf_tables.
    pub async fn prepare(
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> Result<Option<Self>, InterceptionError> {
        match settings.profile {
            Profile::None => return Ok(None),
            Profile::Ambient => {}
        }
        if lacks_net_admin() {
            return Err(InterceptionError::NotPermitted {
                operation: "install the rules that catch traffic",
                capability: "NET_ADMIN",
            });
        }
        if !settings.allow_host {
            host::refuse()?;
        }
        nftables::reach().await?;
        let ipv6_absent = !ipv6_available();
        let families = match settings.ipv6 {
            Ipv6::Capture if !ipv6_absent => Families::V4AndV6,
            Ipv6::Capture | Ipv6::Bypass => Families::V4,
        };
        Ok(Some(Self { plan: RulePlan::ambient(ports, families), ipv6_absent }))
    }

    /// The rules that [`install`](Self::install) installs.
    #[must_use]
    pub fn plan(&self) -> &RulePlan {
        &self.plan
    }

    /// Whether there is no IPv6 here, so that only IPv4 is caught whatever the settings say.
    #[must_use]
    pub fn ipv6_absent(&self) -> bool {
        self.ipv6_absent
    }

    /// Installs the routes, then the rules in one transaction. Whatever an earlier run left is
    /// replaced.
    ///
    /// Routes first: rules without them would strand the replies to imitated clients.
    ///
    /// # Errors
    ///
    /// The kernel refused; what this call had added is removed again, and rules of an earlier run
    /// still stand.
    pub async fn install(&self) -> Result<(), InterceptionError> {
        let added = routes::install().await?;
        if let Err(error) = nftables::apply(&self.plan).await {
            routes::undo(&added).await;
            return Err(error);
        }
        Ok(())
    }

    /// Removes the rules, then the routes. What is already gone is no error.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn remove(&self) -> Result<(), InterceptionError> {
        remove_everything().await.map(|_| ())
    }
}

/// How often each rule that is installed here matched, in the order of the rules; empty if there
/// are none.
///
/// # Errors
///
/// The kernel refused.
pub async fn counters() -> Result<Vec<RuleCounter>, InterceptionError> {
    nftables::counters().await
}

/// Removes whatever underpass ever installed here: the table, and the ip rules and routes of both
/// families. `false` if there was nothing.
///
/// # Errors
///
/// The kernel refused.
pub async fn remove_everything() -> Result<bool, InterceptionError> {
    let rules = nftables::remove().await?;
    let routes = routes::remove().await?;
    Ok(rules || routes)
}

/// Whether the calling thread is known to lack NET_ADMIN. Where /proc does not say, the kernel
/// will.
fn lacks_net_admin() -> bool {
    /// CAP_NET_ADMIN, include/uapi/linux/capability.h.
    const NET_ADMIN: u32 = 12;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    effective_capabilities(&status).is_some_and(|effective| effective & (1 << NET_ADMIN) == 0)
}

/// The `CapEff` line of a status file (proc_pid_status(5)).
fn effective_capabilities(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_capabilities_are_read_from_the_status_file() {
        let status = "Name:\tcat\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000001000\n";
        assert_eq!(effective_capabilities(status), Some(1 << 12));
        assert_eq!(effective_capabilities("Name:\tcat\n"), None);
        assert_eq!(effective_capabilities("CapEff:\tnonsense\n"), None);
    }
}
