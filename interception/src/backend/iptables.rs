//! The iptables backend: installs, reads and removes a plan by the iptables programs.
//!
//! It serves kernels without nf_tables, and users who want to see the rules in iptables. Each table
//! changes atomically, but not all tables together: if one fails, the others are restored.
//! `plan::iptables` prints the rules.

mod exec;
mod owners;
mod ruleset;

pub(crate) use ruleset::{Ruleset, SavedChain, SavedTable, is_own_chain, is_owner_chain};

use ruleset::{OwnRules, canonical};

use crate::backend::nftables;
use crate::backend::nftables::RuleCounter;
use crate::backend::verify::Listing;
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::namespace::ipv6::ipv6_available;
use crate::plan::{Family, RulePlan};

/// The extent of [`remove_everything`](crate::interception::remove_everything).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemovalScope {
    /// Rules that underpass installed.
    Own,
    /// Also rules with the names and numbers of Istio and OSM, even if underpass did not install
    /// them.
    OtherMeshes,
}

/// The kernel interface that the programs use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// ip_tables (`iptables-legacy`).
    Legacy,
    /// The tables `ip` and `ip6` of nf_tables (`iptables-nft`).
    Nft,
}

impl Variant {
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }
}

/// Selects the variant for a kernel without nf_tables: legacy if it is installed, otherwise nft.
/// Queries only the versions of the programs, which creates no tables. [`apply`] detects missing
/// kernel tables.
///
/// # Errors
///
/// iptables is not installed.
pub(crate) async fn detect(entered: &Entered) -> Result<Variant, InterceptionError> {
    match find(entered, Variant::Legacy).await {
        Err(missing) if missing.is_missing_program() => {
            find(entered, Variant::Nft).await.map_err(|_| missing)
        }
        result => result,
    }
}

/// Checks that the programs of a variant are installed.
///
/// # Errors
///
/// A program is missing.
pub(crate) async fn find(
    entered: &Entered,
    variant: Variant,
) -> Result<Variant, InterceptionError> {
    for family in families() {
        exec::find(entered, variant, family).await?;
    }
    Ok(variant)
}

/// Replaces the rules of an earlier run by the plan, IPv4 first. Idempotent.
///
/// # Errors
///
/// A user or group of the plan does not exist, or a program is missing or failed. Changes are
/// undone as far as possible.
pub(crate) async fn apply(
    entered: &Entered,
    variant: Variant,
    plan: &RulePlan,
) -> Result<(), InterceptionError> {
    const OPERATION: &str = "install the iptables rules";
    owners::check(plan)?;
    let mut steps = Vec::new();
    for family in families() {
        let mut wanted = OwnRules::of_plan(plan, family);
        let before = installed_of(entered, OPERATION, variant, family, &wanted).await?;
        wanted.keep_positions(&before);
        steps.push(FamilyChange { family, before, wanted });
    }
    for (done, step) in steps.iter().enumerate() {
        let FamilyChange { family, before, wanted } = step;
        let Err(error) = apply_change(entered, OPERATION, variant, *family, before, wanted).await
        else {
            continue;
        };
        let undone = undo(entered, variant, steps.get(..=done).unwrap_or_default()).await;
        return Err(InterceptionError::IptablesNotInstalled {
            family: name(*family),
            undone,
            source: Box::new(error),
        });
    }
    Ok(())
}

/// Reads the counters of the plan's rules in order, the sum of both families. Empty if nothing is
/// installed.
///
/// # Errors
///
/// A program is missing or failed.
pub(crate) async fn counters(
    entered: &Entered,
    variant: Variant,
    plan: &RulePlan,
) -> Result<Vec<RuleCounter>, InterceptionError> {
    const OPERATION: &str = "read the counters of the iptables rules";
    let rules = plan.rules().iter().filter(|rule| !rule.nftables_only);
    let mut counters: Vec<_> =
        rules.map(|rule| RuleCounter { id: rule.id.clone(), packets: 0, bytes: 0 }).collect();
    let mut empty = true;
    for family in families() {
        let ruleset = saved(entered, OPERATION, variant, family).await?;
        empty &= OwnRules::installed(&ruleset, &OwnRules::of_plan(plan, family)).is_empty();
        add_counters(&mut counters, &ruleset, plan, family);
    }
    Ok(if empty { Vec::new() } else { counters })
}

