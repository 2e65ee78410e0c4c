//! One installation of the rules: what is checked before, in which order it is done, how it is
//! compared with what is there, and how it is undone.
//!
//! Not here: the rules (`plan.rs`), how they get into the kernel (`backend.rs`), and the sockets
//! that fit them (`socket.rs`). Everything acts on the network namespace of the thread that calls.

use std::fs;

use underpass_config::{InterceptionSettings, Profile};

use crate::backend::Backend;
use crate::blackhole::{self, Blackhole};
use crate::changes::Changes;
use crate::foreign::{ForeignRule, foreign_rules};
use crate::iptables::{self, Variant};
use crate::leftovers::{Leftover, is_istios, leftovers};
use crate::nftables::{self, RuleCounter};
use crate::plan::{Ports, RulePlan};
use crate::verify::{Difference, Listing};
use crate::{InterceptionError, host, ipv6, ipv6_available, routes};

/// Interception that has been checked and can be installed.
#[derive(Debug, Clone)]
pub struct Interception {
    plan: RulePlan,
    ports: Ports,
    backend: Backend,
    /// Whether the kernel has IPv6.
    ipv6: bool,
    /// Whether IPv6 was enabled on the loopback interface at the last look.
    ipv6_on_loopback: bool,
    blackhole: Blackhole,
    /// Who installs the rules, for people.
    owner: Option<String>,
}

impl Interception {
    /// Checks whether and how the rules can be installed here, and changes nothing. `None` for the
    /// profile without rules.
    ///
    /// # Errors
    ///
    /// In this order: the capability NET_ADMIN is missing, this is the host's own namespace (and
    /// `allow_host` is off), the backend is not there.
    pub async fn prepare(
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> Result<Option<Self>, InterceptionError> {
        if settings.profile == Profile::None {
            return Ok(None);
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
        let backend = Backend::find(settings.backend).await?;
        let ipv6 = ipv6_available();
        let plan = RulePlan::new(settings, ports, ipv6);
        let blackhole = Blackhole::new(settings, ports, &plan);
        let ipv6_on_loopback = ipv6::on_loopback();
        Ok(Some(Self { plan, ports, backend, ipv6, ipv6_on_loopback, blackhole, owner: None }))
    }

    /// The same, which leaves in nftables who installed the rules.
    #[must_use]
    pub fn owned_by(self, owner: String) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// The same interception of other connections: where it is and what it is installed with stay.
    #[must_use]
    pub fn with_settings(&self, settings: &InterceptionSettings) -> Self {
        let plan = RulePlan::new(settings, self.ports, self.ipv6);
        let blackhole = Blackhole::new(settings, self.ports, &plan);
        Self { plan, blackhole, ..self.clone() }
    }

    /// The rules that [`install`](Self::install) installs.
    #[must_use]
    pub fn plan(&self) -> &RulePlan {
        &self.plan
    }

    /// What they are installed with.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Whether the kernel has no IPv6, so that only IPv4 is caught whatever the settings say.
    #[must_use]
    pub fn ipv6_absent(&self) -> bool {
        !self.ipv6
    }

    /// Whether the kernel has IPv6, and the loopback interface has it disabled now: rules exist, and
    /// what they capture goes nowhere.
    #[must_use]
    pub fn ipv6_disabled(&self) -> bool {
        self.ipv6 && !ipv6::on_loopback()
    }

    /// Whether IPv6 has been enabled or disabled on the loopback interface since the last call of
    /// [`follow_ipv6`](Self::follow_ipv6), so that a difference found since may be of that.
    #[must_use]
    pub fn ipv6_has_changed(&self) -> bool {
        ipv6::on_loopback() != self.ipv6_on_loopback
    }

    /// Installs the routes and addresses that wait for IPv6 on the loopback interface, if it has been
    /// enabled there since the last call; whether it has.
    ///
    /// # Errors
    ///
    /// The kernel refused; the next call tries again.
    pub async fn follow_ipv6(&mut self) -> Result<bool, InterceptionError> {
        let enabled = ipv6::on_loopback();
        let changed = enabled && !self.ipv6_on_loopback;
        if changed {
            routes::install(&self.plan).await?;
        }
        self.ipv6_on_loopback = enabled;
        Ok(changed)
    }

    /// Rules that would catch the same traffic: of an older run by another backend, or of Istio or
    /// OSM.
    ///
    /// # Errors
    ///
    /// The kernel refused to tell.
    pub async fn leftovers(&self) -> Result<Vec<Leftover>, InterceptionError> {
        leftovers(self.backend).await
    }

    /// Rules of other programs that act on packets before ours do.
    ///
    /// # Errors
    ///
    /// The kernel refused to tell.
    pub async fn foreign_rules(&self) -> Result<Vec<ForeignRule>, InterceptionError> {
        foreign_rules(self.backend, &self.plan).await
    }

    /// Installs the routes, then the rules in one transaction. Whatever an earlier run left is
    /// replaced, and its blackhole removed.
    ///
    /// Routes first: rules without them would strand the replies to imitated clients.
    ///
    /// # Errors
    ///
    /// The kernel refused; what this call had added is removed again, and rules of an earlier run
    /// still stand.
    pub async fn install(&self) -> Result<(), InterceptionError> {
        self.repair().await?;
        self.unblock().await.map(drop)
    }

    /// Installs as [`install`](Self::install) does, and leaves the blackhole in place.
    ///
    /// # Errors
    ///
    /// As [`install`](Self::install).
    pub async fn repair(&self) -> Result<(), InterceptionError> {
        let added = routes::install(&self.plan).await?;
        if let Err(error) = self.backend.apply(&self.plan).await {
            routes::undo(&added).await;
            return Err(error);
        }
        self.mark_owner().await;
        routes::remove_foreign(&self.plan).await
    }

    /// Writes beside the rules who installed them. Without it they are the same, so that a failure is
    /// logged only.
    pub async fn mark_owner(&self) {
        if let (Backend::Nftables, Some(owner)) = (self.backend, &self.owner)
            && let Err(error) = nftables::mark_owner(owner).await
        {
            tracing::debug!(%error, "the owner of the rules is not marked");
        }
    }

    /// How what is installed differs from the plan, by expression and order; `None` if it does not.
    ///
    /// # Errors
    ///
    /// The kernel refused to tell.
    pub async fn verify(&self) -> Result<Option<Difference>, InterceptionError> {
        let mut expected = self.backend.expected(&self.plan);
        expected.sections.push(routes::expected(&self.plan));
        let mut found: Listing = self.backend.installed(&self.plan).await?.unwrap_or_default();
        found.sections.push(routes::installed(&self.plan).await?);
        let difference = expected.difference(&found);
        let words = || self.backend.readable(&self.plan);
        Ok(difference.map(|difference| difference.readable(&words(), nftables::readable_unknown)))
    }

    /// Installs the blackhole: what the rules would catch is refused until [`unblock`](Self::unblock).
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn block(&self) -> Result<(), InterceptionError> {
        self.blackhole.install().await
    }

    /// Removes the blackhole; `false` if there was none.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn unblock(&self) -> Result<bool, InterceptionError> {
        blackhole::remove().await
    }

    /// Whether the blackhole is installed.
    ///
    /// # Errors
    ///
    /// The kernel refused to tell.
    pub async fn is_blocked(&self) -> Result<bool, InterceptionError> {
        blackhole::stands().await
    }

    /// Wake-ups after changes in this namespace, from now on.
    ///
    /// # Errors
    ///
    /// The kernel does not let us listen.
    pub fn changes(&self) -> Result<Changes, InterceptionError> {
        Changes::subscribe(self.backend)
    }

    /// How often each rule that is installed here matched, in the order of the rules; empty if there
    /// are none.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn counters(&self) -> Result<Vec<RuleCounter>, InterceptionError> {
        self.backend.counters(&self.plan).await
    }

