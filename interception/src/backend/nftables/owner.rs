//! Records the process that installed the table, as the comment of an empty chain, for operators
//! who list the table.
//!
//! A hot restart changes only the comment. The comment does not show whether the process still
//! runs.

use nlink::netlink::nftables::{Chain, ChainInfo, Family, RuleInfo};

use super::with_connection;
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::TABLE;

/// The name of the chain. Planned chains have other names: they start with a table and `_`.
const CHAIN: &str = "owner";
/// The maximum length of a comment (NFT_USERDATA_MAXLEN without the header).
const MAX_COMMENT: usize = 127;

/// Writes the comment. The table must exist.
pub(crate) async fn mark_owner(entered: &Entered, owner: &str) -> Result<(), InterceptionError> {
    with_connection(entered, "write the owner of the nftables rules", async |kernel| {
        // Update before deleting, so that the deletion succeeds if the chain is missing. A chain
        // keeps its first comment, so the chain must be created again.
        let transaction = kernel.transaction().update_chain(bare_chain()?);
        let transaction = transaction.del_chain(TABLE, CHAIN, Family::Inet);
        transaction.add_chain(chain(owner)?).commit(kernel).await
    })
    .await
}

/// The owner chain with its comment.
pub(super) fn chain(owner: &str) -> nlink::Result<Chain> {
    let mut comment = owner.to_owned();
    comment.truncate(comment.floor_char_boundary(MAX_COMMENT));
    Ok(bare_chain()?.comment(&comment))
}

fn bare_chain() -> nlink::Result<Chain> {
    Ok(Chain::new(TABLE, CHAIN)?.family(Family::Inet))
}

/// Returns true for the owner chain, which is not part of a plan.
pub(super) fn is_owner(chain: &ChainInfo, rules: &[RuleInfo]) -> bool {
    chain.name == CHAIN && chain.hook.is_none() && rules.iter().all(|rule| rule.chain != CHAIN)
}
