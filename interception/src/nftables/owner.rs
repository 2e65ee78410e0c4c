//! The process that installed our table, as the comment of a chain that no rule jumps to: for people
//! who list the table.
//!
//! It changes without the rules when another process takes over. Not here: whether that process
//! still runs, which the table does not show.

use nlink::netlink::nftables::{Chain, ChainInfo, Family, RuleInfo};

use super::ask;
use crate::plan::TABLE;
use crate::{Entered, InterceptionError};

/// The chain. Chains of a plan have the name of a table before an underscore.
const CHAIN: &str = "owner";
/// The longest comment that the kernel's userdata can hold (NFT_USERDATA_MAXLEN, less its header).
const LONGEST: usize = 127;

/// Writes the comment into our table, which exists.
pub(crate) async fn mark_owner(entered: &Entered, owner: &str) -> Result<(), InterceptionError> {
    let mut comment = owner.to_owned();
    comment.truncate(comment.floor_char_boundary(LONGEST));
    ask(entered, "write the owner of the nftables rules", async |kernel| {
        let chain = Chain::new(TABLE, CHAIN)?.family(Family::Inet);
        let fresh = chain.clone().comment(&comment);
        // The first makes the deletion right where there was none. A chain keeps its first comment.
        let transaction = kernel.transaction().update_chain(chain);
        transaction.del_chain(TABLE, CHAIN, Family::Inet).add_chain(fresh).commit(kernel).await
    })
    .await
}

/// Whether this is that chain, as we made it: it is no part of the rules.
pub(super) fn is_owner(chain: &ChainInfo, rules: &[RuleInfo]) -> bool {
    chain.name == CHAIN && chain.hook.is_none() && rules.iter().all(|rule| rule.chain != CHAIN)
}
