//! The ruleset of one family: parses `iptables-save`, selects the rules of underpass, and prints
//! changes.
//!
//! `exec` runs the programs; `plan::iptables` prints the rules of a plan.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::backend::verify::Section;
use crate::plan::{Action, Family, RulePlan, TABLES, Table};

/// The chains of all profiles. underpass owns chains with these names, since it replaces those of
/// Istio and OSM. It does not own Linkerd's `PROXY_INIT_…`.
const CHAINS: [&str; 13] = [
    "ISTIO_PRERT",
    "ISTIO_OUTPUT",
    "ISTIO_INBOUND",
    "ISTIO_REDIRECT",
    "ISTIO_IN_REDIRECT",
    "ISTIO_OUTPUT_DNS",
    "ISTIO_DROP",
    "ISTIO_DIVERT",
    "ISTIO_TPROXY",
    "PROXY_INBOUND",
    "PROXY_OUTPUT",
    "PROXY_IN_REDIRECT",
    "PROXY_REDIRECT",
];
/// The prefix of underpass's other chains.
const PREFIX: &str = "UNDERPASS_";
/// An empty chain that marks a table as installed by underpass. The names in [`CHAINS`] cannot mark
/// it, because Istio and OSM use them too.
const OWNER: &str = "UNDERPASS_OWNER";

/// Returns true if underpass owns chains of this name.
pub(crate) fn is_own_chain(chain: &str) -> bool {
    CHAINS.contains(&chain) || chain.starts_with(PREFIX)
}

/// Returns true for the chain that marks a table as installed by underpass.
pub(crate) fn is_owner_chain(chain: &str) -> bool {
    chain == OWNER
}

/// The parsed rules of all programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub(crate) tables: Vec<SavedTable>,
    /// The tables that iptables-nft cannot print: another program added rules that only nft
    /// supports.
    pub(crate) incompatible: Vec<String>,
}

/// A table in `iptables-save` output.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedTable {
    pub(crate) name: String,
    pub(crate) chains: Vec<SavedChain>,
}

/// A chain in `iptables-save` output.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedChain {
    pub(crate) name: String,
    pub(crate) rules: Vec<SavedRule>,
}

/// A rule in `iptables-save` output.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedRule {
    /// The text after the chain's name.
    pub(crate) text: String,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Ruleset {
    /// Parses the output of `iptables-save --counters`. Skips comments, policies, `COMMIT` and
    /// unknown lines.
    pub(crate) fn parse(text: &str) -> Self {
        let mut ruleset = Self::default();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                let name = name.trim().to_owned();
                ruleset.tables.push(SavedTable { name, ..SavedTable::default() });
            } else if let Some(table) = incompatible(line) {
                ruleset.incompatible.push(table.to_owned());
            } else if let Some(table) = ruleset.tables.last_mut() {
                table.read(line);
            }
        }
        ruleset
    }

    /// The rules of a chain; empty if the chain does not exist.
    pub(crate) fn rules(&self, table: &str, chain: &str) -> &[SavedRule] {
        let table = self.tables.iter().find(|saved| saved.name == table);
        let chain = table.and_then(|table| table.chains.iter().find(|saved| saved.name == chain));
        chain.map_or(&[], |chain| &chain.rules)
    }
}

/// Parses `` # Table `nat' is incompatible, use 'nft' tool. ``
fn incompatible(line: &str) -> Option<&str> {
    line.strip_prefix("# Table `")?.split_once("' is incompatible").map(|(table, _)| table)
}

impl SavedTable {
    /// Parses `:CHAIN POLICY [packets:bytes]` or `[packets:bytes] -A CHAIN rule`.
    fn read(&mut self, line: &str) {
        if let Some(chain) = line.strip_prefix(':') {
            let name = chain.split(' ').next().unwrap_or_default().to_owned();
            self.chains.push(SavedChain { name, rules: Vec::new() });
            return;
        }
        let (counters, rule) = match line.strip_prefix('[').and_then(|line| line.split_once("] ")) {
            Some((counters, rule)) => (counters, rule),
            None => ("", line),
        };
        let Some(rule) = rule.strip_prefix("-A ") else { return };
        let (name, text) = rule.split_once(' ').unwrap_or((rule, ""));
        let (packets, bytes) = counters.split_once(':').unwrap_or_default();
        let rule = SavedRule {
            text: text.to_owned(),
            packets: packets.parse().unwrap_or_default(),
            bytes: bytes.parse().unwrap_or_default(),
        };
        if let Some(chain) = self.chains.iter_mut().find(|chain| chain.name == name) {
            chain.rules.push(rule);
        }
    }
}

