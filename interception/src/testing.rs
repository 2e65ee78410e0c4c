//! Access for kernel tests: custom plans, and the netlink backend. The product does not use it.

use crate::backend::nftables;
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::{Chain, Rule, RulePlan};

/// A plan with these chains and rules.
#[must_use]
pub fn plan(chains: Vec<Chain>, rules: Vec<Rule>) -> RulePlan {
    RulePlan { chains, rules, routes: Vec::new(), addresses: Vec::new() }
}

/// Installs the plan in the namespace.
///
/// # Errors
///
/// The kernel rejected it.
pub async fn apply(entered: &Entered, plan: &RulePlan) -> Result<(), InterceptionError> {
    nftables::apply(entered, plan).await
}

/// The installed and the planned sections.
///
/// # Errors
///
/// The kernel rejected the request.
pub async fn listings(
    entered: &Entered,
    plan: &RulePlan,
) -> Result<[Option<Sections>; 2], InterceptionError> {
    let sections = |listing: crate::backend::verify::Listing| {
        listing.sections.into_iter().map(|section| (section.head, section.lines)).collect()
    };
    let expected = nftables::expected(plan);
    Ok([nftables::installed(entered).await?.map(sections), Some(sections(expected))])
}

/// Heads with their lines.
pub type Sections = Vec<(String, Vec<String>)>;
