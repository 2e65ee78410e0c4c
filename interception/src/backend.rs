//! Selects the backend that installs rules: nftables over netlink, or the iptables programs.

pub(crate) mod blackhole;
pub(crate) mod changes;
pub(crate) mod foreign;
pub(crate) mod iptables;
pub(crate) mod leftovers;
pub(crate) mod netlink;
pub(crate) mod nftables;
pub(crate) mod routes;
pub(crate) mod verify;

use std::collections::BTreeMap;
use std::fmt;

use underpass_config::Backend as Choice;

use crate::backend::iptables::{RemovalScope, Variant};
use crate::backend::nftables::RuleCounter;
use crate::backend::verify::Listing;
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::RulePlan;

/// A mechanism that installs rules. It may not be available.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// nf_tables over netlink, in a table that only underpass uses.
    Nftables,
    /// `iptables-restore`, in tables that all programs share.
    Iptables(Variant),
}

impl Backend {
    /// Selects the backend for the setting. Changes nothing and creates no tables.
    pub(crate) async fn find(entered: &Entered, choice: Choice) -> Result<Self, InterceptionError> {
        match choice {
            Choice::Nftables => nftables::check_available(entered).await.map(|()| Self::Nftables),
            Choice::Iptables => iptables::find(entered, Variant::Nft).await.map(Self::Iptables),
            Choice::IptablesLegacy => {
                iptables::find(entered, Variant::Legacy).await.map(Self::Iptables)
            }
            Choice::Auto => match nftables::check_available(entered).await {
                Ok(()) => Ok(Self::Nftables),
                Err(missing @ InterceptionError::Unsupported { .. }) => {
                    // If iptables is missing too, the error of nf_tables is more helpful.
                    iptables::detect(entered).await.map(Self::Iptables).map_err(|_| missing)
                }
                Err(error) => Err(error),
            },
        }
    }

    /// Returns true if the backend runs programs, which need the process's capabilities.
    #[must_use]
    pub fn runs_programs(self) -> bool {
        self != Self::Nftables
    }

    pub(crate) async fn apply(
        self,
        entered: &Entered,
        plan: &RulePlan,
        owner: Option<&str>,
    ) -> Result<(), InterceptionError> {
        match self {
            Self::Nftables => nftables::apply(entered, plan, owner).await,
            // A table that all programs share records no owner.
            Self::Iptables(variant) => iptables::apply(entered, variant, plan).await,
        }
    }

    pub(crate) async fn counters(
        self,
        entered: &Entered,
        plan: &RulePlan,
    ) -> Result<Vec<RuleCounter>, InterceptionError> {
        match self {
            Self::Nftables => {
                let mut found = nftables::counters(entered).await?;
                let place = |counter: &RuleCounter| {
                    plan.rules().iter().position(|rule| rule.id == counter.id)
                };
                found.sort_by_cached_key(|counter| place(counter).unwrap_or(usize::MAX));
                Ok(found)
            }
            Self::Iptables(variant) => iptables::counters(entered, variant, plan).await,
        }
    }

    pub(crate) async fn remove(self, entered: &Entered) -> Result<bool, InterceptionError> {
        match self {
            Self::Nftables => nftables::remove(entered).await,
            Self::Iptables(variant) => iptables::remove(entered, variant, RemovalScope::Own).await,
        }
    }

    pub(crate) fn expected(self, plan: &RulePlan) -> Listing {
        match self {
            Self::Nftables => nftables::expected(plan),
            Self::Iptables(_) => iptables::expected(plan),
        }
    }

    /// Readable texts for lines of a listing that nlink cannot print.
    pub(crate) fn readable(self, plan: &RulePlan) -> BTreeMap<String, String> {
        match self {
            Self::Nftables => nftables::readable(plan),
            Self::Iptables(_) => BTreeMap::new(),
        }
    }

    pub(crate) async fn installed(
        self,
        entered: &Entered,
        plan: &RulePlan,
    ) -> Result<Option<Listing>, InterceptionError> {
        match self {
            Self::Nftables => nftables::installed(entered).await,
            Self::Iptables(variant) => iptables::installed(entered, variant, plan).await,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nftables => "nftables",
            Self::Iptables(Variant::Nft) => "iptables",
            Self::Iptables(Variant::Legacy) => "iptables-legacy",
        })
    }
}
