//! Compares the installed rules with the plan. Each backend lists both in the same format
//! ([`Listing`]).

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use imara_diff::{Algorithm, Diff, Hunk, InternedInput};

/// Rules as text, by chain. Equal lines mean equal rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Listing {
    /// Chains and sets. The head of a chain contains all its properties except the rules.
    pub(crate) sections: Vec<Section>,
}

/// A chain or a set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Section {
    /// Kind, name and properties: `chain nat_output { type nat hook output priority -100; }`.
    pub(crate) head: String,
    /// The rules or elements in order.
    pub(crate) lines: Vec<String>,
}

/// The difference between the installed rules and the plan.
///
/// `Display` prints a section for each chain that differs: `-` marks a missing line, `+` an
/// unexpected one. Equal lines are printed only next to a difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    sections: Vec<SectionDifference>,
}

/// The difference of one chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionDifference {
    /// The chain or set, or "ip rules, routes and addresses".
    pub location: String,
    /// All lines of both listings, in order.
    pub lines: Vec<Line>,
}

/// A line of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Whether the plan, the kernel or both have the line.
    pub status: LineStatus,
    /// The rule.
    pub text: String,
}

/// Whether the plan, the kernel or both have a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineStatus {
    /// Both have the line.
    Same,
    /// Only the plan has the line.
    Missing,
    /// Only the kernel has the line.
    Unexpected,
}

impl Listing {
    /// Compares the plan's listing (`self`) with the installed one. `None` if they are equal.
    pub(crate) fn difference(&self, found: &Self) -> Option<Difference> {
        let mut sections = Vec::new();
        for section in &self.sections {
            let nothing = Section { head: section.head.clone(), lines: Vec::new() };
            let installed = found.section(&section.head);
            // Fast path for equal sections: a set may have ten thousand lines.
            if installed.is_some_and(|installed| installed.lines == section.lines) {
                continue;
            }
            let mut lines = compare(&section.lines, &installed.unwrap_or(&nothing).lines);
            if installed.is_none() {
                lines.insert(0, Line { status: LineStatus::Missing, text: section.head.clone() });
            }
            sections.push(SectionDifference { location: section.head.clone(), lines });
        }
        for section in found.sections.iter().filter(|found| self.section(&found.head).is_none()) {
            let unexpected =
                |text: &String| Line { status: LineStatus::Unexpected, text: text.clone() };
            let lines = [&section.head].into_iter().chain(&section.lines).map(unexpected).collect();
            sections.push(SectionDifference { location: section.head.clone(), lines });
        }
        (!sections.is_empty()).then_some(Difference { sections })
    }

    fn section(&self, head: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.head == head)
    }
}

impl From<Section> for Listing {
    fn from(section: Section) -> Self {
        Self { sections: vec![section] }
    }
}

impl Difference {
    /// Joins two differences.
    pub(crate) fn join(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        let differences = one.into_iter().chain(other);
        let sections: Vec<_> = differences.flat_map(|difference| difference.sections).collect();
        (!sections.is_empty()).then_some(Self { sections })
    }

    /// The chains and sets that differ.
    #[must_use]
    pub fn sections(&self) -> &[SectionDifference] {
        &self.sections
    }

    /// Replaces lines by readable ones from `readable`, or else by the result of `unknown`.
    pub(crate) fn readable(
        mut self,
        readable: &BTreeMap<String, String>,
        unknown: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let lines = self.sections.iter_mut().flat_map(|section| &mut section.lines);
        for line in lines {
            if let Some(text) = readable.get(&line.text).cloned().or_else(|| unknown(&line.text)) {
                line.text = text;
            }
        }
        self
    }

    /// The number of missing and of unexpected lines.
    #[must_use]
    pub fn missing_and_unexpected(&self) -> (usize, usize) {
        let count = |status| {
            let lines = self.sections.iter().flat_map(|section| &section.lines);
            lines.filter(|line| line.status == status).count()
        };
        (count(LineStatus::Missing), count(LineStatus::Unexpected))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for section in &self.sections {
            writeln!(f, "@ {}", section.location)?;
            let mut left_out = false;
            for (line, near) in section.lines.iter().zip(section.is_near_difference()) {
                match (near, left_out) {
                    (true, _) => writeln!(f, "{line}")?,
                    (false, false) => writeln!(f, "  …")?,
                    (false, true) => {}
                }
                left_out = !near;
            }
        }
        Ok(())
    }
}

