//! Lists foreign rules (rules of other programs) that act on the workload's packets before
//! underpass's rules do.
//!
//! For example, a rule may set the proxy's mark, redirect earlier, or disable connection tracking.
//! CNIs and kube-proxy need such rules, so they are only listed; the self-test checks whether
//! traffic is still captured. Counters and rules that only drop or accept are not listed.
//! `leftovers` finds rules that capture the same traffic.

pub(crate) mod effect;

use std::collections::BTreeSet;
use std::fmt;

use underpass_config::Profile;

use self::effect::effect_of_target;
use crate::backend::iptables::{Ruleset, SavedChain, SavedTable, Variant, is_own_chain, saved};
use crate::backend::leftovers::legacy_tables;
use crate::backend::nftables::ForeignChain;
use crate::backend::{Backend, nftables, routes};
use crate::error::InterceptionError;
use crate::namespace::Entered;
use crate::plan::{Family, RulePlan, Table};

pub use self::effect::Effect;

/// The maximum number of listed rules. Rules that set the proxy's mark come first.
const MAX_LISTED: usize = 32;

/// A rule of another program that acts before underpass's rules.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignRule {
    /// The table and chain: `table inet other, chain out (hook output, priority -200)`.
    pub location: String,
    /// The text of the rule, if possible in the syntax of the program that manages it.
    pub rule: String,
    /// The effect on packets that underpass would capture.
    pub effect: Effect,
}

impl fmt::Display for ForeignRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.location, self.rule, self.effect.name())
    }
}

impl ForeignRule {
    /// Returns true if the rule exempts packets from capture: it sets the proxy's mark. Only the
    /// ambient profile identifies the proxy by its mark.
    #[must_use]
    pub fn exempts_from_capture(&self, profile: Profile) -> bool {
        profile == Profile::Ambient && self.effect == Effect::SetsProxyMark
    }
}

/// Lists foreign rules in nftables, in both variants of iptables, and in policy routing.
///
/// Skips unreadable legacy tables, which `leftovers` reports.
///
/// # Errors
///
/// The kernel refused to list the rules.
pub(crate) async fn foreign_rules(
    entered: &Entered,
    backend: Backend,
    plan: &RulePlan,
) -> Result<Vec<ForeignRule>, InterceptionError> {
    let mut found = Vec::new();
    match nftables::foreign_chains(entered, last_priority()).await {
        Ok(chains) => found.extend(in_nftables(&chains, backend)),
        // With legacy iptables, the kernel may lack nf_tables.
        Err(_) if backend == Backend::Iptables(Variant::Legacy) => {}
        Err(error) => return Err(error),
    }
    for family in [Family::V4, Family::V6] {
        if legacy_tables(entered, family).is_empty() {
            continue;
        }
        match saved(entered, "read the legacy iptables rules", Variant::Legacy, family).await {
            Ok(ruleset) => {
                let own = backend == Backend::Iptables(Variant::Legacy);
                found.extend(in_iptables(&ruleset, family, own));
            }
            Err(error) => tracing::debug!(%error, "legacy iptables cannot be read"),
        }
    }
    let rules = routes::foreign_rules(entered, plan).await?;
    found.extend(rules.into_iter().map(|rule| ForeignRule {
        location: "policy routing".to_owned(),
        rule,
        effect: Effect::Routes,
    }));
    let order = |rule: &ForeignRule| (rule.effect != Effect::SetsProxyMark, rule.clone());
    found.sort_by_cached_key(order);
    found.dedup();
    found.truncate(MAX_LISTED);
    Ok(found)
}

/// The priority of the nat table. Foreign chains up to this priority run before underpass's; at the
/// same priority, the chain that was registered later runs first (`nf_hook_entries_grow`,
/// net/netfilter/core.c).
fn last_priority() -> i32 {
    Table::Nat.priority()
}

fn in_nftables(chains: &[ForeignChain], own: Backend) -> Vec<ForeignRule> {
    let own = own == Backend::Iptables(Variant::Nft);
    let mut found = Vec::new();
    for chain in chains.iter().filter(|chain| !(own && is_own_chain(&chain.name))) {
        // In a built-in chain of iptables, only rules before the jump to underpass's chain run
        // first.
        let before = chain
            .rules
            .iter()
            .take_while(|rule| !(own && rule.jumps_to.as_deref().is_some_and(is_own_chain)));
        for rule in before {
            let accepts = own && rule.accepts;
            if let Some(effect) = rule.effect.or_else(|| accepts.then_some(Effect::Accepts)) {
                found.push(ForeignRule {
                    location: chain.location(),
                    rule: rule.text.clone(),
                    effect,
                });
            }
        }
    }
    found
}

