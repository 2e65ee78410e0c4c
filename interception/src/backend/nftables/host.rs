//! Installs, reads and removes the rules in the host's network namespace over netlink.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nlink::netlink::nftables::{
    BaseChain, Chain as KernelChain, Expr, Family, FilterHook, NatAddr, NatExpr, NatHook, Policy,
    Priority, Rule as KernelRule, Transaction, Verdict,
};

use super::encode::octets;
use super::expressions::RuleEncoder;
use super::listing::{base_chain_head, installed_table, line, planned_set, sorted, table_head};
use super::{TableSize, readable_unknown, replace_table, sets, with_connection};
use crate::backend::verify::{Difference, Listing, Section};
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::host::{HOST_TABLE, HostAction, HostChain, HostPlan, HostRule};

/// Replaces the table by the plan in one transaction. Existing connections keep their translation.
pub(crate) async fn apply(entered: &Entered, plan: &HostPlan) -> Result<(), InterceptionError> {
    let entries = HostChain::ALL.len() + plan.rules().len() + plan.sets().len();
    let size = TableSize { entries, elements: plan.pods().len() };
    let add = |transaction| add_all(transaction, plan);
    replace_table(entered, "install the rules for kubelet probes", HOST_TABLE, size, &add).await
}

/// Changes the elements of the sets from those of the plan `old` to those of `new`. Returns `false`
/// if the plans have different rules.
pub(crate) async fn update(
    entered: &Entered,
    old: &HostPlan,
    new: &HostPlan,
) -> Result<bool, InterceptionError> {
    let Some(changed) = old.changed_elements(new) else { return Ok(false) };
    let removals = changed.removed.iter().flat_map(|set| sets::removals(HOST_TABLE, set));
    let additions = changed.added.iter().flat_map(|set| sets::additions(HOST_TABLE, set));
    let messages: Vec<_> = removals.chain(additions).collect();
    with_connection(entered, "change the rules for kubelet probes", async |kernel| {
        let transaction = messages.into_iter().fold(kernel.transaction(), Transaction::raw);
        transaction.commit(kernel).await
    })
    .await
    .map(|()| true)
}

/// Compares the installed rules with the plan. `None` if they are equal.
pub(crate) async fn verify(
    entered: &Entered,
    plan: &HostPlan,
) -> Result<Option<Difference>, InterceptionError> {
    let installed = installed_table(entered, HOST_TABLE).await?.unwrap_or_default();
    let difference = expected(plan).difference(&installed);
    let readable = |found: Difference| found.readable(&BTreeMap::new(), readable_unknown);
    Ok(difference.map(readable))
}

/// Removes the table. Returns `false` if it did not exist.
pub(crate) async fn remove(entered: &Entered) -> Result<bool, InterceptionError> {
    with_connection(entered, "remove the rules for kubelet probes", async |kernel| {
        kernel.del_table_if_exists(HOST_TABLE, Family::Inet).await
    })
    .await
}

fn add_all(mut transaction: Transaction, plan: &HostPlan) -> nlink::Result<Transaction> {
    for chain in HostChain::ALL {
        transaction = transaction.add_chain(kernel_chain(chain)?);
    }
    for (id, set) in (1..).zip(plan.sets()) {
        let messages = sets::messages(HOST_TABLE, &set, id);
        transaction = messages.into_iter().fold(transaction, Transaction::raw);
    }
    for rule in plan.rules() {
        transaction = transaction.add_rule(kernel_rule(&rule));
    }
    Ok(transaction)
}

fn kernel_chain(chain: HostChain) -> nlink::Result<KernelChain> {
    let priority = Priority::Custom(chain.priority());
    let base = match chain {
        HostChain::Prerouting => BaseChain::filter(FilterHook::Prerouting, priority),
        HostChain::Postrouting => BaseChain::nat(NatHook::Postrouting, priority),
    };
    let chain = KernelChain::new(HOST_TABLE, chain.name())?.family(Family::Inet);
    Ok(chain.base(base.policy(Policy::Accept)))
}

fn kernel_rule(rule: &HostRule) -> KernelRule {
    let kernel_rule = KernelRule::new(HOST_TABLE, rule.chain.name()).family(Family::Inet);
    expressions(rule).into_iter().fold(kernel_rule, KernelRule::then).comment(rule.id)
}

fn expressions(rule: &HostRule) -> Vec<Expr> {
    let mut body = RuleEncoder::default();
    for (condition, operand) in &rule.matches {
        body.condition(condition, operand);
    }
    body.add(Expr::Counter);
    match rule.action {
        HostAction::Drop => body.add(Expr::Verdict(Verdict::Drop)),
        HostAction::SourceNat(source) => {
            body.immediate(octets(source));
            body.add(source_nat(source));
        }
    }
    body.expressions
}

/// Translates the source address to the address in the first register, which
/// [`RuleEncoder::immediate`] loads.
fn source_nat(source: IpAddr) -> Expr {
    let family = if source.is_ipv4() { Family::Ip } else { Family::Ip6 };
    let mut nat = NatExpr::snat(family);
    nat.addr = NatAddr::Reg;
    Expr::Nat(nat)
}

fn expected(plan: &HostPlan) -> Listing {
    let mut sections = vec![Section { head: table_head(HOST_TABLE, 0), lines: Vec::new() }];
    for chain in HostChain::ALL {
        let (name, kind, priority) = (chain.name(), chain.kind(), chain.priority());
        let rules = plan.rules().into_iter().filter(|rule| rule.chain == chain);
        let planned = |rule: HostRule| line(&kernel_rule(&rule), &expressions(&rule), rule.id);
        let head = base_chain_head(name, kind, name, priority, "accept");
        sections.push(Section { head, lines: rules.map(planned).collect() });
    }
    sections.extend(plan.sets().iter().map(planned_set));
    sorted(sections)
}
