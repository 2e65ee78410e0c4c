//! Reads typed values from a document and collects every mistake instead of stopping at the first.
//!
//! A [`Cursor`] refers to one node, which may be absent, and has its path, so that each mistake
//! names its key. `load.rs` and `mesh/document.rs` have the known keys.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{ConfigErrors, Problem, Reason};
use crate::yaml::document::{Node, Origin, Value};

/// The maximum number of mistakes that are kept. Further ones are only counted.
const MAX_PROBLEMS: usize = 1000;

/// The maximum length of a key for which a similar one is suggested.
const MAX_SUGGESTION_LENGTH: usize = 64;

/// The mistakes found so far.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    kept: RefCell<Vec<Problem>>,
    more: Cell<usize>,
}

impl Problems {
    pub(crate) fn add(&self, problem: Problem) {
        let mut kept = self.kept.borrow_mut();
        if kept.len() < MAX_PROBLEMS {
            kept.push(problem);
        } else {
            self.more.update(|more| more + 1);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.kept.borrow().is_empty()
    }

    pub(crate) fn count(&self) -> usize {
        self.kept.borrow().len() + self.more.get()
    }

    /// Returns `value`, or the collected mistakes.
    pub(crate) fn or_else<T>(self, value: Option<T>) -> Result<T, ConfigErrors> {
        let (problems, more) = (self.kept.into_inner(), self.more.get());
        match value {
            Some(value) if problems.is_empty() => Ok(value),
            _ if problems.is_empty() => Err(ConfigErrors::one("incomplete".to_owned(), None)),
            _ => Err(ConfigErrors { problems, more }),
        }
    }
}

const DURATION: &str = "a duration above zero with its unit, such as 250ms, 10s, 5m or 24h";

/// A place in a document: a node or its absence, and the path to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    node: Option<&'a Node>,
    parent: Option<&'a Self>,
    step: Step<'a>,
    problems: &'a Problems,
}

#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

impl fmt::Display for Cursor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        let nested = self.parent.is_some_and(|parent| !matches!(parent.step, Step::Root));
        match self.step {
            Step::Root => Ok(()),
            Step::Key(key) if nested => write!(f, ".{key}"),
            Step::Key(key) => f.write_str(key),
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}

impl<'a> Cursor<'a> {
    pub(crate) fn root(node: &'a Node, problems: &'a Problems) -> Self {
        Self { node: Some(node), parent: None, step: Step::Root, problems }
    }

    /// The root of a document that is read in parts.
    pub(crate) fn absent_root(problems: &'a Problems) -> Self {
        Self { node: None, parent: None, step: Step::Root, problems }
    }

