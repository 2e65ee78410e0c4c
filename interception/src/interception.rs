//! One installation of the rules: what is checked before, in which order it is done, how it is
//! compared with what is there, and how it is undone.
//!
//! Not here: the rules (`plan.rs`), how they get into the kernel (`backend.rs`), and the sockets
//! that fit them (`socket.rs`).

use std::sync::Arc;

use underpass_config::{InterceptionSettings, Profile};

use crate::backend::Backend;
use crate::blackhole;
use crate::changes::Changes;
use crate::foreign::{ForeignRule, foreign_rules};
use crate::iptables::{self, RemovalScope, Variant};
use crate::leftovers::{Leftover, is_istios, leftovers};
use crate::nftables::{self, RuleCounter};
use crate::plan::{Ports, RulePlan};
use crate::planned::{PlanInputs, Planned};
use crate::privileges::lacks_net_admin;
use crate::verify::{Difference, Listing};
use crate::{Entered, InterceptionError, NamespaceAccess, host, ipv6, ipv6_available, routes};

/// Interception in one namespace that has been checked and can be installed. Every operation runs
/// in that namespace, whatever namespace its caller is in.
#[derive(Debug, Clone)]
pub struct Interception {
    access: NamespaceAccess,
    rules: Arc<Rules>,
    /// Whether IPv6 was enabled on the loopback interface at the last look.
    ipv6_on_loopback: bool,
}

/// What is installed, and with what.
#[derive(Debug, Clone)]
struct Rules {
    planned: Arc<Planned>,
    /// Describes the installing process, for people who list the table.
    owner: Option<String>,
}

impl Interception {
    /// Checks whether and how the rules can be installed in a namespace, and changes nothing.
    /// `None` for the profile without rules.
    ///
    /// # Errors
    ///
    /// In this order: the capability NET_ADMIN is missing, this is the host's own namespace (and
    /// `allow_host` is off), the backend is not there.
    pub async fn prepare(
        access: &NamespaceAccess,
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> Result<Option<Self>, InterceptionError> {
        if settings.profile == Profile::None {
            return Ok(None);
        }
        let wanted = settings.clone();
        let prepare = async move |entered: &Entered| {
            let rules = Rules::prepare(entered, &wanted, ports).await?;
            Ok((Arc::new(rules), ipv6::on_loopback(entered)))
        };
        let (rules, ipv6_on_loopback) = access.run(prepare).await??;
        Ok(Some(Self { access: access.clone(), rules, ipv6_on_loopback }))
    }

    /// The same, which leaves in nftables who installed the rules.
    #[must_use]
    pub fn owned_by(self, owner: String) -> Self {
        let rules = Rules { owner: Some(owner), ..(*self.rules).clone() };
        Self { rules: Arc::new(rules), ..self }
    }

    /// The same interception of other connections: where it is and what it is installed with stay.
    #[must_use]
    pub fn with_settings(&self, settings: &InterceptionSettings) -> Self {
        Self { rules: Arc::new(self.rules.with_settings(settings)), ..self.clone() }
    }

    /// Where the rules are.
    #[must_use]
    pub fn access(&self) -> &NamespaceAccess {
        &self.access
    }

    /// The rules that [`install`](Self::install) installs.
    #[must_use]
    pub fn plan(&self) -> &RulePlan {
        self.rules.plan()
    }

    /// What they are installed with.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.rules.backend()
    }

    /// Whether the kernel has no IPv6, so that only IPv4 is caught whatever the settings say.
    #[must_use]
    pub fn ipv6_absent(&self) -> bool {
        !self.rules.planned.inputs.ipv6
    }

