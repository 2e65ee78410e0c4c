//! Lists and removes tables of other programs, including iptables-nft.
//!
//! `leftovers` interprets them.

use nlink::netlink::nftables::{ChainInfo, ChainKind, Family, Policy};

use super::{NftablesConnection, with_connection};
use crate::error::InterceptionError;
use crate::namespace::Entered;

const OPERATION: &str = "read the nftables ruleset";

/// Lists the tables of this namespace: the family in nft syntax, and the name.
pub(crate) async fn tables(
    entered: &Entered,
) -> Result<Vec<(&'static str, String)>, InterceptionError> {
    let tables =
        with_connection(entered, OPERATION, async |kernel| kernel.list_tables().await).await?;
    Ok(tables.into_iter().map(|table| (table.family.name(), table.name)).collect())
}

/// The names of the chains in a table from [`tables`].
pub(crate) async fn chains(
    entered: &Entered,
    family: &str,
    table: &str,
) -> Result<Vec<String>, InterceptionError> {
    let Ok(family) = family.parse() else { return Ok(Vec::new()) };
    let chains = with_connection(entered, OPERATION, async |kernel| {
        kernel.list_chains_in(table, family).await
    })
    .await?;
    Ok(chains.into_iter().map(|chain| chain.name).collect())
}

/// Removes the `inet` tables for which `is_wanted` returns true. Returns `false` if there were
/// none.
pub(crate) async fn remove_tables(
    entered: &Entered,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<bool, InterceptionError> {
    with_connection(entered, "remove nftables tables of other meshes", async |kernel| {
        let tables = kernel.list_tables_in(Family::Inet).await?;
        let mut any = false;
        for table in tables.iter().filter(|table| is_wanted(&table.name)) {
            any |= kernel.del_table_if_exists(table.name.as_str(), Family::Inet).await?;
        }
        Ok(any)
    })
    .await
}

/// Removes tables of iptables-nft that have no effect: only empty built-in chains with the policy
/// accept.
pub(crate) async fn remove_bare_iptables_tables(
    entered: &Entered,
) -> Result<(), InterceptionError> {
    const IPTABLES: [&str; 5] = ["raw", "mangle", "nat", "filter", "security"];
    with_connection(entered, "remove empty tables of iptables", async |kernel| {
        for family in [Family::Ip, Family::Ip6] {
            let tables = kernel.list_tables_in(family).await?;
            for table in tables.iter().filter(|table| IPTABLES.contains(&table.name.as_str())) {
                remove_if_bare(kernel, family, &table.name).await?;
            }
        }
        Ok(())
    })
    .await
}

/// Removes the table, unless another program changed the ruleset since the check.
async fn remove_if_bare(
    kernel: &NftablesConnection,
    family: Family,
    table: &str,
) -> nlink::Result<()> {
    let generation = kernel.generation().await?;
    if !is_bare(kernel, family, table).await? {
        return Ok(());
    }
    let removal = kernel.transaction().expect_generation(generation).del_table(table, family);
    match removal.commit(kernel).await {
        Err(error) if error.is_restart() => Ok(()),
        removed => removed,
    }
}

async fn is_bare(kernel: &NftablesConnection, family: Family, table: &str) -> nlink::Result<bool> {
    let lets_pass = |chain: &ChainInfo| match chain.kind() {
        Some(ChainKind::Base(base)) => base.default_policy() != Some(Policy::Drop),
        _ => false,
    };
    Ok(kernel.list_rules(table, family).await?.is_empty()
        && kernel.list_sets_in(table, family).await?.is_empty()
        && kernel.list_chains_in(table, family).await?.iter().all(lets_pass))
}