    /// The node at this place, unless it is absent or null.
    pub(crate) fn node(&self) -> Option<&'a Node> {
        self.node.filter(|node| node.value != Value::Null)
    }

    /// The local tag of the node, even of an empty one (`!Presence`).
    pub(crate) fn tag(&self) -> Option<&'a str> {
        self.node?.tag.as_deref()
    }

    pub(crate) fn is_given(&self) -> bool {
        self.node().is_some()
    }

    pub(crate) fn is_mapping(&self) -> bool {
        self.node().is_some_and(|node| matches!(node.value, Value::Mapping(_)))
    }

    /// This place if it has a node. Otherwise reports a mistake with this reason.
    pub(crate) fn given_or(self, reason: &str) -> Option<Self> {
        if !self.is_given() {
            self.problem(reason);
            return None;
        }
        Some(self)
    }

    /// Reports a mistake at this place.
    pub(crate) fn problem(&self, reason: impl Into<Reason>) {
        let value = match self.node.map(|node| &node.value) {
            Some(Value::Scalar(text)) => Some(text.clone()),
            _ => None,
        };
        self.problem_of(value, reason.into());
    }

    fn problem_of(&self, value: Option<String>, reason: Reason) {
        let Reason { text, hint } = reason;
        let (key, origin) = (self.to_string(), self.place());
        self.problems.add(Problem { key, value, reason: text, hint, origin });
    }

    /// The position of the node. If the node is absent, that of its section or item.
    fn place(&self) -> Option<Origin> {
        match self.node {
            Some(node) => Some(node.origin.clone()),
            None => {
                let parent = self.parent.filter(|parent| !matches!(parent.step, Step::Root))?;
                parent.place()
            }
        }
    }

    /// The entries of the mapping at this place; empty if it is absent.
    pub(crate) fn entries(&self) -> &'a [(String, Node)] {
        match self.node().map(|node| &node.value) {
            None => &[],
            Some(Value::Mapping(entries)) => entries,
            Some(_) => {
                self.problem("must be a mapping (key: value)");
                &[]
            }
        }
    }

    /// The value of `key`, which may be absent.
    pub(crate) fn key<'b>(&'b self, key: &'b str) -> Cursor<'b> {
        let entries = match self.node().map(|node| &node.value) {
            Some(Value::Mapping(entries)) => entries.as_slice(),
            _ => &[],
        };
        self.at(key, entries.iter().find(|(name, _)| name == key).map(|(_, node)| node))
    }

    /// The place of `key`, whose node is `node`.
    pub(crate) fn at<'b>(&'b self, key: &'b str, node: Option<&'b Node>) -> Cursor<'b> {
        Cursor { node, parent: Some(self), step: Step::Key(key), problems: self.problems }
    }

    /// Reads every entry of the mapping with `read`; an absent mapping is empty.
    pub(crate) fn each<T>(&self, mut read: impl FnMut(&str, Cursor<'_>) -> Option<T>) -> Vec<T> {
        let entries = self.entries().iter();
        entries.filter_map(|(key, node)| read(key, self.at(key, Some(node)))).collect()
    }

    /// Rejects every key of the mapping that is not in `known`.
    pub(crate) fn only(&self, known: &[&str]) {
        for (key, node) in self.entries() {
            if !known.contains(&key.as_str()) {
                self.at(key, Some(node)).no_such_key(key, known);
            }
        }
    }

    /// Reports that the key is not one of `known`.
    pub(crate) fn no_such_key(&self, key: &str, known: &[&str]) {
        match closest(key, known) {
            Some(near) => {
                self.problem(Reason::with_hint("no such key", format!("did you mean {near}?")));
            }
            None => {
                let known = format!("the keys are {}", known.join(", "));
                self.problem(Reason::with_hint("no such key", known));
            }
        }
    }

    /// Reads every item of the list with `read`; an absent list is empty.
    pub(crate) fn items<T>(&self, mut read: impl FnMut(Cursor<'_>) -> Option<T>) -> Vec<T> {
        let items = match self.node().map(|node| &node.value) {
            None => return Vec::new(),
            Some(Value::Sequence(items)) => items,
            Some(_) => {
                self.problem("must be a list");
                return Vec::new();
            }
        };
        let items = items.iter().enumerate();
        items.filter_map(|(index, node)| read(self.item(index, node))).collect()
    }

    /// The place of the item `index`, which is `node`.
    pub(crate) fn item<'b>(&'b self, index: usize, node: &'b Node) -> Cursor<'b> {
        Cursor {
            node: Some(node),
            parent: Some(self),
            step: Step::Index(index),
            problems: self.problems,
        }
    }

    /// Reads a list of scalars with `read`, whose error describes the expected value. Text with
    /// commas is a list too. Duplicates are merged; an absent list is empty.
    pub(crate) fn list<T: Clone + Eq + Hash>(
        &self,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let mut list = Vec::new();
        let mut known = HashSet::new();
        let mut add = |item: Cursor<'_>, text: &str| match read(text) {
            Ok(value) if known.contains(&value) => {}
            Ok(value) => {
                known.insert(value.clone());
                list.push(value);
            }
            Err(reason) => item.problem_of(Some(text.to_owned()), reason.into()),
        };
        match self.node().map(|node| (node, &node.value)) {
            Some((node, Value::Scalar(text))) if !text.trim().is_empty() => {
                let texts = text.split(',').enumerate();
                texts.for_each(|(index, text)| add(self.item(index, node), text.trim()));
            }
            Some((_, Value::Sequence(nodes))) => {
                for (index, node) in nodes.iter().enumerate() {
                    let item = self.item(index, node);
                    match item.text() {
                        Some(text) => add(item, text),
                        None if node.value == Value::Null => item.problem("must not be empty"),
                        None => {}
                    }
                }
            }
            Some((_, Value::Mapping(_))) => {
                self.problem("must be a list, or a text with commas between its items");
            }
            _ => {}
        }
        list
    }

    /// Whether the node is an empty list.
    pub(crate) fn is_empty_list(&self) -> bool {
        let no_items = |node: &Node| node.value == Value::Sequence(Vec::new());
        self.is_word("") || self.node().is_some_and(no_items)
    }

    /// Whether the node is `word`, or a list with `word` as its only item.
    pub(crate) fn is_word(&self, word: &str) -> bool {
        match self.node().map(|node| &node.value) {
            Some(Value::Scalar(text)) => text.trim() == word,
            Some(Value::Sequence(items)) => match items.as_slice() {
                [Node { value: Value::Scalar(text), .. }] => text == word,
                _ => false,
            },
            _ => false,
        }
    }

    /// The scalar as text.
    pub(crate) fn text(&self) -> Option<&'a str> {
        match self.node().map(|node| &node.value) {
            None => None,
            Some(Value::Scalar(text)) => Some(text),
            Some(_) => {
                self.problem("must be a single value");
                None
            }
        }
    }

    /// Parses the scalar. `expected` describes a valid value.
    pub(crate) fn parse<T: FromStr>(&self, expected: &str) -> Option<T> {
        let parsed = self.text()?.parse().ok();
        if parsed.is_none() {
            self.problem(format!("must be {expected}"));
        }
        parsed
    }

    /// Parses the scalar with a type whose error explains the mistake.
    pub(crate) fn parse_explained<T>(&self) -> Option<T>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        self.text()?.parse().map_err(|error: T::Err| self.problem(error.to_string())).ok()
    }

    /// Reads one word of a fixed set.
    pub(crate) fn one_of<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            self.problem(format!("must be one of {}", words.join(", ")));
        }
        found
    }

    /// Reads `true` or `false`.
    pub(crate) fn flag(&self) -> Option<bool> {
        let flag = parse_flag(self.text()?);
        if flag.is_none() {
            self.problem("must be true or false");
        }
        flag
    }

    /// Reads a number in `range`. `expected` describes the range.
    pub(crate) fn number(&self, range: RangeInclusive<usize>, expected: &str) -> Option<usize> {
        let number = self.parse(expected)?;
        if !range.contains(&number) {
            self.problem(format!("must be {expected}"));
        }
        Some(number)
    }

    /// Reads a port to listen on or connect to: 1 to 65535.
    pub(crate) fn port(&self) -> Option<u16> {
        let port = parse_port(self.text()?).filter(|port| *port != 0);
        if port.is_none() {
            self.problem("must be a port, 1 to 65535");
        }
        port
    }

    /// Reads a port, or 0 for a named one.
    pub(crate) fn port_or_named(&self) -> Option<u16> {
        let port = parse_port(self.text()?);
        if port.is_none() {
            self.problem("must be a port, 0 (named) to 65535");
        }
        port
    }

    /// Reads a duration with a unit: `250ms`, `10s`, `5m`, `24h`. Rejects zero, which would time
    /// out at once.
    pub(crate) fn duration(&self) -> Option<Duration> {
        let duration = parse_duration(self.text()?);
        if duration.is_none() {
            self.problem(format!("must be {DURATION}"));
        }
        duration
    }

    /// Reads a duration, or `off`.
    pub(crate) fn duration_or_off(&self) -> Option<Duration> {
        let duration = parse_duration(self.text()?);
        if duration.is_none() {
            self.problem(format!("must be off or {DURATION}"));
        }
        duration
    }

    /// Reads a size in bytes with a unit: `64KiB`, `256MiB`, `1GiB`.
    pub(crate) fn size(&self) -> Option<usize> {
        let size = parse_size(self.text()?);
        if size.is_none() {
            self.problem("must be a size above zero with its unit, such as 64KiB, 256MiB or 1GiB");
        }
        size
    }
}

