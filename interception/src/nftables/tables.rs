//! The tables of others, of which iptables-nft's are some.
//!
//! Not here: what their rules mean (`leftovers.rs`).

use nlink::netlink::nftables::{ChainInfo, ChainKind, Family, Policy};

use super::{Kernel, ask};
use crate::{Entered, InterceptionError};

const OPERATION: &str = "read the nftables ruleset";

/// Every table of this namespace: its family in nft's words, and its name.
pub(crate) async fn tables(
    entered: &Entered,
) -> Result<Vec<(&'static str, String)>, InterceptionError> {
    let tables = ask(entered, OPERATION, async |kernel| kernel.list_tables().await).await?;
    Ok(tables.into_iter().map(|table| (table.family.name(), table.name)).collect())
}

/// The names of the chains of a table that [`tables`] told of.
pub(crate) async fn chains(
    entered: &Entered,
    family: &str,
    table: &str,
) -> Result<Vec<String>, InterceptionError> {
    let Ok(family) = family.parse() else { return Ok(Vec::new()) };
    let chains =
        ask(entered, OPERATION, async |kernel| kernel.list_chains_in(table, family).await).await?;
    Ok(chains.into_iter().map(|chain| chain.name).collect())
}

/// Removes the `inet` tables of which `is_wanted` holds; `false` if there were none.
pub(crate) async fn remove_tables(
    entered: &Entered,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<bool, InterceptionError> {
    ask(entered, "remove nftables tables of other meshes", async |kernel| {
        let tables = kernel.list_tables_in(Family::Inet).await?;
        let mut any = false;
        for table in tables.iter().filter(|table| is_wanted(&table.name)) {
            any |= kernel.del_table_if_exists(table.name.as_str(), Family::Inet).await?;
        }
        Ok(any)
    })
    .await
}

/// Takes out the tables that iptables-nft made and that do nothing: nothing but built-in chains
/// without a rule, which let everything pass.
pub(crate) async fn remove_bare_iptables_tables(
    entered: &Entered,
) -> Result<(), InterceptionError> {
    const IPTABLES: [&str; 5] = ["raw", "mangle", "nat", "filter", "security"];
    ask(entered, "remove empty tables of iptables", async |kernel| {
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

/// Whoever changes the ruleset between the look and the removal may have begun to use the table: it
/// then stays.
async fn remove_if_bare(kernel: &Kernel, family: Family, table: &str) -> nlink::Result<()> {
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

async fn is_bare(kernel: &Kernel, family: Family, table: &str) -> nlink::Result<bool> {
    let lets_pass = |chain: &ChainInfo| match chain.kind() {
        Some(ChainKind::Base(base)) => base.default_policy() != Some(Policy::Drop),
        _ => false,
    };
    Ok(kernel.list_rules(table, family).await?.is_empty()
        && kernel.list_sets_in(table, family).await?.is_empty()
        && kernel.list_chains_in(table, family).await?.iter().all(lets_pass))
}