/// Removes all underpass rules and chains of any plan. Returns `false` if there were none. Keeps
/// chains that only have the same names, unless `scope` includes them.
///
/// # Errors
///
/// A program is missing or failed.
pub(crate) async fn remove(
    entered: &Entered,
    variant: Variant,
    scope: RemovalScope,
) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the iptables rules";
    let nothing = OwnRules::default();
    let mut any = false;
    for family in families() {
        let ours = match installed_of(entered, OPERATION, variant, family, &nothing).await {
            // Without nf_tables, its variant has no rules to remove.
            Err(InterceptionError::Iptables { module: Some("nf_tables"), .. }) => continue,
            ours => ours?,
        };
        let ours = match scope {
            RemovalScope::Own => ours.marked(),
            RemovalScope::OtherMeshes => ours,
        };
        apply_change(entered, OPERATION, variant, family, &ours, &nothing).await?;
        any |= !ours.is_empty();
    }
    if any && variant == Variant::Nft {
        nftables::remove_bare_iptables_tables(entered).await?;
    }
    Ok(any)
}

/// Lists the installed underpass rules: its chains completely, and its rules in other chains.
/// `None` if there are none.
///
/// # Errors
///
/// A program is missing or failed.
pub(crate) async fn installed(
    entered: &Entered,
    variant: Variant,
    plan: &RulePlan,
) -> Result<Option<Listing>, InterceptionError> {
    const OPERATION: &str = "read the iptables rules";
    let mut listing = Listing::default();
    for family in families() {
        let planned = OwnRules::of_plan(plan, family);
        let ours = installed_of(entered, OPERATION, variant, family, &planned).await?;
        listing.sections.extend(ours.sections(family));
    }
    Ok((!listing.sections.is_empty()).then_some(listing))
}

/// The listing that [`installed`] returns if a plan is installed correctly, with either variant.
pub(crate) fn expected(plan: &RulePlan) -> Listing {
    let sections =
        families().into_iter().flat_map(|family| OwnRules::of_plan(plan, family).sections(family));
    Listing { sections: sections.collect() }
}

/// Reads the rules of all programs.
pub(crate) async fn saved(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
) -> Result<Ruleset, InterceptionError> {
    let ruleset = Ruleset::parse(&exec::save(entered, operation, variant, family).await?);
    Ok(ruleset)
}

struct FamilyChange {
    family: Family,
    before: OwnRules,
    wanted: OwnRules,
}

/// The address families that the kernel supports.
fn families() -> Vec<Family> {
    if ipv6_available() { vec![Family::V4, Family::V6] } else { vec![Family::V4] }
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// Reads the installed underpass rules of a family. Ignores a table that iptables-nft cannot print,
/// if it contains no underpass rules and the plan adds none.
async fn installed_of(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
    planned: &OwnRules,
) -> Result<OwnRules, InterceptionError> {
    let ruleset = saved(entered, operation, variant, family).await?;
    for table in &ruleset.incompatible {
        let kernel_family = match family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        let chains = nftables::chains(entered, kernel_family, table).await?;
        if planned.has_table(table) || chains.iter().any(|chain| is_own_chain(chain)) {
            let table = table.clone();
            return Err(InterceptionError::IptablesIncompatible { operation, table });
        }
    }
    Ok(OwnRules::installed(&ruleset, planned))
}

async fn apply_change(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
    from: &OwnRules,
    to: &OwnRules,
) -> Result<(), InterceptionError> {
    let body = from.change_to(to);
    if body.is_empty() {
        return Ok(());
    }
    exec::restore(entered, operation, variant, family, &body).await
}

/// Restores the previous rules. Returns false if that failed.
async fn undo(entered: &Entered, variant: Variant, steps: &[FamilyChange]) -> bool {
    const OPERATION: &str = "restore the iptables rules";
    let mut undone = true;
    for FamilyChange { family, before, wanted } in steps.iter().rev() {
        let result = match installed_of(entered, OPERATION, variant, *family, wanted).await {
            Ok(now) => apply_change(entered, OPERATION, variant, *family, &now, before).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            tracing::warn!(%error, family = name(*family), "cannot restore the previous iptables rules");
            undone = false;
        }
    }
    undone
}

/// Adds the counters of each rule's lines. Equal lines are in the same order in plan and kernel.
fn add_counters(counters: &mut [RuleCounter], ruleset: &Ruleset, plan: &RulePlan, family: Family) {
    let mut used = std::collections::HashMap::new();
    for line in plan.lines(family) {
        let rules = ruleset.rules(line.chain.table.name(), line.chain.name).iter();
        let key = (line.chain, line.text.clone());
        let seen: &mut usize = used.entry(key).or_default();
        let found = rules.filter(|rule| canonical(&rule.text) == line.text).nth(*seen);
        *seen += 1;
        let counter = counters.iter_mut().find(|counter| counter.id == line.rule.id);
        if let (Some(rule), Some(counter)) = (found, counter) {
            counter.packets += rule.packets;
            counter.bytes += rule.bytes;
        }
    }
}