/// Parses a boolean of YAML 1.2 (section 10.3.2). Rejects words of YAML 1.1 such as `yes`.
pub(crate) fn parse_flag(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

/// Parses a port or 0, in the notations of YAML 1.2 (section 10.3.2): `80`, `0x50` or `0o120`.
pub(crate) fn parse_port(text: &str) -> Option<u16> {
    let (digits, radix) = match text.split_at_checked(2) {
        Some(("0x", digits)) => (digits, 16),
        Some(("0o", digits)) => (digits, 8),
        _ => return text.parse().ok(),
    };
    // The standard parser would accept "0x+50".
    let has_only_digits = digits.chars().all(|digit| digit.is_digit(radix));
    u16::from_str_radix(digits, radix).ok().filter(|_| has_only_digits)
}

/// Parses `250ms`, `10s`, `5m` or `24h`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at_checked(unit_at)?;
    let number: u64 = digits.parse().ok().filter(|number| *number > 0)?;
    let seconds = |factor: u64| number.checked_mul(factor).map(Duration::from_secs);
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        _ => None,
    }
}

/// Parses `64KiB`, `256MiB` or `1GiB`.
fn parse_size(text: &str) -> Option<usize> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at_checked(unit_at)?;
    let number: usize = digits.parse().ok().filter(|number| *number > 0)?;
    let factor = match unit {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// The known key within two edits of `key`.
pub(crate) fn closest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    if key.len() > MAX_SUGGESTION_LENGTH {
        return None;
    }
    let near = known.iter().map(|candidate| (edit_distance(key, candidate), *candidate)).min()?;
    (near.0 <= 2).then_some(near.1)
}

/// The Levenshtein distance, ignoring case and `_` (`outboundPort`, `outbound_port`).
fn edit_distance(a: &str, b: &str) -> usize {
    let plain = |text: &str| -> Vec<char> {
        text.chars().filter(|c| *c != '_').map(|c| c.to_ascii_lowercase()).collect()
    };
    let (a, b) = (plain(a), plain(b));
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut next = vec![i + 1];
        let pairs = row.iter().zip(row.iter().skip(1));
        for ((diagonal, above), to) in pairs.zip(&b) {
            let left = next.last().copied().unwrap_or_default();
            next.push((diagonal + usize::from(from != to)).min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests;
