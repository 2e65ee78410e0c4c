//! The iptables backend: puts a plan into the kernel with the programs of iptables, and reads and
//! removes it.
//!
//! It is for kernels without nf_tables, and for those who want to see their rules in iptables. Each
//! table of each family changes as a whole, but not all of them at once; where one fails, the others
//! are put back.
//!
//! Not here: which rules there are (`plan.rs`) and how they read (`plan/iptables.rs`).

mod exec;
mod owners;
mod ruleset;

pub(crate) use ruleset::{Ruleset, SavedChain, SavedTable, is_ours, is_owner_chain};

use ruleset::{Ours, canonical};

use crate::nftables::{self, RuleCounter};
use crate::plan::{Family, RulePlan};
use crate::verify::Listing;
use crate::{Entered, InterceptionError, ipv6_available};

/// What [`remove_everything`](crate::remove_everything) removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemovalScope {
    /// What underpass installed.
    Own,
    /// Also what has the names and numbers of Istio and OSM, and that underpass did not install.
    OtherMeshes,
}

/// What the programs talk to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// The kernel's ip_tables (`iptables-legacy`).
    Legacy,
    /// nf_tables, in its tables `ip` and `ip6` (`iptables-nft`).
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

/// The variant for a kernel without nf_tables: legacy, else what there is. Programs are asked for their
/// version only, so that nothing is created; whether the kernel has the tables is told by [`apply`].
///
/// # Errors
///
/// No iptables is installed.
pub(crate) async fn detect(entered: &Entered) -> Result<Variant, InterceptionError> {
    match find(entered, Variant::Legacy).await {
        Err(missing) if missing.is_missing_program() => {
            find(entered, Variant::Nft).await.map_err(|_| missing)
        }
        result => result,
    }
}

/// A variant, if its programs are there.
///
/// # Errors
///
/// One of them is not.
pub(crate) async fn find(
    entered: &Entered,
    variant: Variant,
) -> Result<Variant, InterceptionError> {
    for family in families() {
        exec::find(entered, variant, family).await?;
    }
    Ok(variant)
}

/// Replaces what an earlier run left by the plan, IPv4 first. Applied twice, it is the same ruleset.
///
/// # Errors
///
/// A user or group of the plan does not exist here; a program is missing or failed. What was changed
/// until then is put back, as far as that is possible.
pub(crate) async fn apply(
    entered: &Entered,
    variant: Variant,
    plan: &RulePlan,
) -> Result<(), InterceptionError> {
    const OPERATION: &str = "install the iptables rules";
    owners::check(plan)?;
    let mut steps = Vec::new();
    for family in families() {
        let mut wanted = Ours::of_plan(plan, family);
        let before = installed_of(entered, OPERATION, variant, family, &wanted).await?;
        wanted.keep_places(&before);
        steps.push(Step { family, before, wanted });
    }
    for (done, step) in steps.iter().enumerate() {
        let Step { family, before, wanted } = step;
        let Err(error) = change(entered, OPERATION, variant, *family, before, wanted).await else {
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

/// How often each rule of the plan matched, both families together, in the order of the plan; empty if
/// nothing of ours is installed.
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
        empty &= Ours::installed(&ruleset, &Ours::of_plan(plan, family)).is_empty();
        count(&mut counters, &ruleset, plan, family);
    }
    Ok(if empty { Vec::new() } else { counters })
}

/// Takes out all our chains and the rules that are ours in others, whatever plan they were of; `false`
/// if there were none. Chains that only have the names of ours stay, unless `scope` includes them.
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
    let nothing = Ours::default();
    let mut any = false;
    for family in families() {
        let ours = match installed_of(entered, OPERATION, variant, family, &nothing).await {
            // Where there is no nf_tables, nothing can be in it.
            Err(InterceptionError::Iptables { module: Some("nf_tables"), .. }) => continue,
            ours => ours?,
        };
        let ours = match scope {
            RemovalScope::Own => ours.marked(),
            RemovalScope::OtherMeshes => ours,
        };
        change(entered, OPERATION, variant, family, &ours, &nothing).await?;
        any |= !ours.is_empty();
    }
    if any && variant == Variant::Nft {
        nftables::remove_bare_iptables_tables(entered).await?;
    }
    Ok(any)
}

/// What is installed of ours, `None` if nothing is: our chains wholly, and of the others what is ours.
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
        let planned = Ours::of_plan(plan, family);
        let ours = installed_of(entered, OPERATION, variant, family, &planned).await?;
        listing.sections.extend(ours.sections(family));
    }
    Ok((!listing.sections.is_empty()).then_some(listing))
}

/// What [`installed`] gives when all is well: the same for both variants.
pub(crate) fn expected(plan: &RulePlan) -> Listing {
    let sections =
        families().into_iter().flat_map(|family| Ours::of_plan(plan, family).sections(family));
    Listing { sections: sections.collect() }
}

/// Everybody's rules.
pub(crate) async fn saved(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
) -> Result<Ruleset, InterceptionError> {
    let ruleset = Ruleset::parse(&exec::save(entered, operation, variant, family).await?);
    Ok(ruleset)
}

struct Step {
    family: Family,
    before: Ours,
    wanted: Ours,
}

/// Those that the kernel has.
fn families() -> Vec<Family> {
    if ipv6_available() { vec![Family::V4, Family::V6] } else { vec![Family::V4] }
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// A table that iptables-nft cannot print matters if ours are in it, or shall be.
async fn installed_of(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
    planned: &Ours,
) -> Result<Ours, InterceptionError> {
    let ruleset = saved(entered, operation, variant, family).await?;
    for table in &ruleset.incompatible {
        let kernel_family = match family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        let chains = nftables::chains(entered, kernel_family, table).await?;
        if planned.has_table(table) || chains.iter().any(|chain| is_ours(chain)) {
            let table = table.clone();
            return Err(InterceptionError::IptablesIncompatible { operation, table });
        }
    }
    Ok(Ours::installed(&ruleset, planned))
}

async fn change(
    entered: &Entered,
    operation: &'static str,
    variant: Variant,
    family: Family,
    from: &Ours,
    to: &Ours,
) -> Result<(), InterceptionError> {
    let body = from.change_to(to);
    if body.is_empty() {
        return Ok(());
    }
    exec::restore(entered, operation, variant, family, &body).await
}

/// Puts back what there was before; whether that succeeded.
async fn undo(entered: &Entered, variant: Variant, steps: &[Step]) -> bool {
    const OPERATION: &str = "put back the iptables rules";
    let mut undone = true;
    for Step { family, before, wanted } in steps.iter().rev() {
        let result = match installed_of(entered, OPERATION, variant, *family, wanted).await {
            Ok(now) => change(entered, OPERATION, variant, *family, &now, before).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            tracing::warn!(%error, family = name(*family), "the iptables rules could not be put back");
            undone = false;
        }
    }
    undone
}

/// Adds what the lines of each rule counted. Of two equal lines the first in the plan is the first in
/// the kernel.
fn count(counters: &mut [RuleCounter], ruleset: &Ruleset, plan: &RulePlan, family: Family) {
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
