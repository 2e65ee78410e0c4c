//! What is installed against what the plan says: the difference, for people and programs.
//!
//! Not here: how either is read. Each backend makes a [`Listing`] of both, in one form.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use imara_diff::{Algorithm, Diff, Hunk, InternedInput};

/// Rules as text, chain by chain, in which equal lines mean equal rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Listing {
    /// The chains (their head says all that a chain is besides its rules), and the sets.
    pub(crate) sections: Vec<Section>,
}

/// One chain or set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Section {
    /// Its kind and name, with what else defines it: `chain nat_output { type nat hook output priority -100; }`.
    pub(crate) head: String,
    /// Its rules or elements, in order.
    pub(crate) lines: Vec<String>,
}

/// How what is installed differs from the plan.
///
/// `Display` prints a section for each chain that differs: `-` is missing, `+` should not be there. Of what is as it should be, only
/// the neighbours are printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    sections: Vec<SectionDifference>,
}

/// How one chain differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionDifference {
    /// What differs: a chain, a set, the ip rules and routes.
    pub place: String,
    /// Its lines, all of them, in the order of both.
    pub lines: Vec<Line>,
}

/// A line of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Whether both have it.
    pub sign: Sign,
    /// The rule.
    pub text: String,
}

/// Who has a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Both.
    Same,
    /// The plan alone.
    Missing,
    /// The kernel alone.
    Unexpected,
}

impl Listing {
    /// How `found` differs from this, `None` if it does not.
    pub(crate) fn difference(&self, found: &Self) -> Option<Difference> {
        let mut sections = Vec::new();
        for section in &self.sections {
            let nothing = Section { head: section.head.clone(), lines: Vec::new() };
            let there = found.section(&section.head);
            // Most sections, of which a set may have ten thousand lines.
            if there.is_some_and(|there| there.lines == section.lines) {
                continue;
            }
            let mut lines = compare(&section.lines, &there.unwrap_or(&nothing).lines);
            if there.is_none() {
                lines.insert(0, Line { sign: Sign::Missing, text: section.head.clone() });
            }
            sections.push(SectionDifference { place: section.head.clone(), lines });
        }
        for section in found.sections.iter().filter(|found| self.section(&found.head).is_none()) {
            let unexpected = |text: &String| Line { sign: Sign::Unexpected, text: text.clone() };
            let lines = [&section.head].into_iter().chain(&section.lines).map(unexpected).collect();
            sections.push(SectionDifference { place: section.head.clone(), lines });
        }
        (!sections.is_empty()).then_some(Difference { sections })
    }

    fn section(&self, head: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.head == head)
    }
}

impl Difference {
    /// What differs, place by place.
    #[must_use]
    pub fn sections(&self) -> &[SectionDifference] {
        &self.sections
    }

    /// The same, with other words for some lines: those in `words`, else what `unknown` makes of
    /// them.
    pub(crate) fn readable(
        mut self,
        words: &BTreeMap<String, String>,
        unknown: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let lines = self.sections.iter_mut().flat_map(|section| &mut section.lines);
        for line in lines {
            if let Some(text) = words.get(&line.text).cloned().or_else(|| unknown(&line.text)) {
                line.text = text;
            }
        }
        self
    }

    /// How many lines are missing, and how many should not be there.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let count = |sign| {
            let lines = self.sections.iter().flat_map(|section| &section.lines);
            lines.filter(|line| line.sign == sign).count()
        };
        (count(Sign::Missing), count(Sign::Unexpected))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for section in &self.sections {
            writeln!(f, "@ {}", section.place)?;
            let mut left_out = false;
            for (line, near) in section.lines.iter().zip(section.near_changes()) {
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
    /// Of each line, whether it differs or is a neighbour of one that does.
    fn near_changes(&self) -> Vec<bool> {
        /// How many neighbours there are on each side.
        const CONTEXT: usize = 3;
        let mut near = vec![false; self.lines.len()];
        let changed = |line: &Line| line.sign != Sign::Same;
        for (index, _) in self.lines.iter().enumerate().filter(|(_, line)| changed(line)) {
            let neighbours = near.iter_mut().skip(index.saturating_sub(CONTEXT));
            neighbours.take(index.min(CONTEXT) + 1 + CONTEXT).for_each(|near| *near = true);
        }
        near
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.sign {
            Sign::Same => ' ',
            Sign::Missing => '-',
            Sign::Unexpected => '+',
        };
        write!(f, "{sign} {}", self.text)
    }
}

fn compare(expected: &[String], found: &[String]) -> Vec<Line> {
    let mut input = InternedInput::default();
    input.update_before(expected.iter().map(String::as_str));
    input.update_after(found.iter().map(String::as_str));
    let (mut lines, mut reached) = (Vec::new(), 0);
    let mut tell = |sign, from: &[String], range: Range<u32>| {
        let range = range.start as usize..range.end as usize;
        let texts = from.get(range).unwrap_or_default();
        lines.extend(texts.iter().map(|text| Line { sign, text: text.clone() }));
    };
    for Hunk { before, after } in Diff::compute(Algorithm::Myers, &input).hunks() {
        tell(Sign::Same, expected, reached..before.start);
        reached = before.end;
        tell(Sign::Missing, expected, before);
        tell(Sign::Unexpected, found, after);
    }
    let rest = expected.get(reached as usize..).unwrap_or_default();
    lines.extend(rest.iter().map(|text| Line { sign: Sign::Same, text: text.clone() }));
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
    fn what_is_equal_has_no_difference() {
        let plan = listing(&[("chain a", &["1", "2"]), ("chain b", &[])]);
        assert_eq!(plan.difference(&plan), None);
    }

    #[test]
    fn the_order_of_rules_counts_and_that_of_chains_does_not() {
        let plan = listing(&[("chain a", &["1", "2"]), ("chain b", &["3"])]);
        assert_eq!(shown(&plan, &listing(&[("chain b", &["3"]), ("chain a", &["1", "2"])])), "");
        let swapped = listing(&[("chain a", &["2", "1"]), ("chain b", &["3"])]);
        let difference = plan.difference(&swapped).expect("a difference");
        assert_eq!(difference.sections().len(), 1);
        assert_eq!(difference.counts(), (1, 1));
    }

    #[test]
    fn a_chain_that_is_not_there_is_missing_with_all_its_rules() {
        let plan = listing(&[("chain a", &["1"])]);
        let difference = plan.difference(&Listing::default()).unwrap();
        assert_eq!(difference.to_string(), "@ chain a\n- chain a\n- 1\n");
        assert_eq!(difference.counts(), (2, 0));
    }

    #[test]
    fn of_a_long_section_only_what_is_near_a_difference_is_printed() {
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
    fn a_chain_that_should_not_be_there_is_unexpected() {
        let found = listing(&[("chain z", &["9"])]);
        assert_eq!(shown(&Listing::default(), &found), "@ chain z\n+ chain z\n+ 9\n");
    }
}