/// Normalizes the text of a rule. The abbreviation of addresses depends on the C library of the
/// iptables program.
pub(crate) fn canonical(text: &str) -> String {
    let mut option = "";
    let words = text.split(' ').map(|word| {
        let is_address = ["-s", "-d"].contains(&std::mem::replace(&mut option, word));
        let address = is_address.then(|| network(word)).flatten();
        address.map_or_else(|| word.to_owned(), |address| address.to_string())
    });
    words.collect::<Vec<_>>().join(" ")
}

fn network(word: &str) -> Option<IpNet> {
    let host = || word.parse::<IpAddr>().ok().map(IpNet::from);
    word.parse().ok().or_else(host)
}

/// The rules that underpass owns in one family's ruleset, planned or installed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct OwnRules {
    tables: BTreeMap<String, OwnTable>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct OwnTable {
    /// underpass's chains with their rules.
    chains: BTreeMap<String, Vec<String>>,
    /// underpass's rules in chains of other programs, in order.
    own_in_foreign_chains: Vec<OwnRuleInForeignChain>,
}

/// A rule of underpass in a chain of another program.
#[derive(Debug, Clone, PartialEq, Eq)]
struct OwnRuleInForeignChain {
    chain: String,
    text: String,
    /// The number of foreign rules before it. `None`: it follows all of them.
    after: Option<usize>,
}

impl OwnRules {
    /// The rules that a plan requires.
    ///
    /// In a built-in chain, underpass's rules follow foreign rules, as Istio's and OSM's do. In the
    /// filter table they precede them: a foreign rule that accepts would bypass the rejections.
    ///
    /// A later run recognizes a rule in a built-in chain by its jump to a chain of underpass. A
    /// rule without such a jump is also copied to a record: a chain that nothing jumps to.
    pub(crate) fn of_plan(plan: &RulePlan, family: Family) -> Self {
        let mut ours = Self::default();
        let lines = plan.lines(family);
        for table in TABLES {
            for chain in plan.chains_in(table, &lines) {
                let ours = ours.tables.entry(table.name().to_owned()).or_default();
                ours.chains.entry(OWNER.to_owned()).or_default();
                let lines = lines.iter().filter(|line| line.chain == chain);
                if !plan.is_built_in(chain) {
                    let texts = lines.map(|line| line.text.clone()).collect();
                    ours.chains.insert(chain.name.to_owned(), texts);
                    continue;
                }
                for line in lines {
                    if !matches!(line.rule.action, Action::Jump(_)) {
                        let record_chain = ours.chains.entry(record_chain(chain.name)).or_default();
                        record_chain.push(line.text.clone());
                    }
                    ours.own_in_foreign_chains.push(OwnRuleInForeignChain {
                        chain: chain.name.to_owned(),
                        text: line.text.clone(),
                        after: (table == Table::Filter).then_some(0),
                    });
                }
            }
        }
        ours
    }

    /// Selects the rules of underpass in a ruleset. In a foreign chain, these are rules that jump
    /// to a chain of underpass, that are recorded, or that equal one of `planned`.
    pub(crate) fn installed(ruleset: &Ruleset, planned: &Self) -> Self {
        let mut tables = BTreeMap::new();
        for table in &ruleset.tables {
            let mut ours = OwnTable::default();
            let (own, others): (Vec<_>, Vec<_>) =
                table.chains.iter().partition(|chain| is_own_chain(&chain.name));
            for chain in own {
                let texts = chain.rules.iter().map(|rule| rule.text.clone()).collect();
                ours.chains.insert(chain.name.clone(), texts);
            }
            for chain in others {
                let own_in_foreign_chains = own_in_foreign_chains(chain, |rule| {
                    jumps_to_own_chain(rule)
                        || ours.records(&chain.name, rule)
                        || planned.tables.get(&table.name).is_some_and(|planned| {
                            planned.contains_in_foreign_chain(&chain.name, rule)
                        })
                });
                ours.own_in_foreign_chains.extend(own_in_foreign_chains);
            }
            if ours != OwnTable::default() {
                tables.insert(table.name.clone(), ours);
            }
        }
        Self { tables }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    pub(crate) fn has_table(&self, name: &str) -> bool {
        self.tables.contains_key(name)
    }

    /// Selects the tables that underpass has marked.
    pub(crate) fn marked(mut self) -> Self {
        self.tables.retain(|_, table| table.chains.keys().any(|chain| chain.starts_with(PREFIX)));
        self
    }

    /// Copies the positions of `installed` rules among foreign rules.
    pub(crate) fn keep_positions(&mut self, installed: &Self) {
        for (name, table) in &mut self.tables {
            let Some(installed) = installed.tables.get(name) else { continue };
            for own in &mut table.own_in_foreign_chains {
                if let Some(first) =
                    installed.own_in_foreign_chains.iter().find(|old| old.chain == own.chain)
                {
                    own.after = first.after;
                }
            }
        }
    }

    /// Prints the input for `iptables-restore` that changes these rules to `wanted`, atomically for
    /// each table. Empty if both are empty.
    pub(crate) fn change_to(&self, wanted: &Self) -> String {
        let nothing = OwnTable::default();
        let mut text = String::new();
        let mut names: Vec<_> = self.tables.keys().chain(wanted.tables.keys()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let old = self.tables.get(name).unwrap_or(&nothing);
            let new = wanted.tables.get(name).unwrap_or(&nothing);
            text.push_str(&format!("*{name}\n{}COMMIT\n", old.change_to(new)));
        }
        text
    }

    /// Converts the rules to sections of a listing.
    pub(crate) fn sections(&self, family: Family) -> Vec<Section> {
        let program = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let mut sections: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, table) in &self.tables {
            let head = |chain: &str| format!("{program} -t {name}: chain {chain}");
            // The owner chain may be missing: users may install the printed rules themselves.
            for (chain, rules) in table.chains.iter().filter(|(chain, _)| *chain != OWNER) {
                let lines = rules.iter().map(|text| format!("-A {chain} {}", canonical(text)));
                sections.insert(head(chain), lines.collect());
            }
            for OwnRuleInForeignChain { chain, text, .. } in &table.own_in_foreign_chains {
                let lines = sections.entry(head(chain)).or_default();
                lines.push(format!("-A {chain} {}", canonical(text)));
            }
        }
        sections.into_iter().map(|(head, lines)| Section { head, lines }).collect()
    }
}

