//! A YAML document as a tree in which every value knows where it was written.
//!
//! Scalars stay text: what a `8080` or a `no` means is the business of whoever reads the key (`read.rs`). Not here: any
//! knowledge of which keys exist.

use std::collections::HashMap;
use std::fmt;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};

/// Deeper nesting than any setting needs; a bound for the recursion below.
const MAX_DEPTH: usize = 32;
/// How many nodes aliases (`*name`) may add, so that a small file cannot unfold into a huge tree.
const MAX_ALIASED_NODES: usize = 100_000;

/// A value and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// A local tag without its `!`, such as ztunnel's `!Exact`.
    pub(crate) tag: Option<String>,
    pub(crate) origin: Origin,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Scalar(String),
    Sequence(Vec<Node>),
    Mapping(Vec<(String, Node)>),
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// In a document, at this line and column (both from 1).
    Document {
        /// The file, or what else the document is called.
        name: std::sync::Arc<str>,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// In this environment variable.
    Environment(String),
    /// In a `--set KEY=VALUE` flag.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Document { name, line, column } => write!(f, "{name}:{line}:{column}"),
            Self::Environment(variable) => write!(f, "environment {variable}"),
            Self::Flag => f.write_str("--set"),
        }
    }
}

/// Why a text is not a document that we can read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub(crate) reason: String,
    pub(crate) origin: Origin,
}

impl Node {
    /// An empty mapping: what an empty document means.
    pub(crate) fn empty(origin: Origin) -> Self {
        Self { value: Value::Mapping(Vec::new()), tag: None, origin }
    }

    /// Reads the one document in `text`; `origin` turns a line and column (from 1) into a place.
    pub(crate) fn parse(
        text: &str,
        origin: &dyn Fn(usize, usize) -> Origin,
    ) -> Result<Self, SyntaxError> {
        Loader { parser: Parser::new_from_str(text), origin, anchors: HashMap::new(), aliased: 0 }
            .document()
    }

    /// Puts `node` at the end of `path`, making the mappings on the way.
    pub(crate) fn set(&mut self, path: &[&str], node: Self) {
        let Some((first, rest)) = path.split_first() else {
            *self = node;
            return;
        };
        if !matches!(self.value, Value::Mapping(_)) {
            self.value = Value::Mapping(Vec::new());
        }
        let Value::Mapping(entries) = &mut self.value else {
            return;
        };
        if let Some((_, child)) = entries.iter_mut().find(|(key, _)| key == first) {
            child.set(rest, node);
        } else {
            let mut child = Self::empty(node.origin.clone());
            child.set(rest, node);
            entries.push(((*first).to_owned(), child));
        }
    }

    /// The node at the end of `path`.
    #[cfg(test)]
    pub(crate) fn at(&self, path: &[&str]) -> Option<&Self> {
        let Some((first, rest)) = path.split_first() else {
            return Some(self);
        };
        let Value::Mapping(entries) = &self.value else {
            return None;
        };
        entries.iter().find(|(key, _)| key == first)?.1.at(rest)
    }

    fn count(&self) -> usize {
        1 + match &self.value {
            Value::Sequence(items) => items.iter().map(Self::count).sum(),
            Value::Mapping(entries) => entries.iter().map(|(_, node)| node.count()).sum(),
            Value::Null | Value::Scalar(_) => 0,
        }
    }
}

struct Loader<'a> {
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    origin: &'a dyn Fn(usize, usize) -> Origin,
    anchors: HashMap<usize, Node>,
    aliased: usize,
}

