//! The nftables backend: installs, reads and removes a plan over netlink.

mod closing;
mod encode;
mod expressions;
mod foreign;
pub(crate) mod host;
mod listing;
mod owner;
mod sets;
mod tables;
mod untracked;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};
use nlink::netlink::nftables::{Family, Transaction};
use nlink::netlink::{Connection, Nftables};

pub(crate) use foreign::{ForeignChain, foreign_chains};
pub(crate) use listing::{expected, installed, readable, readable_unknown};
pub(crate) use owner::mark_owner;
pub(crate) use tables::{chains, remove_bare_iptables_tables, remove_tables, tables};

use crate::backend::netlink::{failed, into_io};
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::nft::{NamedSet, Operand, operands};
use crate::plan::{RulePlan, TABLE};

type NftablesConnection = Connection<Nftables>;

/// The operation that [`apply`] reports.
const INSTALL: &str = "install the nftables rules";

/// The counter of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleCounter {
    /// The id of the rule.
    pub id: String,
    /// The number of matching packets; in a nat chain, of connections.
    pub packets: u64,
    /// The number of their bytes.
    pub bytes: u64,
}

/// Checks that nf_tables is available, by reading the generation of the ruleset.
pub(crate) async fn check_available(entered: &Entered) -> Result<(), InterceptionError> {
    const OPERATION: &str = "read the nftables ruleset";
    let kernel = connect(entered, OPERATION)?;
    match kernel.generation().await {
        Ok(_) => Ok(()),
        Err(error) if error.is_permission_denied() => Err(failed(OPERATION)(error)),
        // Any other error means that the kernel lacks nf_tables: nfnetlink returns EINVAL then.
        Err(error) => Err(InterceptionError::Unsupported {
            operation: OPERATION,
            module: "nf_tables",
            source: into_io(error),
        }),
    }
}

/// Replaces the table by the plan in one transaction: a packet passes either the old or the new
/// rules. Records the owner in the table. Before the first rules of a namespace with connections, a
/// transaction exempts those of the proxy (`untracked.rs`). A failure leaves no exemption.
pub(crate) async fn apply(
    entered: &Entered,
    plan: &RulePlan,
    owner: Option<&str>,
) -> Result<(), InterceptionError> {
    let is_exempt = untracked::has_connections(entered)
        && with_connection(entered, INSTALL, async |kernel| untracked::exempt(kernel, plan).await)
            .await?;
    let replaced = replace_by_plan(entered, plan, owner).await;
    if replaced.is_err() && is_exempt {
        let undo = async |kernel: &_| untracked::undo(kernel, plan).await;
        if let Err(error) = with_connection(entered, "remove the exemption", undo).await {
            let hint = "run `underpass rules remove`";
            tracing::warn!(%error, hint, "connections of the proxy stay exempt from conntrack");
        }
    }
    replaced
}

async fn replace_by_plan(
    entered: &Entered,
    plan: &RulePlan,
    owner: Option<&str>,
) -> Result<(), InterceptionError> {
    let elements: usize = named_sets(plan).map(|set| set.values.len()).sum();
    let size = TableSize { entries: plan.chains().len() + 2 * plan.rules().len(), elements };
    let add = |transaction| {
        let all = add_all(transaction, plan)?;
        match owner {
            Some(owner) => Ok(all.add_chain(owner::chain(owner)?)),
            None => Ok(all),
        }
    };
    replace_table(entered, INSTALL, TABLE, size, &add).await
}

/// The content of a table, to estimate the size of a transaction.
struct TableSize {
    entries: usize,
    elements: usize,
}

/// A function that adds the content of a table to a transaction.
type AddContent<'a> = &'a dyn Fn(Transaction) -> nlink::Result<Transaction>;

/// Replaces the content of a table in one transaction.
async fn replace_table(
    entered: &Entered,
    operation: &'static str,
    table: &str,
    size: TableSize,
    add: AddContent<'_>,
) -> Result<(), InterceptionError> {
    with_connection(entered, operation, async |kernel| {
        enlarge_send_buffer(kernel, &size);
        let tables = kernel.list_tables_in(Family::Inet).await?;
        let replace = tables.iter().any(|other| other.name == table);
        match commit(kernel, table, replace, add).await {
            // Another process created the table in the meantime.
            Err(error) if !replace && error.is_already_exists() => {
                commit(kernel, table, true, add).await
            }
            committed => committed,
        }
    })
    .await
}

