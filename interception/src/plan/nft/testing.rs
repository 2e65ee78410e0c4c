//! Rules and chains for unit tests.

use crate::plan::{Action, ChainId, Families, Match, Origin, Rule, Table};

pub(crate) const NAT_OUTPUT: ChainId = ChainId { table: Table::Nat, name: "OUTPUT" };

/// A rule with these matches and the action accept.
pub(crate) fn rule(id: &str, matches: Vec<Match>) -> Rule {
    Rule {
        id: id.to_owned(),
        reason: "a test",
        origin: Origin::Underpass,
        chain: NAT_OUTPUT,
        families: Families::Both,
        matches,
        action: Action::Accept,
        nftables_only: false,
    }
}