impl<'a> Loader<'a> {
    fn document(mut self) -> Result<Node, SyntaxError> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
                Event::DocumentStart(_) if root.is_some() => {
                    return Err(self.error(&span, "a second document: only one is read"));
                }
                Event::DocumentStart(_) => {}
                other => root = Some(self.node(other, &span, 0)?),
            }
        }
        Ok(root.unwrap_or_else(|| Node::empty((self.origin)(1, 1))))
    }

    fn next(&mut self) -> Result<(Event<'a>, Span), SyntaxError> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => {
                let at = error.marker();
                Err(SyntaxError {
                    reason: format!("not YAML: {}", error.info()),
                    origin: (self.origin)(at.line(), at.col() + 1),
                })
            }
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn error(&self, span: &Span, reason: &str) -> SyntaxError {
        SyntaxError { reason: reason.to_owned(), origin: self.place(span) }
    }

    fn place(&self, span: &Span) -> Origin {
        (self.origin)(span.start.line(), span.start.col() + 1)
    }

    /// The node that `event` begins.
    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<Node, SyntaxError> {
        if depth > MAX_DEPTH {
            return Err(self.error(span, "nested too deeply"));
        }
        let (value, anchor, tag) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain;
                let null = plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                let value = if null { Value::Null } else { Value::Scalar(text.into_owned()) };
                (value, anchor, tag)
            }
            Event::SequenceStart(anchor, tag) => (self.sequence(depth)?, anchor, tag),
            Event::MappingStart(anchor, tag) => (self.mapping(depth)?, anchor, tag),
            Event::Alias(anchor) => return self.alias(anchor, span),
            _ => return Err(self.error(span, "a value was expected here")),
        };
        let tag = tag.as_deref().and_then(local_tag);
        let node = Node { value, tag, origin: self.place(span) };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn sequence(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                return Ok(Value::Sequence(items));
            }
            items.push(self.node(event, &span, depth + 1)?);
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, SyntaxError> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let key = match event {
                Event::MappingEnd => return Ok(Value::Mapping(entries)),
                Event::Scalar(text, ..) => text.into_owned(),
                _ => return Err(self.error(&span, "a key must be a plain word")),
            };
            if entries.iter().any(|(known, _)| *known == key) {
                return Err(self.error(&span, &format!("the key {key} is given twice")));
            }
            let (event, span) = self.next()?;
            entries.push((key, self.node(event, &span, depth + 1)?));
        }
    }

    fn alias(&mut self, anchor: usize, span: &Span) -> Result<Node, SyntaxError> {
        let node = self.anchors.get(&anchor).cloned();
        let node = node.ok_or_else(|| self.error(span, "an alias to itself"))?;
        self.aliased += node.count();
        if self.aliased > MAX_ALIASED_NODES {
            return Err(self.error(span, "aliases unfold to too many values"));
        }
        Ok(node)
    }
}

/// The name in a local tag (`!Exact`); tags of YAML's own schema (`!!str`) say nothing that we need.
fn local_tag(tag: &Tag) -> Option<String> {
    (tag.handle == "!").then(|| tag.suffix.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(line: usize, column: usize) -> Origin {
        Origin::Document { name: "t".into(), line, column }
    }

    fn parse(text: &str) -> Result<Node, SyntaxError> {
        Node::parse(text, &at)
    }

    #[test]
    fn a_value_knows_its_line_and_column() {
        let root = parse("a: 1\nb:\n  - x\n  - !Exact y\n").unwrap();
        let Value::Mapping(entries) = &root.value else { panic!("{root:?}") };
        assert_eq!(entries[0].1.origin, at(1, 4));
        let Value::Sequence(items) = &entries[1].1.value else { panic!("{root:?}") };
        assert_eq!(items[0].origin, at(3, 5));
        assert_eq!(items[1].tag.as_deref(), Some("Exact"));
        assert_eq!(items[1].value, Value::Scalar("y".into()));
    }

    #[test]
    fn an_empty_document_is_an_empty_mapping() {
        for text in ["", "# only a comment\n", "---\n"] {
            let root = parse(text).unwrap();
            assert!(matches!(root.value, Value::Null) || root.value == Value::Mapping(vec![]));
        }
    }

    #[test]
    fn an_alias_repeats_its_anchor() {
        let root = parse("a: &x [1, 2]\nb: *x\n").unwrap();
        let Value::Mapping(entries) = &root.value else { panic!("{root:?}") };
        assert_eq!(entries[0].1.value, entries[1].1.value);
    }

    #[test]
    fn hostile_documents_are_refused_not_unfolded() {
        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..9 {
            let last = format!("*a{}, ", level - 1).repeat(9);
            laughs.push_str(&format!("a{level}: &a{level} [{last} *a{}]\n", level - 1));
        }
        let deep = format!("{}x{}", "[".repeat(40), "]".repeat(40));
        for (text, reason) in [
            (laughs.as_str(), "aliases unfold"),
            (deep.as_str(), "nested too deeply"),
            ("a: 1\na: 2\n", "given twice"),
            ("a: 1\n---\nb: 2\n", "second document"),
            ("a: [1, 2\n", "not YAML"),
            ("? [a]\n: b\n", "a key must be"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.reason.contains(reason), "{text:.40}: {}", error.reason);
        }
    }

    #[test]
    fn an_overlay_replaces_one_value_and_makes_the_way_to_it() {
        let mut root = parse("proxy: {workers: 1, hbone_port: 15008}\n").unwrap();
        let node = |text| Node { origin: Origin::Flag, ..parse(text).unwrap() };
        root.set(&["proxy", "workers"], node("4"));
        root.set(&["mesh", "file"], node("m.yaml"));
        let expected = parse("proxy: {workers: 4, hbone_port: 15008}\nmesh: {file: m.yaml}\n");
        assert_eq!(shape(&root), shape(&expected.unwrap()));
    }

    fn shape(node: &Node) -> String {
        match &node.value {
            Value::Null => "~".into(),
            Value::Scalar(text) => text.clone(),
            Value::Sequence(items) => items.iter().map(shape).collect::<Vec<_>>().join(","),
            Value::Mapping(entries) => {
                entries.iter().map(|(key, node)| format!("{{{key}:{}}}", shape(node))).collect()
            }
        }
    }
}