/// Reads the counters of the installed rules in order. Empty if the table does not exist.
pub(crate) async fn counters(entered: &Entered) -> Result<Vec<RuleCounter>, InterceptionError> {
    const OPERATION: &str = "read the nftables rules";
    let rules = with_connection(entered, OPERATION, async |kernel| {
        kernel.list_rules(TABLE, Family::Inet).await
    })
    .await?;
    let counters = rules.into_iter().filter_map(|rule| {
        let (packets, bytes) = rule.counter()?;
        Some(RuleCounter { id: rule.comment_text?, packets, bytes })
    });
    Ok(counters.collect())
}

/// Removes the table. Returns `false` if it did not exist.
pub(crate) async fn remove(entered: &Entered) -> Result<bool, InterceptionError> {
    const OPERATION: &str = "remove the nftables rules";
    with_connection(entered, OPERATION, async |kernel| {
        kernel.del_table_if_exists(TABLE, Family::Inet).await
    })
    .await
}

/// Runs `request` on a new netlink connection, and closes the connection on another thread
/// (`closing`).
async fn with_connection<T>(
    entered: &Entered,
    operation: &'static str,
    request: impl AsyncFnOnce(&NftablesConnection) -> nlink::Result<T>,
) -> Result<T, InterceptionError> {
    let kernel = connect(entered, operation)?;
    let answer = request(&kernel).await;
    closing::close(kernel);
    answer.map_err(failed(operation))
}

fn connect(_: &Entered, operation: &'static str) -> Result<NftablesConnection, InterceptionError> {
    NftablesConnection::new().map_err(failed(operation))
}

/// Adds the table with its content. If `replace` is true, deletes the old table first, after an
/// addition that makes the deletion succeed if there is none. (The message NFT_MSG_DESTROYTABLE
/// needs Linux 6.3.) Otherwise deletes nothing, because a deletion delays closing the connection:
/// see [`with_connection`].
async fn commit(
    kernel: &NftablesConnection,
    table: &str,
    replace: bool,
    add: AddContent<'_>,
) -> nlink::Result<()> {
    let mut transaction = kernel.transaction();
    if replace {
        let any = transaction.update_table(table, Family::Inet, 0);
        transaction = any.del_table(table, Family::Inet);
    }
    add(transaction.add_table(table, Family::Inet))?.commit(kernel).await
}

fn add_all(mut transaction: Transaction, plan: &RulePlan) -> nlink::Result<Transaction> {
    for chain in plan.chains() {
        transaction = transaction.add_chain(encode::chain(chain)?);
    }
    for (id, set) in (1..).zip(named_sets(plan)) {
        transaction =
            sets::messages(TABLE, &set, id).into_iter().fold(transaction, Transaction::raw);
    }
    for rule in plan.rules() {
        transaction = transaction.add_rule(expressions::rule(rule)?);
    }
    Ok(transaction)
}

/// All sets that the rules reference.
fn named_sets(plan: &RulePlan) -> impl Iterator<Item = NamedSet> {
    plan.rules().iter().flat_map(operands).filter_map(Operand::into_set)
}

/// Enlarges the send buffer: the kernel accepts a transaction only as one message (EMSGSIZE
/// otherwise). Without CAP_NET_ADMIN in the initial user namespace, `net.core.wmem_max` is the
/// limit.
fn enlarge_send_buffer(kernel: &NftablesConnection, size: &TableSize) {
    /// An upper bound for the size of one chain, set or rule in bytes.
    const MAX_ENTRY_BYTES: usize = 2048;
    let size = (size.entries + 8) * MAX_ENTRY_BYTES + size.elements * sets::MAX_ELEMENT_BYTES;
    let socket = kernel.socket();
    let grown =
        setsockopt(socket, SndBufForce, &size).or_else(|_| setsockopt(socket, SndBuf, &size));
    if let Err(error) = grown {
        tracing::debug!(%error, size, "cannot enlarge the netlink send buffer");
    }
}