impl OwnTable {
    fn records(&self, chain: &str, rule: &SavedRule) -> bool {
        let record_chain = self.chains.get(&record_chain(chain));
        record_chain.is_some_and(|record_chain| record_chain.contains(&rule.text))
    }

    fn contains_in_foreign_chain(&self, chain: &str, rule: &SavedRule) -> bool {
        let text = canonical(&rule.text);
        self.own_in_foreign_chains.iter().any(|own| own.chain == chain && own.text == text)
    }

    /// The changes of one table as lines for `iptables-restore`. A line `:CHAIN` flushes the chain.
    /// A chain can be deleted (`-X`) only if it is empty and no rule jumps to it.
    fn change_to(&self, wanted: &Self) -> String {
        let mut lines = Vec::new();
        let mut chains: Vec<_> = self.chains.keys().chain(wanted.chains.keys()).collect();
        chains.sort_unstable();
        chains.dedup();
        lines.extend(chains.iter().map(|chain| format!(":{chain} - [0:0]")));
        for OwnRuleInForeignChain { chain, text, .. } in &self.own_in_foreign_chains {
            lines.push(format!("-D {chain} {text}"));
        }
        for (chain, rules) in &wanted.chains {
            lines.extend(rules.iter().map(|text| format!("-A {chain} {text}")));
        }
        let mut inserted: BTreeMap<&str, usize> = BTreeMap::new();
        for OwnRuleInForeignChain { chain, text, after } in &wanted.own_in_foreign_chains {
            let before = inserted.entry(chain).or_default();
            lines.push(match after {
                None => format!("-A {chain} {text}"),
                Some(after) => format!("-I {chain} {} {text}", after + *before + 1),
            });
            *before += 1;
        }
        let gone = chains.iter().filter(|chain| !wanted.chains.contains_key(**chain));
        lines.extend(gone.map(|chain| format!("-X {chain}")));
        lines.into_iter().map(|line| line.trim_end().to_owned() + "\n").collect()
    }
}

/// underpass's rules in a foreign chain, with their positions.
fn own_in_foreign_chains(
    chain: &SavedChain,
    ours: impl Fn(&SavedRule) -> bool,
) -> Vec<OwnRuleInForeignChain> {
    let others = chain.rules.iter().filter(|rule| !ours(rule)).count();
    let mut before = 0;
    let mut own_in_foreign_chains = Vec::new();
    for rule in &chain.rules {
        if ours(rule) {
            let after = (before < others).then_some(before);
            own_in_foreign_chains.push(OwnRuleInForeignChain {
                chain: chain.name.clone(),
                text: rule.text.clone(),
                after,
            });
        } else {
            before += 1;
        }
    }
    own_in_foreign_chains
}

fn jumps_to_own_chain(rule: &SavedRule) -> bool {
    // Ignore comments, which are in quotes.
    let unquoted: String = rule.text.split('"').step_by(2).collect();
    let mut words = unquoted.split_whitespace().skip_while(|word| !["-j", "-g"].contains(word));
    words.nth(1).is_some_and(is_own_chain)
}

/// The name of the chain that records underpass's rules in a built-in chain.
fn record_chain(chain: &str) -> String {
    format!("{PREFIX}{chain}")
}

#[cfg(test)]
mod tests;
