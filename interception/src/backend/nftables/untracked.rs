//! Exempts the proxy's connections from conntrack while the first rules are installed.
//!
//! The kernel registers conntrack for a namespace before the rules of the same transaction apply. A
//! packet that the proxy sends in between would create an entry in the default zone. The rule that
//! assigns a zone (`proxy-zone`, plan/ambient.rs) would then make the next packet a new connection.
//! nat gives that one another source port, because the first entry uses its own
//! (`get_unique_tuple`, net/netfilter/nf_nat_core.c), and the peer answers RST.

use std::fs;

use nlink::netlink::nftables::Family;

use super::{NftablesConnection, encode, expressions};
use crate::namespace::Entered;
use crate::plan::{Action, Chain, Direction, Hook, Rule, RulePlan, TABLE, Table};

/// The TCP counters of the thread's namespace (proc_net(5)).
const COUNTERS: &str = "/proc/thread-self/net/snmp";

/// Whether the namespace has open TCP connections. A new pod has none. Also true if the
/// counters cannot be read.
pub(super) fn has_connections(_: &Entered) -> bool {
    let counters = fs::read_to_string(COUNTERS).unwrap_or_default();
    open_connections(&counters) != Some(0)
}

/// The number of connections in the states ESTABLISHED and CLOSE-WAIT.
fn open_connections(counters: &str) -> Option<u64> {
    let mut lines = counters.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let mut counters = names.split(' ').zip(values.split(' '));
    counters.find(|(name, _)| *name == "CurrEstab")?.1.parse().ok()
}

/// Creates the table with rules that exempt those packets from conntrack to which the plan assigns
/// a zone. Returns `false` if there are none or the table exists: then it did nothing.
pub(super) async fn exempt(kernel: &NftablesConnection, plan: &RulePlan) -> nlink::Result<bool> {
    let is_zone = |rule: &&Rule| matches!(rule.action, Action::Zone(_, Some(Direction::Original)));
    let Some(chain) = output_chain(plan) else { return Ok(false) };
    let rules: Vec<_> = plan.rules().iter().filter(is_zone).collect();
    let tables = kernel.list_tables_in(Family::Inet).await?;
    if rules.is_empty() || tables.iter().any(|other| other.name == TABLE) {
        return Ok(false);
    }
    let name = chain.id.nftables_name();
    let transaction = kernel.transaction().add_table(TABLE, Family::Inet);
    let mut transaction = transaction.add_chain(encode::chain(chain)?);
    for rule in rules {
        transaction = transaction.add_rule(expressions::untracked(rule, &name));
    }
    match transaction.commit(kernel).await {
        // Another process created the table in the meantime.
        Err(error) if error.is_already_exists() => Ok(false),
        committed => committed.map(|()| true),
    }
}

/// Removes the table that [`exempt`] has created, unless another process has changed the ruleset
/// meanwhile.
pub(super) async fn undo(kernel: &NftablesConnection, plan: &RulePlan) -> nlink::Result<()> {
    let Some(chain) = output_chain(plan) else { return Ok(()) };
    let generation = kernel.generation().await?;
    let chains = kernel.list_chains_in(TABLE, Family::Inet).await?;
    let name = chain.id.nftables_name();
    if chains.is_empty() || chains.iter().any(|other| other.name != name) {
        return Ok(());
    }
    let removal = kernel.transaction().expect_generation(generation);
    match removal.del_table(TABLE, Family::Inet).commit(kernel).await {
        Err(error) if error.is_restart() => Ok(()),
        removed => removed,
    }
}

/// The chain in which the plan assigns the zones of packets that the proxy sends.
fn output_chain(plan: &RulePlan) -> Option<&Chain> {
    let is_output =
        |chain: &&Chain| chain.id.table == Table::Raw && chain.hook == Some(Hook::Output);
    plan.chains().iter().find(is_output)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn open_connections_are_counted() {
        let text = "Ip: Forwarding DefaultTTL\nIp: 1 64\n\
                    Tcp: RtoMin CurrEstab InSegs\nTcp: 200 7 9\nUdp: In\nUdp: 1\n";
        assert_eq!(open_connections(text), Some(7));
        assert_eq!(open_connections("Tcp: RtoMin\nTcp: 200\n"), None);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(has_connections(&Entered::current().unwrap()));
    }
}
