//! One family's ruleset: what `iptables-save` prints, which of it is ours, and what
//! `iptables-restore` has to do to turn ours into another.
//!
//! Not here: running either (`exec.rs`), and what a plan's rules look like (`plan/iptables.rs`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::plan::{Action, Family, RulePlan, TABLES, Table};
use crate::verify::Section;

/// The chains of the profiles. Any of these names is taken for ours, for we replace what Istio or
/// OSM left; linkerd's `PROXY_INIT_…` is none of them.
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
/// What our other chains begin with.
const PREFIX: &str = "UNDERPASS_";
/// An empty chain that says that underpass installed the chains of a table: their names are Istio's
/// and OSM's.
const OWNER: &str = "UNDERPASS_OWNER";

/// Whether a chain of this name is ours.
pub(crate) fn is_ours(chain: &str) -> bool {
    CHAINS.contains(&chain) || chain.starts_with(PREFIX)
}

/// Whether it is the chain that says whose the others of its table are.
pub(crate) fn is_owner_chain(chain: &str) -> bool {
    chain == OWNER
}

/// A ruleset as it is printed, everybody's.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub(crate) tables: Vec<SavedTable>,
    /// The tables that iptables-nft cannot print, because another program put rules into them that
    /// only nft understands.
    pub(crate) incompatible: Vec<String>,
}

/// A table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedTable {
    pub(crate) name: String,
    pub(crate) chains: Vec<SavedChain>,
}

/// A chain.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedChain {
    pub(crate) name: String,
    pub(crate) rules: Vec<SavedRule>,
}

/// A rule.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedRule {
    /// What follows the name of the chain.
    pub(crate) text: String,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Ruleset {
    /// Reads what `iptables-save --counters` prints. What it does not know it passes over: comments,
    /// policies, `COMMIT`.
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

    /// The rules of a chain; none if there is no such chain.
    pub(crate) fn rules(&self, table: &str, chain: &str) -> &[SavedRule] {
        let table = self.tables.iter().find(|saved| saved.name == table);
        let chain = table.and_then(|table| table.chains.iter().find(|saved| saved.name == chain));
        chain.map_or(&[], |chain| &chain.rules)
    }
}

/// `` # Table `nat' is incompatible, use 'nft' tool. ``
fn incompatible(line: &str) -> Option<&str> {
    line.strip_prefix("# Table `")?.split_once("' is incompatible").map(|(table, _)| table)
}

impl SavedTable {
    /// `:CHAIN POLICY [packets:bytes]` or `[packets:bytes] -A CHAIN rule`.
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

/// A rule's text in which equal rules are equal: how an address is abbreviated depends on the C
/// library that the tool was built with.
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

/// What is ours of one family's ruleset: that of a plan, or what is installed of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ours {
    tables: BTreeMap<String, OurTable>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct OurTable {
    /// Our own chains, and their rules.
    chains: BTreeMap<String, Vec<String>>,
    /// Our rules in chains of others, in their order.
    guests: Vec<Guest>,
}

/// A rule of ours in a chain that is not.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Guest {
    chain: String,
    text: String,
    /// How many rules of others stand before it; `None`: all.
    after: Option<usize>,
}

