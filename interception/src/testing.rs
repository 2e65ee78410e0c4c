//! What the kernel tests reach into: plans made by hand, and the netlink backend itself.
//!
//! Not here: anything that the product uses.

use crate::plan::{Chain, Rule, RulePlan};
use crate::{Entered, InterceptionError, nftables};

/// A plan of these rules alone.
#[must_use]
pub fn plan(chains: Vec<Chain>, rules: Vec<Rule>) -> RulePlan {
    RulePlan { chains, rules, routes: Vec::new(), addresses: Vec::new() }
}

/// Puts the plan into the namespace.
///
/// # Errors
///
/// The kernel refused.
pub async fn apply(entered: &Entered, plan: &RulePlan) -> Result<(), InterceptionError> {
    nftables::apply(entered, plan).await
}

/// What is installed, section by section, and what the plan wants.
///
/// # Errors
///
/// The kernel refused.
pub async fn listings(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<[Option<Sections>; 2], InterceptionError> {
    let sections = |listing: crate::verify::Listing| {
        listing.sections.into_iter().map(|section| (section.head, section.lines)).collect()
    };
    let expected = nftables::expected(plan);
    Ok([nftables::installed(entered).await?.map(sections), Some(sections(expected))])
}

/// Heads and lines.
pub type Sections = Vec<(String, Vec<String>)>;