/// Selects the foreign rules in an `iptables-save` output that run before underpass's rules. `own`
/// is true if underpass's rules are in the same tables.
fn in_iptables(ruleset: &Ruleset, family: Family, own: bool) -> Vec<ForeignRule> {
    let program = match family {
        Family::V4 => "iptables-legacy",
        Family::V6 => "ip6tables-legacy",
    };
    let tables =
        ruleset.tables.iter().filter(|table| ["raw", "mangle", "nat"].contains(&&*table.name));
    let mut found = Vec::new();
    for table in tables {
        for chain in
            reachable(table).into_iter().filter(|chain| !(own && is_own_chain(&chain.name)))
        {
            for rule in &chain.rules {
                let target = target(&rule.text);
                if own && target.is_some_and(is_own_chain) {
                    break;
                }
                let effect = target.and_then(|target| effect_of_target(target, &rule.text, own));
                if let Some(effect) = effect {
                    let location =
                        format!("table {} of {program}, chain {}", table.name, chain.name);
                    let rule = format!("-A {} {}", chain.name, rule.text);
                    found.push(ForeignRule { location, rule, effect });
                }
            }
        }
    }
    found
}

/// The chains that packets traverse in PREROUTING and OUTPUT.
fn reachable(table: &SavedTable) -> Vec<&SavedChain> {
    let mut names: Vec<&str> = vec!["PREROUTING", "OUTPUT"];
    let mut seen = BTreeSet::new();
    let mut chains = Vec::new();
    while let Some(name) = names.pop() {
        let Some(chain) = table.chains.iter().find(|chain| chain.name == name) else { continue };
        if seen.insert(name) {
            names.extend(chain.rules.iter().filter_map(|rule| target(&rule.text)));
            chains.push(chain);
        }
    }
    chains
}

/// The target of a rule: the word after `-j` or `-g`.
fn target(rule: &str) -> Option<&str> {
    let mut words = rule.split_whitespace().skip_while(|word| !["-j", "-g"].contains(word));
    words.nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found_rules(saved: &str, own: bool) -> Vec<(String, Effect)> {
        let rules = in_iptables(&Ruleset::parse(saved), Family::V4, own).into_iter();
        rules.map(|rule| (rule.rule, rule.effect)).collect()
    }

    #[test]
    fn lists_rules_that_mark_redirect_and_untrack() {
        let saved = "*raw\n:OUTPUT ACCEPT [0:0]\n[0:0] -A OUTPUT -p tcp -j CT --notrack\nCOMMIT\n\
                     *mangle\n:OUTPUT ACCEPT [0:0]\n\
                     [0:0] -A OUTPUT -p tcp -j MARK --set-xmark 0x539/0xffffffff\n\
                     [0:0] -A OUTPUT -p udp -j MARK --set-xmark 0x1/0xffffffff\nCOMMIT\n\
                     *nat\n:OUTPUT ACCEPT [0:0]\n:THEIRS - [0:0]\n:UNUSED - [0:0]\n\
                     [0:0] -A OUTPUT -j THEIRS\n[0:0] -A THEIRS -p tcp -j REDIRECT --to-ports 1\n\
                     [0:0] -A UNUSED -p tcp -j REDIRECT --to-ports 2\nCOMMIT\n";
        let effects: Vec<_> =
            found_rules(saved, false).into_iter().map(|(_, effect)| effect).collect();
        let expected = [Effect::Untracks, Effect::SetsProxyMark, Effect::Marks, Effect::Redirects];
        assert_eq!(effects, expected);
    }

    #[test]
    fn ignores_counters_drops_and_accepts_of_others() {
        let saved = "*nat\n:OUTPUT ACCEPT [0:0]\n[0:0] -A OUTPUT -p tcp\n\
                     [0:0] -A OUTPUT -p udp -j ACCEPT\n[0:0] -A OUTPUT -p icmp -j DROP\nCOMMIT\n";
        assert_eq!(found_rules(saved, false), []);
    }

    #[test]
    fn lists_rules_before_own_jump() {
        let saved = "*nat\n:OUTPUT ACCEPT [0:0]\n:ISTIO_OUTPUT - [0:0]\n\
                     [0:0] -A OUTPUT -p tcp -j ACCEPT\n[0:0] -A OUTPUT -j ISTIO_OUTPUT\n\
                     [0:0] -A OUTPUT -p udp -j ACCEPT\n\
                     [0:0] -A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n";
        let expected = [("-A OUTPUT -p tcp -j ACCEPT".to_owned(), Effect::Accepts)];
        assert_eq!(found_rules(saved, true), expected);
    }
}