impl Ours {
    /// What a plan asks for.
    ///
    /// Our rules in the built-in chains follow those of others, as with Istio and OSM; except in the
    /// filter table, where a rule of others that accepts would undo our refusals.
    ///
    /// Those of them that do not jump to a chain of ours would not be known again by a later run. They
    /// are also put into a chain that nothing jumps to: the kernel remembers for us what we added.
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
                        let memory = ours.chains.entry(memory(chain.name)).or_default();
                        memory.push(line.text.clone());
                    }
                    ours.guests.push(Guest {
                        chain: chain.name.to_owned(),
                        text: line.text.clone(),
                        after: (table == Table::Filter).then_some(0),
                    });
                }
            }
        }
        ours
    }

    /// What there is of ours in a ruleset. A rule in a chain of others is ours if it jumps to a chain
    /// of ours, if we remembered it, or if it is one of `planned`.
    pub(crate) fn installed(ruleset: &Ruleset, planned: &Self) -> Self {
        let mut tables = BTreeMap::new();
        for table in &ruleset.tables {
            let mut ours = OurTable::default();
            let (own, others): (Vec<_>, Vec<_>) =
                table.chains.iter().partition(|chain| is_ours(&chain.name));
            for chain in own {
                let texts = chain.rules.iter().map(|rule| rule.text.clone()).collect();
                ours.chains.insert(chain.name.clone(), texts);
            }
            for chain in others {
                let guests = guests(chain, |rule| {
                    jumps_to_ours(rule)
                        || ours.remembers(&chain.name, rule)
                        || planned
                            .tables
                            .get(&table.name)
                            .is_some_and(|planned| planned.has_guest(&chain.name, rule))
                });
                ours.guests.extend(guests);
            }
            if ours != OurTable::default() {
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

    /// The tables of which a chain says that underpass installed them.
    pub(crate) fn marked(mut self) -> Self {
        self.tables.retain(|_, table| table.chains.keys().any(|chain| chain.starts_with(PREFIX)));
        self
    }

    /// Keeps the places among the rules of others that ours have already.
    pub(crate) fn keep_places(&mut self, installed: &Self) {
        for (name, table) in &mut self.tables {
            let Some(installed) = installed.tables.get(name) else { continue };
            for guest in &mut table.guests {
                if let Some(first) = installed.guests.iter().find(|old| old.chain == guest.chain) {
                    guest.after = first.after;
                }
            }
        }
    }

    /// What makes `wanted` of this: for each table one body, that takes effect as a whole. Empty if
    /// there is nothing of either.
    pub(crate) fn change_to(&self, wanted: &Self) -> String {
        let nothing = OurTable::default();
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

    /// The same as sections of a listing.
    pub(crate) fn sections(&self, family: Family) -> Vec<Section> {
        let program = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let mut sections: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, table) in &self.tables {
            let head = |chain: &str| format!("{program} -t {name}: chain {chain}");
            // Rules that were rendered and installed by hand lack it, and are the same rules.
            for (chain, rules) in table.chains.iter().filter(|(chain, _)| *chain != OWNER) {
                let lines = rules.iter().map(|text| format!("-A {chain} {}", canonical(text)));
                sections.insert(head(chain), lines.collect());
            }
            for Guest { chain, text, .. } in &table.guests {
                let lines = sections.entry(head(chain)).or_default();
                lines.push(format!("-A {chain} {}", canonical(text)));
            }
        }
        sections.into_iter().map(|(head, lines)| Section { head, lines }).collect()
    }
}

impl OurTable {
    fn remembers(&self, chain: &str, rule: &SavedRule) -> bool {
        let memory = self.chains.get(&memory(chain));
        memory.is_some_and(|memory| memory.contains(&rule.text))
    }

    fn has_guest(&self, chain: &str, rule: &SavedRule) -> bool {
        let text = canonical(&rule.text);
        self.guests.iter().any(|guest| guest.chain == chain && guest.text == text)
    }

    /// A chain is flushed by naming it, and has to be empty, and without a jump to it, to be deleted.
    fn change_to(&self, wanted: &Self) -> String {
        let mut lines = Vec::new();
        let mut chains: Vec<_> = self.chains.keys().chain(wanted.chains.keys()).collect();
        chains.sort_unstable();
        chains.dedup();
        lines.extend(chains.iter().map(|chain| format!(":{chain} - [0:0]")));
        for Guest { chain, text, .. } in &self.guests {
            lines.push(format!("-D {chain} {text}"));
        }
        for (chain, rules) in &wanted.chains {
            lines.extend(rules.iter().map(|text| format!("-A {chain} {text}")));
        }
        let mut inserted: BTreeMap<&str, usize> = BTreeMap::new();
        for Guest { chain, text, after } in &wanted.guests {
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

/// The rules of a chain that are ours, and their places among the others.
fn guests(chain: &SavedChain, ours: impl Fn(&SavedRule) -> bool) -> Vec<Guest> {
    let others = chain.rules.iter().filter(|rule| !ours(rule)).count();
    let mut before = 0;
    let mut guests = Vec::new();
    for rule in &chain.rules {
        if ours(rule) {
            let after = (before < others).then_some(before);
            guests.push(Guest { chain: chain.name.clone(), text: rule.text.clone(), after });
        } else {
            before += 1;
        }
    }
    guests
}

fn jumps_to_ours(rule: &SavedRule) -> bool {
    // A comment in quotes says nothing.
    let unquoted: String = rule.text.split('"').step_by(2).collect();
    let mut words = unquoted.split_whitespace().skip_while(|word| !["-j", "-g"].contains(word));
    words.nth(1).is_some_and(is_ours)
}

/// The chain that remembers which rules of a built-in chain are ours.
fn memory(chain: &str) -> String {
    format!("{PREFIX}{chain}")
}

#[cfg(test)]
mod tests;
