//! Lists installed and planned rules in the same format, so that they can be compared.
//!
//! The line of a rule is its expressions in nft syntax, and its comment, which is the rule's id.
//! `verify` compares the lines.

use std::collections::BTreeMap;

use nlink::netlink::MessageBuilder;
use nlink::netlink::nftables::{
    ChainInfo, ChainKind, Expr, Family, NFT_TABLE_F_DORMANT, NFT_TABLE_F_OWNER, Policy,
    Rule as KernelRule, RuleExpr, RuleInfo, SetFlags, SetKeyType, parse_expressions,
    write_expressions,
};

use super::foreign::names;
use super::{NftablesConnection, expressions, named_sets, owner, sets, with_connection};
use crate::backend::verify::{Listing, Section};
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::nft::{NamedSet, Statement};
use crate::plan::{Chain, Families, Rule, RulePlan, TABLE};

const OPERATION: &str = "read the nftables rules";

/// Lists the table of a pod's rules. `None` if it does not exist.
pub(crate) async fn installed(entered: &Entered) -> Result<Option<Listing>, InterceptionError> {
    installed_table(entered, TABLE).await
}

/// Lists a table. `None` if it does not exist.
pub(super) async fn installed_table(
    entered: &Entered,
    table: &str,
) -> Result<Option<Listing>, InterceptionError> {
    with_connection(entered, OPERATION, async |kernel| {
        /// The number of attempts if another program changes the ruleset during the listing.
        const ATTEMPTS: usize = 5;
        let mut generation = kernel.generation().await?;
        let mut listing = read_if_present(kernel, table).await?;
        for _ in 1..ATTEMPTS {
            let now = kernel.generation().await?;
            if now == generation {
                break;
            }
            generation = now;
            listing = read_if_present(kernel, table).await?;
        }
        Ok(listing)
    })
    .await
}

/// Reads a table. A table that is removed meanwhile counts as missing.
async fn read_if_present(
    kernel: &NftablesConnection,
    table: &str,
) -> nlink::Result<Option<Listing>> {
    match read(kernel, table).await {
        Err(error) if error.is_not_found() => Ok(None),
        listing => listing,
    }
}

/// The listing that [`installed`] returns after a plan was installed.
pub(crate) fn expected(plan: &RulePlan) -> Listing {
    let mut sections = vec![Section { head: table_head(TABLE, 0), lines: Vec::new() }];
    for chain in plan.chains() {
        let lines = plan.rules_in(chain.id).map(planned_rule).collect();
        sections.push(Section { head: planned_chain(chain), lines });
    }
    sections.extend(named_sets(plan).map(|set| planned_set(&set)));
    sorted(sections)
}

pub(super) fn planned_set(set: &NamedSet) -> Section {
    let key = sets::key_type(&set.values);
    let head = set_head(&set.name, &key, sets::flags(&set.values), "");
    Section { head, lines: sets::planned_lines(&set.values) }
}

async fn read(kernel: &NftablesConnection, name: &str) -> nlink::Result<Option<Listing>> {
    let tables = kernel.list_tables_in(Family::Inet).await?;
    let Some(table) = tables.into_iter().find(|table| table.name == name) else {
        return Ok(None);
    };
    let mut sections = vec![Section { head: table_head(name, table.flags), lines: Vec::new() }];
    let rules = kernel.list_rules(name, Family::Inet).await?;
    for chain in kernel.list_chains_in(name, Family::Inet).await? {
        if owner::is_owner(&chain, &rules) {
            continue;
        }
        let own = rules.iter().filter(|rule| rule.chain == chain.name);
        let lines = own.map(installed_rule).collect();
        sections.push(Section { head: installed_chain(&chain), lines });
    }
    for set in kernel.list_sets_in(name, Family::Inet).await? {
        let key = SetKeyType::from_kernel(set.key_type, set.key_len);
        let interval = set.flags.contains(SetFlags::INTERVAL);
        // The sets of a plan have no values (maps), timeouts or statements.
        let rest = match (set.timeout, set.data_type, set.object_type, set.statements.as_slice()) {
            (None, None, None, []) => String::new(),
            _ => " with a timeout, values or statements".to_owned(),
        };
        let elements = kernel.list_set_elements(name, &set.name, Family::Inet).await?;
        sections.push(Section {
            head: set_head(&set.name, &key, set.flags, &rest),
            lines: sets::installed_lines(&key, interval, &elements),
        });
    }
    for flowtable in kernel.list_flowtables_in(name, Family::Inet).await? {
        sections.push(Section { head: format!("flowtable {}", flowtable.name), lines: Vec::new() });
    }
    for object in kernel.list_objects_in(name, Family::Inet).await? {
        let kind = format!("{:?}", object.object_type()).to_lowercase();
        let head = format!("object {} of type {kind}", object.name);
        sections.push(Section { head, lines: Vec::new() });
    }
    Ok(Some(sorted(sections)))
}

/// Readable lines for rules that nlink cannot print in nft syntax. Includes both families: after
/// IPv6 was enabled or disabled, the kernel may have rules that are no longer planned.
pub(crate) fn readable(plan: &RulePlan) -> BTreeMap<String, String> {
    let families = [Families::Both, Families::V4, Families::V6];
    let rules = plan
        .rules()
        .iter()
        .flat_map(|rule| families.into_iter().map(|families| Rule { families, ..rule.clone() }));
    rules
        .map(|rule| (planned_rule(&rule), format!("{} comment \"{}\"", Statement(&rule), rule.id)))
        .filter(|(line, _)| line.starts_with(NO_SYNTAX))
        .collect()
}

