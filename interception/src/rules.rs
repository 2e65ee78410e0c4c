//! Installs, verifies and removes the rules of one pod in the kernel, in the right order.
//!
//! `plan` plans the rules, `backend` contains the backends, and `interception` is the public
//! interface.

use std::sync::Arc;

use underpass_config::InterceptionSettings;

use crate::backend::foreign::{ForeignRule, foreign_rules};
use crate::backend::iptables::{RemovalScope, Variant};
use crate::backend::leftovers::{Leftover, is_istio_table, leftovers};
use crate::backend::nftables::RuleCounter;
use crate::backend::verify::{Difference, Listing};
use crate::backend::{Backend, blackhole, iptables, nftables, routes};
use crate::error::InterceptionError;
use crate::namespace::{Entered, host};
use crate::plan::RulePlan;
use crate::process::privileges::lacks_net_admin;
use crate::shared_plan::{PlanInputs, SharedPlan};

/// The settings and the context that determine a pod's rules.
#[derive(Debug, Clone)]
pub struct RuleSettings {
    pub(crate) inputs: PlanInputs,
    /// Describes the process that installed the rules, for operators who list the table.
    pub(crate) owner: Option<String>,
}

/// The rules of a pod, with their plan and backend.
#[derive(Debug)]
pub(crate) struct Rules<'a> {
    planned: Arc<SharedPlan>,
    owner: Option<&'a str>,
}

impl RuleSettings {
    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules { planned: SharedPlan::of_inputs(self.inputs.clone()), owner: self.owner.as_deref() }
    }
}

/// Checks whether rules can be installed, and selects the backend. Changes nothing.
pub(crate) async fn prepare(
    entered: &Entered,
    settings: &InterceptionSettings,
) -> Result<Backend, InterceptionError> {
    if lacks_net_admin() {
        return Err(InterceptionError::NotPermitted {
            operation: "install the interception rules",
            capability: "NET_ADMIN",
        });
    }
    if !settings.allow_host {
        host::reject_host(entered)?;
    }
    Backend::find(entered, settings.backend).await
}

impl Rules<'_> {
    fn plan(&self) -> &RulePlan {
        &self.planned.plan
    }

    fn backend(&self) -> Backend {
        self.planned.inputs.backend
    }

    pub(crate) async fn install(&self, entered: &Entered) -> Result<(), InterceptionError> {
        self.repair(entered).await?;
        blackhole::remove(entered).await.map(drop)
    }

    /// Installs the rules unless they are installed already. Returns `true` if it installed them,
    /// `false` if they were already installed.
    pub(crate) async fn install_if_different(
        &self,
        entered: &Entered,
    ) -> Result<bool, InterceptionError> {
        let is_different = !self.are_installed(entered).await?;
        if is_different {
            self.repair(entered).await?;
        } else {
            self.mark_owner(entered).await;
        }
        blackhole::remove(entered).await?;
        Ok(is_different)
    }

    async fn are_installed(&self, entered: &Entered) -> Result<bool, InterceptionError> {
        let Some(rules) = self.backend().installed(entered, self.plan()).await? else {
            return Ok(false);
        };
        if self.planned.expected().difference(&rules).is_some() {
            return Ok(false);
        }
        let routes = routes::listings(entered, self.plan()).await?;
        Ok(routes.expected == routes.installed)
    }

    pub(crate) async fn repair(&self, entered: &Entered) -> Result<(), InterceptionError> {
        let added = routes::install(entered, self.plan()).await?;
        if let Err(error) = self.backend().apply(entered, self.plan(), self.owner).await {
            routes::undo(entered, &added).await;
            return Err(error);
        }
        routes::remove_foreign(entered, self.plan()).await
    }

    pub(crate) async fn install_routes(&self, entered: &Entered) -> Result<(), InterceptionError> {
        routes::install(entered, self.plan()).await.map(drop)
    }

    /// Records the owner. Only logs a failure, because the rules work without the record.
    async fn mark_owner(&self, entered: &Entered) {
        if let (Backend::Nftables, Some(owner)) = (self.backend(), self.owner)
            && let Err(error) = nftables::mark_owner(entered, owner).await
        {
            tracing::debug!(%error, "cannot record the owner of the rules");
        }
    }

    pub(crate) async fn verify(
        &self,
        entered: &Entered,
    ) -> Result<Option<Difference>, InterceptionError> {
        let (backend, plan) = (self.backend(), self.plan());
        let rules = backend.installed(entered, plan).await?.unwrap_or_default();
        let routes = routes::listings(entered, plan).await?;
        let rules = self.planned.expected().difference(&rules);
        let routes = Listing::from(routes.expected).difference(&Listing::from(routes.installed));
        let difference = Difference::join(rules, routes);
        let readable = |difference: Difference| {
            difference.readable(&backend.readable(plan), nftables::readable_unknown)
        };
        Ok(difference.map(readable))
    }

    pub(crate) async fn block(&self, entered: &Entered) -> Result<(), InterceptionError> {
        self.planned.blackhole.install(entered).await
    }

    pub(crate) async fn counters(
        &self,
        entered: &Entered,
    ) -> Result<Vec<RuleCounter>, InterceptionError> {
        self.backend().counters(entered, self.plan()).await
    }

    pub(crate) async fn remove(&self, entered: &Entered) -> Result<(), InterceptionError> {
        self.backend().remove(entered).await?;
        routes::remove(entered, self.plan()).await?;
        blackhole::remove(entered).await.map(drop)
    }

    pub(crate) async fn leftovers(
        &self,
        entered: &Entered,
    ) -> Result<Vec<Leftover>, InterceptionError> {
        leftovers(entered, self.backend()).await
    }

    pub(crate) async fn foreign_rules(
        &self,
        entered: &Entered,
    ) -> Result<Vec<ForeignRule>, InterceptionError> {
        foreign_rules(entered, self.backend(), self.plan()).await
    }
}

/// Removes the blackhole. Returns `false` if it was not installed.
pub(crate) async fn unblock(entered: &Entered) -> Result<bool, InterceptionError> {
    blackhole::remove(entered).await
}

pub(crate) async fn is_blocked(entered: &Entered) -> Result<bool, InterceptionError> {
    blackhole::is_installed(entered).await
}

/// Removes everything that underpass installed. Returns `false` if there was nothing.
pub(crate) async fn remove_everything(
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
            let istios = if others {
                nftables::remove_tables(entered, is_istio_table).await
            } else {
                Ok(false)
            };
            let host = nftables::host::remove(entered).await;
            let removed = [istios, host, nftables::remove(entered).await];
            removed.into_iter().try_fold(false, |any, removed| Ok(any | removed?))
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
        // A program that is missing cannot have installed rules.
        Err(_) => Ok(false),
    }
}