    /// Removes the rules, the routes and the blackhole. What is already gone is no error.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn remove(&self) -> Result<(), InterceptionError> {
        self.backend.remove().await?;
        routes::remove(&self.plan).await?;
        self.unblock().await.map(drop)
    }
}

/// How often each rule of our nftables table matched, in the order of the rules; empty if there is
/// none.
///
/// # Errors
///
/// The kernel refused.
pub async fn counters() -> Result<Vec<RuleCounter>, InterceptionError> {
    nftables::counters().await
}

/// What [`remove_everything`] removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemovalScope {
    /// What underpass installed.
    Own,
    /// Also what has the names and numbers of Istio and OSM, and that underpass did not install.
    OtherMeshes,
}

/// Removes whatever underpass ever installed here, by whichever backend and profile: the table, the
/// profiles' chains in iptables, the ip rules, routes and addresses, the blackhole. `false` if there
/// was nothing.
///
/// # Errors
///
/// This is the host's own namespace, and not `allow_host`. The kernel or a program refused something;
/// all else is removed.
pub async fn remove_everything(
    scope: RemovalScope,
    allow_host: bool,
) -> Result<bool, InterceptionError> {
    if !allow_host {
        host::refuse()?;
    }
    let mut removed = vec![
        remove_from_nftables(scope).await,
        remove_from_iptables(Variant::Nft, scope).await,
        remove_from_iptables(Variant::Legacy, scope).await,
        routes::remove(&RulePlan::beside_rules()).await,
        blackhole::remove().await,
    ];
    if scope == RemovalScope::OtherMeshes {
        removed.push(routes::remove_of_others(&RulePlan::beside_rules()).await);
    }
    removed.into_iter().try_fold(false, |any, removed| Ok(any | removed?))
}

async fn remove_from_nftables(scope: RemovalScope) -> Result<bool, InterceptionError> {
    match nftables::reach().await {
        Ok(()) => {
            let others = scope == RemovalScope::OtherMeshes;
            let istios = if others { nftables::remove_tables(is_istios).await? } else { false };
            Ok(nftables::remove().await? | istios)
        }
        Err(InterceptionError::Unsupported { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn remove_from_iptables(
    variant: Variant,
    scope: RemovalScope,
) -> Result<bool, InterceptionError> {
    match iptables::find(variant).await {
        Ok(variant) => iptables::remove(variant, scope).await,
        // What is not there has installed nothing.
        Err(_) => Ok(false),
    }
}

/// Whether the calling thread is known to lack NET_ADMIN. Where /proc does not say, the kernel
/// will.
pub(crate) fn lacks_net_admin() -> bool {
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
