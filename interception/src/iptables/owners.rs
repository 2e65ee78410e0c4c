//! Whether the kernel will take the users and groups of a plan: xt_owner refuses, with a mere "invalid
//! argument", what the user namespace does not have. (nf_tables compares any number.)

use crate::InterceptionError;
use crate::plan::{Match, RulePlan};
use crate::user_ids::UserIds;

/// Refuses a plan with a user or group that does not exist here. Where /proc does not say, the kernel
/// will.
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
