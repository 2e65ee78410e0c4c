//! The netlink backend: puts a plan into nf_tables, reads its counters and what is installed, takes
//! it out again.
//!
//! Not here: which rules there are (`plan.rs`).

mod encode;
mod expressions;
mod foreign;
mod listing;
mod owner;
mod sets;
mod tables;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};
use nlink::netlink::nftables::{Family, Transaction};
use nlink::netlink::{Connection, Nftables};

pub(crate) use foreign::{ForeignChain, foreign_chains};
pub(crate) use listing::{expected, installed, readable, readable_unknown};
pub(crate) use owner::mark_owner;
pub(crate) use tables::{chains, remove_bare_iptables_tables, remove_tables, tables};

use crate::netlink::{failed, into_io};
use crate::plan::nft::{NamedSet, Operand, operands};
use crate::plan::{RulePlan, TABLE};
use crate::privileges::confine_auxiliary_thread;
use crate::{Entered, InterceptionError};

type Kernel = Connection<Nftables>;

/// How often a rule matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleCounter {
    /// The id of the rule.
    pub id: String,
    /// Packets that matched; in a nat chain, connections.
    pub packets: u64,
    /// The bytes of those packets.
    pub bytes: u64,
}

/// Asks for the ruleset's generation: changes nothing, and fails where there is no nf_tables.
pub(crate) async fn reach(entered: &Entered) -> Result<(), InterceptionError> {
    const OPERATION: &str = "read the nftables ruleset";
    let kernel = connect(entered, OPERATION)?;
    match kernel.generation().await {
        Ok(_) => Ok(()),
        Err(error) if error.is_permission_denied() => Err(failed(OPERATION)(error)),
        // Whatever else the answer is, nobody answered for nf_tables: EINVAL from nfnetlink without
        // it.
        Err(error) => Err(InterceptionError::Unsupported {
            operation: OPERATION,
            module: "nf_tables",
            source: into_io(error),
        }),
    }
}

/// Replaces our table by the plan, in one transaction: packets see the old rules or the new ones.
pub(crate) async fn apply(entered: &Entered, plan: &RulePlan) -> Result<(), InterceptionError> {
    ask(entered, "install the nftables rules", async |kernel| {
        make_room(kernel, plan);
        let tables = kernel.list_tables_in(Family::Inet).await?;
        let replace = tables.iter().any(|table| table.name == TABLE);
        match commit(kernel, plan, replace).await {
            // Someone was faster.
            Err(error) if !replace && error.is_already_exists() => commit(kernel, plan, true).await,
            committed => committed,
        }
    })
    .await
}

/// The counters of the rules that are in the kernel, in their order; none if our table is not.
pub(crate) async fn counters(entered: &Entered) -> Result<Vec<RuleCounter>, InterceptionError> {
    const OPERATION: &str = "read the nftables rules";
    let rules =
        ask(entered, OPERATION, async |kernel| kernel.list_rules(TABLE, Family::Inet).await)
            .await?;
    let counters = rules.into_iter().filter_map(|rule| {
        let (packets, bytes) = rule.counter()?;
        Some(RuleCounter { id: rule.comment_text?, packets, bytes })
    });
    Ok(counters.collect())
}

/// Takes our table out; `false` if there was none.
pub(crate) async fn remove(entered: &Entered) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the nftables rules";
    ask(entered, OPERATION, async |kernel| kernel.del_table_if_exists(TABLE, Family::Inet).await)
        .await
}

/// Does something over a connection of its own, which is closed on a thread that may wait.
///
/// After a table has been deleted, by whomever, close(2) returns only when no CPU can be looking at
/// it any more, some ten milliseconds later (`nft_rcv_nl_event` flushes
/// `nf_tables_trans_destroy_work`, which waits for RCU, net/netfilter/nf_tables_api.c).
async fn ask<T>(
    entered: &Entered,
    operation: &'static str,
    request: impl AsyncFnOnce(&Kernel) -> nlink::Result<T>,
) -> Result<T, InterceptionError> {
    let kernel = connect(entered, operation)?;
    let answer = request(&kernel).await;
    close(kernel);
    answer.map_err(failed(operation))
}

/// Closes on another thread. If there is none to be had, the closure is dropped here, and the
/// connection with it.
fn close(kernel: Kernel) {
    let close = move || {
        // It lives for a moment.
        confine_auxiliary_thread().ok();
        drop(kernel);
    };
    std::thread::Builder::new().name("close".to_owned()).spawn(close).ok();
}

fn connect(_: &Entered, operation: &'static str) -> Result<Kernel, InterceptionError> {
    Kernel::new().map_err(failed(operation))
}

/// Add, delete, add: the first makes the delete right if the table has gone meanwhile. (The
/// kernel's own word for it, NFT_MSG_DESTROYTABLE, exists since Linux 6.3 only.) Where there is no
/// table nothing is deleted, as that costs more than all the rest: see [`ask`].
async fn commit(kernel: &Kernel, plan: &RulePlan, replace: bool) -> nlink::Result<()> {
    let mut transaction = kernel.transaction();
    if replace {
        let any = transaction.update_table(TABLE, Family::Inet, 0);
        transaction = any.del_table(TABLE, Family::Inet);
    }
    let transaction = transaction.add_table(TABLE, Family::Inet);
    add_all(transaction, plan)?.commit(kernel).await
}

fn add_all(mut transaction: Transaction, plan: &RulePlan) -> nlink::Result<Transaction> {
    for chain in plan.chains() {
        transaction = transaction.add_chain(encode::chain(chain)?);
    }
    for (id, set) in (1..).zip(named_sets(plan)) {
        transaction = sets::messages(&set, id).into_iter().fold(transaction, Transaction::raw);
    }
    for rule in plan.rules() {
        transaction = transaction.add_rule(expressions::rule(rule)?);
    }
    Ok(transaction)
}

/// All sets that the rules look up.
fn named_sets(plan: &RulePlan) -> impl Iterator<Item = NamedSet> {
    plan.rules().iter().flat_map(operands).filter_map(Operand::into_set)
}

/// The kernel takes a transaction in one piece only, and refuses one that is longer than the send
/// buffer (EMSGSIZE). Without CAP_NET_ADMIN in the first user namespace, `net.core.wmem_max` is as
/// far as that grows.
fn make_room(kernel: &Kernel, plan: &RulePlan) {
    /// More than any chain, set or rule takes.
    const EACH: usize = 2048;
    let elements: usize = named_sets(plan).map(|set| set.values.len()).sum();
    let size = (plan.chains().len() + 2 * plan.rules().len() + 8) * EACH + elements * sets::ELEMENT;
    let socket = kernel.socket();
    let grown =
        setsockopt(socket, SndBufForce, &size).or_else(|_| setsockopt(socket, SndBuf, &size));
    if let Err(error) = grown {
        tracing::debug!(%error, size, "the send buffer stays as it is");
    }
}
