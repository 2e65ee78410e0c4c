//! Whether the kernel will take the users and groups of a plan: xt_owner refuses, with a mere "invalid
//! argument", what the user namespace does not have. (nf_tables compares any number.)

use std::fs;

use crate::InterceptionError;
use crate::plan::{Match, RulePlan};

/// Refuses a plan with a user or group that does not exist here. Where /proc does not say, the kernel
/// will.
pub(super) fn check(plan: &RulePlan) -> Result<(), InterceptionError> {
    let [users, groups] = ["uid_map", "gid_map"].map(|map| {
        let map = fs::read_to_string(format!("/proc/thread-self/{map}")).unwrap_or_default();
        ranges(&map)
    });
    for condition in plan.rules().iter().flat_map(|rule| &rule.matches) {
        let (kind, ids, ranges) = match condition {
            Match::Uid(ids) | Match::NotUid(ids) => ("user", ids, &users),
            Match::Gid(ids) | Match::NotGid(ids) => ("group", ids, &groups),
            _ => continue,
        };
        if let Some(&id) = ids.iter().find(|id| !ranges.is_empty() && !has(ranges, **id)) {
            return Err(InterceptionError::IptablesOwner { kind, id });
        }
    }
    Ok(())
}

/// The first number and the count of each range, of the lines of user_namespaces(7): first inside, first
/// outside, count.
fn ranges(map: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace();
        Some((numbers.next()?.parse().ok()?, numbers.nth(1)?.parse().ok()?))
    };
    map.lines().filter_map(range).collect()
}

fn has(ranges: &[(u32, u32)], id: u32) -> bool {
    ranges.iter().any(|(first, count)| id.checked_sub(*first).is_some_and(|offset| offset < *count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_exists_within_the_ranges_of_the_map() {
        let map = ranges("         0       1000          1\n      1000     100000      65536\n");
        for (id, exists) in [(0, true), (1, false), (1000, true), (66_535, true), (66_536, false)] {
            assert_eq!(has(&map, id), exists, "{id}");
        }
    }

    #[test]
    fn in_the_initial_namespace_everybody_exists() {
        assert!(has(&ranges("         0          0 4294967295\n"), 4_294_967_294));
    }
}