    /// Whether the kernel has IPv6, and the loopback interface has it disabled now: rules exist,
    /// and what they capture goes nowhere.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn ipv6_disabled(&self) -> Result<bool, InterceptionError> {
        let enabled = self.access.run(async |entered| ipv6::on_loopback(entered)).await?;
        Ok(self.rules.planned.inputs.ipv6 && !enabled)
    }

    /// Whether IPv6 has been enabled or disabled on the loopback interface since the last call of
    /// [`follow_ipv6`](Self::follow_ipv6), so that a difference found since may be of that.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub async fn ipv6_has_changed(&self) -> Result<bool, InterceptionError> {
        let enabled = self.access.run(async |entered| ipv6::on_loopback(entered)).await?;
        Ok(enabled != self.ipv6_on_loopback)
    }

    /// Installs the routes and addresses that wait for IPv6 on the loopback interface, if it has
    /// been enabled there since the last call; whether it has.
    ///
    /// # Errors
    ///
    /// The kernel refused; the next call tries again.
    pub async fn follow_ipv6(&mut self) -> Result<bool, InterceptionError> {
        let was_enabled = self.ipv6_on_loopback;
        let follow = async move |entered: &Entered, rules: &Rules| {
            let enabled = ipv6::on_loopback(entered);
            if enabled && !was_enabled {
                routes::install(entered, rules.plan()).await?;
            }
            Ok(enabled)
        };
        let enabled = self.run(follow).await?;
        self.ipv6_on_loopback = enabled;
        Ok(enabled && !was_enabled)
    }

    /// Rules that would catch the same traffic: of an older run by another backend, or of Istio or
    /// OSM.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn leftovers(&self) -> Result<Vec<Leftover>, InterceptionError> {
        self.run(async |entered, rules| leftovers(entered, rules.backend()).await).await
    }

    /// Rules of other programs that act on packets before ours do.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn foreign_rules(&self) -> Result<Vec<ForeignRule>, InterceptionError> {
        self.run(async |entered, rules| foreign_rules(entered, rules.backend(), rules.plan()).await)
            .await
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
        self.run(async |entered, rules| {
            rules.repair(entered).await?;
            blackhole::remove(entered).await.map(drop)
        })
        .await
    }

    /// Installs as [`install`](Self::install) does, and leaves the blackhole in place.
    ///
    /// # Errors
    ///
    /// As [`install`](Self::install).
    pub async fn repair(&self) -> Result<(), InterceptionError> {
        self.run(async |entered, rules| rules.repair(entered).await).await
    }

    /// Writes beside the rules who installed them. Without it they are the same, so that a failure
    /// is logged only.
    pub async fn mark_owner(&self) {
        let mark = async |entered: &Entered, rules: &Rules| {
            rules.mark_owner(entered).await;
            Ok(())
        };
        if let Err(error) = self.run(mark).await {
            tracing::debug!(%error, "the owner of the rules is not marked");
        }
    }

    /// How what is installed differs from the plan, by expression and order; `None` if it does not.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn verify(&self) -> Result<Option<Difference>, InterceptionError> {
        self.run(async |entered, rules| rules.verify(entered).await).await
    }

    /// Installs the blackhole: what the rules would catch is refused until
    /// [`unblock`](Self::unblock).
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn block(&self) -> Result<(), InterceptionError> {
        self.run(async |entered, rules| rules.planned.blackhole.install(entered).await).await
    }

    /// Removes the blackhole; `false` if there was none.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn unblock(&self) -> Result<bool, InterceptionError> {
        self.run(async |entered, _| blackhole::remove(entered).await).await
    }

    /// Whether the blackhole is installed.
    ///
    /// # Errors
    ///
    /// The kernel refused to list the rules.
    pub async fn is_blocked(&self) -> Result<bool, InterceptionError> {
        self.run(async |entered, _| blackhole::is_installed(entered).await).await
    }

    /// Wake-ups after changes in the namespace, from now on.
    ///
    /// # Errors
    ///
    /// The kernel does not let us listen.
    pub async fn changes(&self) -> Result<Changes, InterceptionError> {
        Changes::of_rules(&self.access, self.rules.backend()).await
    }

    /// How often each rule that is installed matched, in the order of the rules; empty if there are
    /// none.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn counters(&self) -> Result<Vec<RuleCounter>, InterceptionError> {
        self.run(async |entered, rules| rules.backend().counters(entered, rules.plan()).await).await
    }

    /// Removes the rules, the routes and the blackhole. What is already gone is no error.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub async fn remove(&self) -> Result<(), InterceptionError> {
        self.run(async |entered, rules| {
            rules.backend().remove(entered).await?;
            routes::remove(entered, rules.plan()).await?;
            blackhole::remove(entered).await.map(drop)
        })
        .await
    }

    /// Runs an operation on the rules in their namespace.
    async fn run<T: Send + 'static>(
        &self,
        operation: impl AsyncFnOnce(&Entered, &Rules) -> Result<T, InterceptionError> + Send + 'static,
    ) -> Result<T, InterceptionError> {
        let rules = self.rules.clone();
        self.access.run(async move |entered| operation(entered, &rules).await).await?
    }
}

impl Rules {
    async fn prepare(
        entered: &Entered,
        settings: &InterceptionSettings,
        ports: Ports,
    ) -> Result<Self, InterceptionError> {
        if lacks_net_admin(entered) {
            return Err(InterceptionError::NotPermitted {
                operation: "install the rules that catch traffic",
                capability: "NET_ADMIN",
            });
        }
        if !settings.allow_host {
            host::reject_host(entered)?;
        }
        let backend = Backend::find(entered, settings.backend).await?;
        let settings = settings.clone();
        let inputs = PlanInputs { settings, ports, backend, ipv6: ipv6_available() };
        Ok(Self { planned: Planned::shared(inputs), owner: None })
    }

