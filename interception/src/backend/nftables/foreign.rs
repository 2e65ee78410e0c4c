//! Reads other programs' chains that packets pass before underpass's chains.
//!
//! `crate::backend::foreign` selects the rules that matter.

use std::collections::BTreeSet;

use nlink::netlink::AttrIter;
use nlink::netlink::nftables::{
    ChainInfo, ChainKind, CtKey, Family, MetaKey, NatType, RuleExpr, RuleInfo, Verdict,
};

use super::{NftablesConnection, with_connection};
use crate::backend::foreign::effect::{Effect, effect_of_target, sets_proxy_mark};
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::TABLE;

/// A chain of another program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForeignChain {
    family: &'static str,
    table: String,
    pub(crate) name: String,
    /// The hooks and priorities at which packets enter the chain: `hook output, priority -200`.
    hooks: String,
    pub(crate) rules: Vec<ForeignChainRule>,
}

/// A rule in another program's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForeignChainRule {
    pub(crate) text: String,
    pub(crate) effect: Option<Effect>,
    pub(crate) accepts: bool,
    pub(crate) jumps_to: Option<String>,
}

impl ForeignChain {
    pub(crate) fn location(&self) -> String {
        let Self { family, table, name, hooks, .. } = self;
        format!("table {family} {table}, chain {name} ({hooks})")
    }
}

/// Lists the foreign chains that packets pass in PREROUTING and OUTPUT up to priority `last`.
pub(crate) async fn foreign_chains(
    entered: &Entered,
    last: i32,
) -> Result<Vec<ForeignChain>, InterceptionError> {
    with_connection(entered, "read the nftables ruleset", async |kernel| {
        let mut found = Vec::new();
        for table in kernel.list_tables().await? {
            let of_ip = matches!(table.family, Family::Inet | Family::Ip | Family::Ip6);
            if of_ip && (table.family != Family::Inet || table.name != TABLE) {
                found.extend(in_table(kernel, table.family, &table.name, last).await?);
            }
        }
        Ok(found)
    })
    .await
}

async fn in_table(
    kernel: &NftablesConnection,
    family: Family,
    table: &str,
    last: i32,
) -> nlink::Result<Vec<ForeignChain>> {
    // Ignore a table that is removed during the listing.
    let chains = match kernel.list_chains_in(table, family).await {
        Err(error) if error.is_not_found() => return Ok(Vec::new()),
        chains => chains?,
    };
    let mut waiting: Vec<(String, String)> = chains
        .iter()
        .filter_map(|chain| Some((chain.name.clone(), hook_before(chain, last)?)))
        .collect();
    if waiting.is_empty() {
        return Ok(Vec::new());
    }
    let rules = match kernel.list_rules(table, family).await {
        Err(error) if error.is_not_found() => return Ok(Vec::new()),
        rules => rules?,
    };
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    while let Some((name, hooks)) = waiting.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let rules: Vec<_> = rules.iter().filter(|rule| rule.chain == name).map(described).collect();
        let jumps = rules.iter().filter_map(|rule| rule.jumps_to.clone());
        waiting.extend(jumps.map(|to| (to, hooks.clone())));
        found.push(ForeignChain {
            family: family.name(),
            table: table.to_owned(),
            name,
            hooks,
            rules,
        });
    }
    Ok(found)
}

/// The hook and priority of a base chain that runs before underpass's. `None` for other chains.
fn hook_before(chain: &ChainInfo, last: i32) -> Option<String> {
    let Some(ChainKind::Base(base)) = chain.kind() else { return None };
    let priority = base.priority().to_i32();
    let hook = base.hook().to_string();
    (["prerouting", "output"].contains(&hook.as_str()) && priority <= last)
        .then(|| format!("hook {hook}, priority {priority}"))
}

fn described(rule: &RuleInfo) -> ForeignChainRule {
    let expressions = rule.expressions();
    let text = rule.nft_syntax_stateless().unwrap_or_else(|| names(&expressions));
    let effect = expressions.iter().find_map(|expression| effect(expression, &text));
    let accepts = |expression: &RuleExpr| match expression {
        RuleExpr::Verdict(verdict) => matches!(verdict, Verdict::Accept),
        expression => xt_target(expression).as_deref() == Some("ACCEPT"),
    };
    let jumps_to = expressions.iter().find_map(|expression| match expression {
        RuleExpr::Verdict(Verdict::JumpTo(to) | Verdict::GotoTo(to)) => Some(to.to_string()),
        _ => None,
    });
    ForeignChainRule { accepts: expressions.iter().any(accepts), text, effect, jumps_to }
}

fn effect(expression: &RuleExpr, text: &str) -> Option<Effect> {
    match expression {
        RuleExpr::MetaSet { key: MetaKey::Mark, .. } if sets_proxy_mark(text) => {
            Some(Effect::SetsProxyMark)
        }
        RuleExpr::MetaSet { key: MetaKey::Mark, .. } | RuleExpr::CtSet { key: CtKey::Mark, .. } => {
            Some(Effect::Marks)
        }
        RuleExpr::Notrack | RuleExpr::CtSet { .. } => Some(Effect::Untracks),
        RuleExpr::Nat { nat_type: NatType::Dnat, .. } | RuleExpr::Redir { .. } => {
            Some(Effect::Redirects)
        }
        RuleExpr::Tproxy { .. } | RuleExpr::Queue(_) => Some(Effect::Diverts),
        expression => effect_of_target(&xt_target(expression)?, text, false),
    }
}

/// The name of an iptables target in nf_tables (xt compatibility).
fn xt_target(expression: &RuleExpr) -> Option<String> {
    /// NFTA_TARGET_NAME (include/uapi/linux/netfilter/nf_tables_compat.h).
    const NAME: u16 = 1;
    let RuleExpr::Unknown { name, data, .. } = expression else { return None };
    let mut attributes = AttrIter::new(data).filter(|_| name == "target");
    let (_, value) = attributes.find(|(kind, _)| *kind == NAME)?;
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(value).into_owned())
}

/// The names of expressions, for rules that nlink cannot print in nft syntax.
pub(super) fn names(expressions: &[RuleExpr]) -> String {
    let names = expressions.iter().map(|expression| match expression {
        RuleExpr::Unknown { name, .. } => match xt_target(expression) {
            Some(target) => format!("xt target {target}"),
            None => name.clone(),
        },
        expression => {
            let text = format!("{expression:?}").to_lowercase();
            text.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
        }
    });
    names.collect::<Vec<_>>().join(" ")
}