impl SectionDifference {
    /// For each line, whether it differs or is next to a line that differs.
    fn is_near_difference(&self) -> Vec<bool> {
        /// The number of equal lines that are printed before and after a difference.
        const CONTEXT: usize = 3;
        let mut near = vec![false; self.lines.len()];
        let changed = |line: &Line| line.status != LineStatus::Same;
        for (index, _) in self.lines.iter().enumerate().filter(|(_, line)| changed(line)) {
            let neighbours = near.iter_mut().skip(index.saturating_sub(CONTEXT));
            neighbours.take(index.min(CONTEXT) + 1 + CONTEXT).for_each(|near| *near = true);
        }
        near
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self.status {
            LineStatus::Same => ' ',
            LineStatus::Missing => '-',
            LineStatus::Unexpected => '+',
        };
        write!(f, "{status} {}", self.text)
    }
}

fn compare(expected: &[String], found: &[String]) -> Vec<Line> {
    let mut input = InternedInput::default();
    input.update_before(expected.iter().map(String::as_str));
    input.update_after(found.iter().map(String::as_str));
    let (mut lines, mut reached) = (Vec::new(), 0);
    let mut add = |status, from: &[String], range: Range<u32>| {
        let range = range.start as usize..range.end as usize;
        let texts = from.get(range).unwrap_or_default();
        lines.extend(texts.iter().map(|text| Line { status, text: text.clone() }));
    };
    for Hunk { before, after } in Diff::compute(Algorithm::Myers, &input).hunks() {
        add(LineStatus::Same, expected, reached..before.start);
        reached = before.end;
        add(LineStatus::Missing, expected, before);
        add(LineStatus::Unexpected, found, after);
    }
    let rest = expected.get(reached as usize..).unwrap_or_default();
    lines.extend(rest.iter().map(|text| Line { status: LineStatus::Same, text: text.clone() }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(sections: &[(&str, &[&str])]) -> Listing {
        let section = |(head, lines): &(&str, &[&str])| Section {
            head: (*head).to_owned(),
            lines: lines.iter().map(|&line| line.to_owned()).collect(),
        };
        Listing { sections: sections.iter().map(section).collect() }
    }

    fn shown(expected: &Listing, found: &Listing) -> String {
        expected.difference(found).map(|difference| difference.to_string()).unwrap_or_default()
    }

    #[test]
    fn equal_listings_have_no_difference() {
        let plan = listing(&[("chain a", &["1", "2"]), ("chain b", &[])]);
        assert_eq!(plan.difference(&plan), None);
    }

    #[test]
    fn difference_respects_order_of_rules_but_not_of_chains() {
        let plan = listing(&[("chain a", &["1", "2"]), ("chain b", &["3"])]);
        assert_eq!(shown(&plan, &listing(&[("chain b", &["3"]), ("chain a", &["1", "2"])])), "");
        let swapped = listing(&[("chain a", &["2", "1"]), ("chain b", &["3"])]);
        let difference = plan.difference(&swapped).expect("a difference");
        assert_eq!(difference.sections().len(), 1);
        assert_eq!(difference.missing_and_unexpected(), (1, 1));
    }

    #[test]
    fn absent_chain_is_missing_with_all_its_rules() {
        let plan = listing(&[("chain a", &["1"])]);
        let difference = plan.difference(&Listing::default()).unwrap();
        assert_eq!(difference.to_string(), "@ chain a\n- chain a\n- 1\n");
        assert_eq!(difference.missing_and_unexpected(), (2, 0));
    }

    #[test]
    fn long_section_prints_only_neighbours_of_differences() {
        let lines: Vec<_> = (0..10_000).map(|n| n.to_string()).collect();
        let plan = Listing { sections: vec![Section { head: "set s".to_owned(), lines }] };
        let mut found = plan.clone();
        found.sections[0].lines.remove(5000);
        found.sections[0].lines.push("10000".to_owned());
        let expected = "@ set s\n  …\n  4997\n  4998\n  4999\n- 5000\n  5001\n  5002\n  5003\n  …\n  \
                        9997\n  9998\n  9999\n+ 10000\n";
        assert_eq!(shown(&plan, &found), expected);
        found.sections[0].lines.remove(0);
        assert!(shown(&plan, &found).starts_with("@ set s\n- 0\n  1\n  2\n  3\n  …\n"));
    }

    #[test]
    fn additional_chain_is_unexpected() {
        let found = listing(&[("chain z", &["9"])]);
        assert_eq!(shown(&Listing::default(), &found), "@ chain z\n+ chain z\n+ 9\n");
    }
}