/// A readable line for an unplanned rule that nlink cannot print: its kinds of expressions and its
/// comment.
pub(crate) fn readable_unknown(line: &str) -> Option<String> {
    let (names, rest) = line.strip_prefix(NO_SYNTAX)?.split_once(": ")?;
    let comment =
        rest.rsplit_once("comment \"").map(|(_, comment)| format!(" comment \"{comment}"));
    let comment = comment.unwrap_or_default();
    Some(format!(
        "a rule of the expressions {names} (`nft list table inet {TABLE}` prints it){comment}"
    ))
}

/// Sorts sections, because the kernel's order of creation has no meaning.
pub(super) fn sorted(mut sections: Vec<Section>) -> Listing {
    sections.sort_by(|a, b| a.head.cmp(&b.head));
    Listing { sections }
}

pub(super) fn table_head(name: &str, flags: u32) -> String {
    let flag_names = [(NFT_TABLE_F_DORMANT, " dormant"), (NFT_TABLE_F_OWNER, " owner")];
    let set = flag_names.into_iter().filter(|(flag, _)| flags & flag != 0);
    let flag_names: String = set.map(|(_, name)| name).collect();
    format!("table inet {name}{flag_names}")
}

fn planned_chain(chain: &Chain) -> String {
    let name = chain.id.nftables_name();
    let Some(hook) = chain.hook else { return regular_chain_head(&name) };
    base_chain_head(&name, chain.kind(), hook, chain.id.table.priority(), "accept")
}

fn installed_chain(chain: &ChainInfo) -> String {
    match chain.kind() {
        Some(ChainKind::Regular) => regular_chain_head(&chain.name),
        Some(ChainKind::Base(base)) if base.devices().is_empty() => {
            let policy = match base.default_policy() {
                Some(Policy::Drop) => "drop",
                _ => "accept",
            };
            let (kind, priority) = (base.chain_type().as_str(), base.priority().to_i32());
            base_chain_head(&chain.name, kind, base.hook(), priority, policy)
        }
        // A planned chain has no devices, and has a known hook and type.
        _ => {
            format!(
                "chain {} of another hook or of devices: {}",
                chain.name,
                chain.devices.join(", ")
            )
        }
    }
}

fn regular_chain_head(name: &str) -> String {
    format!("chain {name}")
}

pub(super) fn base_chain_head(
    name: &str,
    kind: impl std::fmt::Display,
    hook: impl std::fmt::Display,
    priority: i32,
    policy: &str,
) -> String {
    format!("chain {name} {{ type {kind} hook {hook} priority {priority}; policy {policy}; }}")
}

/// The first line of a set. `rest` contains additional properties.
fn set_head(name: &str, key: &SetKeyType, flags: SetFlags, rest: &str) -> String {
    let flags = match flags {
        SetFlags(0) => String::new(),
        SetFlags::INTERVAL => " flags interval;".to_owned(),
        SetFlags(flags) => format!(" flags {flags:#x};"),
    };
    format!("set {name} {{ type {};{flags}{rest} }}", sets::type_name(key))
}

fn planned_rule(rule: &Rule) -> String {
    let line = expressions::rule(rule)
        .and_then(|kernel_rule| Ok(line(&kernel_rule, &expressions::expressions(rule)?, &rule.id)));
    // A rule that cannot be encoded cannot be installed: this line equals no installed rule.
    line.unwrap_or_else(|error| format!("{}: {error}", rule.id))
}

/// The line of a planned rule with these expressions.
pub(super) fn line(kernel_rule: &KernelRule, expressions: &[Expr], comment: &str) -> String {
    let syntax = kernel_rule.nft_syntax_stateless();
    syntax.unwrap_or_else(|| without_syntax(&decoded(expressions), Some(comment)))
}

fn installed_rule(rule: &RuleInfo) -> String {
    let syntax = rule.nft_syntax_stateless();
    syntax.unwrap_or_else(|| without_syntax(&rule.expressions(), rule.comment_text.as_deref()))
}

/// Decodes the expressions of a rule as the kernel would list them.
fn decoded(expressions: &[Expr]) -> Vec<RuleExpr> {
    /// The length of a message header (struct nlmsghdr) and of a list header (struct nlattr).
    const HEADERS: usize = 16 + 4;
    let mut message = MessageBuilder::new(0, 0);
    write_expressions(&mut message, expressions);
    parse_expressions(message.as_bytes().get(HEADERS..).unwrap_or_default())
}

/// A prefix that no rule in nft syntax has.
const NO_SYNTAX: &str = "expressions ";

/// The line of a rule that nlink cannot print in nft syntax, such as `ct original zone set`.
fn without_syntax(expressions: &[RuleExpr], comment: Option<&str>) -> String {
    let values = expressions.iter().map(|expression| match expression {
        RuleExpr::Counter { .. } => "counter".to_owned(),
        expression => format!("{expression:?}"),
    });
    let comment = comment.map(|comment| format!("comment \"{comment}\""));
    let values = values.chain(comment).collect::<Vec<_>>().join(" ");
    // The names are for operators, the values for the comparison.
    format!("{NO_SYNTAX}{}: {values}", names(expressions).replace(' ', ", "))
}
