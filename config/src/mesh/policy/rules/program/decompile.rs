//! Restores the rules of a program, to show them. Order and duplicates of values are lost, and
//! ranges are merged.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use super::{
    Condition, End, Field, Kind, Match, NO_MATCH, Program, Step, StringMatch, Text, Values, values,
};

impl Program {
    /// Each rule is a list of clauses, and each clause a list of matches.
    pub(in super::super) fn rules(&self) -> Vec<Vec<Vec<Match>>> {
        let (mut rules, mut at) = (Vec::new(), self.start);
        while at != NO_MATCH {
            let (rule, next) = self.rule(at);
            rules.push(rule);
            at = next;
        }
        rules
    }

    /// The rule that starts at this step, and the start of the next rule. A rule that always
    /// matches has no step, and is the last one.
    fn rule(&self, start: usize) -> (Vec<Vec<Match>>, usize) {
        let (mut clauses, mut at, mut next_rule) = (Vec::new(), start, NO_MATCH);
        while self.steps.get(at).is_some() {
            let mut matches = Vec::new();
            (at, next_rule) = self.clause_at(at, &mut matches);
            clauses.push(matches);
        }
        (clauses, next_rule)
    }

    /// Adds the matches of the clause that starts at this step. Returns the next steps if the
    /// clause matches, and if it does not.
    fn clause_at(&self, mut at: usize, matches: &mut Vec<Match>) -> (usize, usize) {
        let mut conditions = Vec::new();
        while let Some(step) = self.steps.get(at) {
            conditions.push(Condition { values: self.restored(step), negated: step.negated });
            at = step.then;
            if step.end != End::Condition {
                matches.push(Match(std::mem::take(&mut conditions)));
                at = step.otherwise;
            }
            if step.end == End::Clause {
                return (step.then, step.otherwise);
            }
        }
        // Unreachable: every clause has an end.
        (NO_MATCH, NO_MATCH)
    }

    fn restored(&self, step: &Step) -> Values {
        let ranges =
            || values(&self.ranges, step).iter().flat_map(|range| subnets(*range)).collect();
        let texts = || values(&self.texts, step).iter().map(|text| self.text(text));
        match step.field {
            Field::DestinationPort => Values::DestinationPorts(values(&self.ports, step).to_vec()),
            Field::SourceIp => Values::SourceIps(ranges()),
            Field::DestinationIp => Values::DestinationIps(ranges()),
            Field::Namespace => Values::Namespaces(texts().collect()),
            Field::ServiceAccount => Values::ServiceAccounts(texts().filter_map(account).collect()),
            Field::Principal => Values::Principals(texts().collect()),
        }
    }

    fn text(&self, Text { kind, letters }: &Text) -> StringMatch {
        let text = self.letters.get(letters.clone()).unwrap_or_default().to_owned();
        match kind {
            Kind::Exact => StringMatch::Exact(text),
            Kind::Prefix => StringMatch::Prefix(text),
            Kind::Suffix => StringMatch::Suffix(text),
            Kind::Presence => StringMatch::Presence,
        }
    }
}

/// The smallest set of CIDRs with exactly these addresses.
fn subnets(range: (IpAddr, IpAddr)) -> Vec<IpNet> {
    match range {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect()
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect()
        }
        // Unreachable: a range has one family.
        _ => Vec::new(),
    }
}

/// The namespace and service account of `/ns/NAMESPACE/sa/ACCOUNT`.
fn account(text: StringMatch) -> Option<(String, String)> {
    let StringMatch::Exact(path) = text else { return None };
    let (namespace, account) = path.strip_prefix("/ns/")?.split_once("/sa/")?;
    Some((namespace.to_owned(), account.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(ports: &[u16]) -> Condition {
        Condition::any_of(Values::DestinationPorts(ports.to_vec()))
    }

    fn accounts(accounts: &[(&str, &str)]) -> Condition {
        let owned = accounts.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned()));
        Condition::none_of(Values::ServiceAccounts(owned.collect()))
    }

    #[test]
    fn decompiled_rules_equal_the_compiled_ones() {
        let sources = ["10.0.0.0/24", "10.0.2.0/23", "fd00::/64"].map(|cidr| cidr.parse().unwrap());
        let sources = Condition::any_of(Values::SourceIps(sources.to_vec()));
        let texts = vec![
            StringMatch::Exact("a".into()),
            StringMatch::Prefix("b".into()),
            StringMatch::Suffix("c".into()),
            StringMatch::Presence,
        ];
        let principals = Condition::any_of(Values::Principals(texts));
        let one = || Match(vec![ports(&[80, 443])]);
        for rules in [
            vec![],
            vec![vec![vec![one()]]],
            vec![vec![vec![one()], vec![one()]]],
            vec![vec![vec![one(), one()]]],
            vec![vec![vec![one()]], vec![vec![one()]]],
            vec![
                vec![
                    vec![Match(vec![ports(&[1]), sources, principals]), one()],
                    vec![Match(vec![accounts(&[("ns", "sa")])]), one(), one()],
                ],
                vec![vec![one()]],
                vec![],
            ],
        ] {
            assert_eq!(Program::compile(rules.clone()).rules(), rules);
        }
    }

    #[test]
    fn decompiled_rules_omit_those_that_never_match_or_come_after_one_that_always_does() {
        let one = || vec![vec![Match(vec![ports(&[1])])]];
        let never = vec![vec![Match(Vec::new())]];
        let rules = vec![never, one(), vec![], one()];
        assert_eq!(Program::compile(rules).rules(), [one(), vec![]]);
    }
}