    fn with_settings(&self, settings: &InterceptionSettings) -> Self {
        let inputs = PlanInputs { settings: settings.clone(), ..self.planned.inputs.clone() };
        Self { planned: Planned::shared(inputs), owner: self.owner.clone() }
    }

    fn plan(&self) -> &RulePlan {
        &self.planned.plan
    }

    fn backend(&self) -> Backend {
        self.planned.inputs.backend
    }

    async fn repair(&self, entered: &Entered) -> Result<(), InterceptionError> {
        let added = routes::install(entered, self.plan()).await?;
        if let Err(error) = self.backend().apply(entered, self.plan()).await {
            routes::undo(entered, &added).await;
            return Err(error);
        }
        self.mark_owner(entered).await;
        routes::remove_foreign(entered, self.plan()).await
    }

    async fn mark_owner(&self, entered: &Entered) {
        if let (Backend::Nftables, Some(owner)) = (self.backend(), &self.owner)
            && let Err(error) = nftables::mark_owner(entered, owner).await
        {
            tracing::debug!(%error, "the owner of the rules is not marked");
        }
    }

    async fn verify(&self, entered: &Entered) -> Result<Option<Difference>, InterceptionError> {
        let (backend, plan) = (self.backend(), self.plan());
        let rules = backend.installed(entered, plan).await?.unwrap_or_default();
        let expected = Listing::from(routes::expected(entered, plan));
        let routes = Listing::from(routes::installed(entered, plan).await?);
        let rules = self.planned.expected().difference(&rules);
        let difference = Difference::join(rules, expected.difference(&routes));
        let readable = |difference: Difference| {
            difference.readable(&backend.readable(plan), nftables::readable_unknown)
        };
        Ok(difference.map(readable))
    }
}

/// How often each rule of our nftables table in a namespace matched, in the order of the rules;
/// empty if there is none.
///
/// # Errors
///
/// The kernel refused.
pub async fn counters(access: &NamespaceAccess) -> Result<Vec<RuleCounter>, InterceptionError> {
    access.run(async |entered| nftables::counters(entered).await).await?
}

/// Removes whatever underpass ever installed in a namespace, by whichever backend and profile: the
/// table, the profiles' chains in iptables, the ip rules, routes and addresses, the blackhole.
/// `false` if there was nothing.
///
/// # Errors
///
/// This is the host's own namespace, and not `allow_host`. The kernel or a program refused
/// something; all else is removed.
pub async fn remove_everything(
    access: &NamespaceAccess,
    scope: RemovalScope,
    allow_host: bool,
) -> Result<bool, InterceptionError> {
    access.run(async move |entered| remove_all(entered, scope, allow_host).await).await?
}

async fn remove_all(
    entered: &Entered,
    scope: RemovalScope,
    allow_host: bool,
) -> Result<bool, InterceptionError> {
    if !allow_host {
        host::reject_host(entered)?;
    }
    let mut removed = vec![
        remove_from_nftables(entered, scope).await,
        remove_from_iptables(entered, Variant::Nft, scope).await,
        remove_from_iptables(entered, Variant::Legacy, scope).await,
        routes::remove(entered, &RulePlan::routes_and_addresses()).await,
        blackhole::remove(entered).await,
    ];
    if scope == RemovalScope::OtherMeshes {
        removed
            .push(routes::remove_foreign_rules(entered, &RulePlan::routes_and_addresses()).await);
    }
    removed.into_iter().try_fold(false, |any, removed| Ok(any | removed?))
}

async fn remove_from_nftables(
    entered: &Entered,
    scope: RemovalScope,
) -> Result<bool, InterceptionError> {
    match nftables::check_available(entered).await {
        Ok(()) => {
            let others = scope == RemovalScope::OtherMeshes;
            let istios =
                if others { nftables::remove_tables(entered, is_istios).await? } else { false };
            Ok(nftables::remove(entered).await? | istios)
        }
        Err(InterceptionError::Unsupported { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn remove_from_iptables(
    entered: &Entered,
    variant: Variant,
    scope: RemovalScope,
) -> Result<bool, InterceptionError> {
    match iptables::find(entered, variant).await {
        Ok(variant) => iptables::remove(entered, variant, scope).await,
        // What is not there has installed nothing.
        Err(_) => Ok(false),
    }
}
