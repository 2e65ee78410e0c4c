//! The user and group ids that exist in the process's user namespace (user_namespaces(7)).
//!
//! The kernel rejects other ids in ip rules, in the iptables owner match and in a change of user
//! with only "invalid argument".

use std::fs;

/// The users or the groups of the user namespace. If /proc is missing, all ids count as existing.
#[derive(Debug)]
pub(crate) struct UserIds {
    /// The first id of each range within the namespace, and the number of ids.
    ranges: Vec<(u32, u32)>,
}

impl UserIds {
    pub(crate) fn of_users() -> Self {
        Self::read("uid_map")
    }

    pub(crate) fn of_groups() -> Self {
        Self::read("gid_map")
    }

    fn read(map: &str) -> Self {
        let map = fs::read_to_string(format!("/proc/thread-self/{map}")).unwrap_or_default();
        Self::parse(&map)
    }

    /// Parses lines with three numbers: first id inside, first id outside, count.
    pub(crate) fn parse(map: &str) -> Self {
        let range = |line: &str| {
            let mut numbers = line.split_whitespace();
            Some((numbers.next()?.parse().ok()?, numbers.nth(1)?.parse().ok()?))
        };
        Self { ranges: map.lines().filter_map(range).collect() }
    }

    /// Whether the map was read and has an entry.
    pub(crate) fn is_known(&self) -> bool {
        !self.ranges.is_empty()
    }

    pub(crate) fn contain(&self, id: u32) -> bool {
        let has = |(first, count): &(u32, u32)| {
            id.checked_sub(*first).is_some_and(|offset| offset < *count)
        };
        !self.is_known() || self.ranges.iter().any(has)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_in_ranges_of_uid_map_exist() {
        let ids =
            UserIds::parse("         0       1000          1\n      1000     100000      65536\n");
        for (id, exists) in [(0, true), (1, false), (1000, true), (66_535, true), (66_536, false)] {
            assert_eq!(ids.contain(id), exists, "{id}");
        }
    }

    #[test]
    fn every_id_exists_in_initial_user_namespace() {
        let all = UserIds::parse("         0          0 4294967295\n");
        assert!(all.contain(0) && all.contain(15008) && all.contain(4_294_967_294));
        assert!(!all.contain(u32::MAX), "-1 is no user");
    }
}
