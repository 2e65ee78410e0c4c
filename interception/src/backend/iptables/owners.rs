//! Checks the users and groups of a plan before iptables does.
//!
//! The module xt_owner rejects ids outside of the user namespace with only "invalid argument".
//! nf_tables accepts any id.

use crate::error::InterceptionError;
use crate::plan::{Match, RulePlan};
use crate::process::user_ids::UserIds;

/// Rejects a plan with an unknown user or group. Without /proc, every id counts as known, and the
/// kernel rejects unknown ones.
pub(super) fn check(plan: &RulePlan) -> Result<(), InterceptionError> {
    let (users, groups) = (UserIds::of_users(), UserIds::of_groups());
    for condition in plan.rules().iter().flat_map(|rule| &rule.matches) {
        let (kind, ids, known) = match condition {
            Match::Uid(ids) | Match::NotUid(ids) => ("user", ids, &users),
            Match::Gid(ids) | Match::NotGid(ids) => ("group", ids, &groups),
            _ => continue,
        };
        if let Some(&id) = ids.iter().find(|id| !known.contain(**id)) {
            return Err(InterceptionError::IptablesOwner { kind, id });
        }
    }
    Ok(())
}
