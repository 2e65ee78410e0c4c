//! Converts events of a YAML parser to nodes: of the entire document, or item by item.

use std::collections::{HashMap, HashSet};

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput, Tag};

use super::{Node, Origin, Part, SyntaxError, Value};

/// The maximum nesting, which also limits the recursion of the loader.
const MAX_DEPTH: usize = 32;
/// The maximum number of nodes that aliases (`*name`) may add, plus one per byte of the text. It
/// prevents a small file from expanding to a huge tree.
const MAX_ALIASED_NODES: usize = 100_000;
/// Mappings with more keys use a hash set to find duplicates.
const MAX_LINEARLY_SEARCHED_KEYS: usize = 16;

/// Builds the tree of a document from the events of the YAML parser.
pub(super) struct Loader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    origin: &'a dyn Fn(usize, usize) -> Origin,
    anchors: HashMap<usize, Node>,
    /// The number of nodes that aliases may still add.
    aliased_left: usize,
}

impl<'a> Loader<'a> {
    pub(super) fn new(text: &'a str, origin: &'a dyn Fn(usize, usize) -> Origin) -> Self {
        // A byte order mark may precede the document (YAML 1.2, section 5.2).
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        Self {
            parser: Parser::new_from_str(text),
            origin,
            anchors: HashMap::new(),
            aliased_left: MAX_ALIASED_NODES + text.len(),
        }
    }

    pub(super) fn document(mut self) -> Result<Node, SyntaxError> {
        let root = match self.begin()? {
            Some((event, span)) => self.node(event, &span, 0)?,
            None => return Ok(Node::empty((self.origin)(1, 1))),
        };
        self.end()?;
        Ok(root)
    }

    pub(super) fn report_parts(
        mut self,
        report: &mut dyn FnMut(Part<'_>),
    ) -> Result<(), SyntaxError> {
        let (event, span) = match self.begin()? {
            Some((Event::MappingStart(..), _)) => {
                self.sections(report)?;
                return self.end();
            }
            Some(other) => other,
            None => {
                let origin = (self.origin)(1, 1);
                report(Part::Whole(Node { value: Value::Null, tag: None, origin }));
                return Ok(());
            }
        };
        report(Part::Whole(self.node(event, &span, 0)?));
        self.end()
    }

    fn sections(&mut self, report: &mut dyn FnMut(Part<'_>)) -> Result<(), SyntaxError> {
        let mut known = HashSet::new();
        while let Some((key, span)) = self.key()? {
            if !known.insert(key.clone()) {
                return Err(self.error(&span, &format!("duplicate key {key}")));
            }
            let (event, span) = self.next()?;
            report(Part::Key(&key, self.place(&span)));
            // A list with an anchor is read as a whole, because an alias may repeat it.
            if !matches!(event, Event::SequenceStart(0, _)) {
                match self.node(event, &span, 1)? {
                    Node { value: Value::Sequence(items), .. } => items
                        .into_iter()
                        .enumerate()
                        .for_each(|(index, node)| report(Part::Item(&key, index, node))),
                    node => report(Part::Value(&key, node)),
                }
                continue;
            }
            for index in 0.. {
                match self.next()? {
                    (Event::SequenceEnd, _) => break,
                    (event, span) => report(Part::Item(&key, index, self.node(event, &span, 2)?)),
                }
            }
        }
        Ok(())
    }

    /// The first event of the document; `None` if it is empty.
    fn begin(&mut self) -> Result<Option<(Event<'a>, Span)>, SyntaxError> {
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(None),
                (Event::StreamStart | Event::DocumentStart(_) | Event::Nothing, _) => {}
                first => return Ok(Some(first)),
            }
        }
    }

    /// Rejects content after the document.
    fn end(&mut self) -> Result<(), SyntaxError> {
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(()),
                (Event::DocumentEnd | Event::Nothing, _) => {}
                (_, span) => {
                    return Err(self.error(&span, "a second document: only one is read"));
                }
            }
        }
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

    /// Builds the node that starts with `event`.
    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<Node, SyntaxError> {
        if depth > MAX_DEPTH {
            return Err(self.error(span, "nested too deeply"));
        }
        let (value, anchor, tag) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let is_plain = style == ScalarStyle::Plain;
                let is_null = is_plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                let value = if is_null { Value::Null } else { Value::Scalar(text.into_owned()) };
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
        let mut many = HashSet::new();
        while let Some((key, span)) = self.key()? {
            if !is_new(&key, &entries, &mut many) {
                return Err(self.error(&span, &format!("duplicate key {key}")));
            }
            let (event, span) = self.next()?;
            entries.push((key, self.node(event, &span, depth + 1)?));
        }
        Ok(Value::Mapping(entries))
    }

    /// The next key of a mapping; `None` at its end.
    fn key(&mut self) -> Result<Option<(String, Span)>, SyntaxError> {
        match self.next()? {
            (Event::MappingEnd, _) => Ok(None),
            (Event::Scalar(text, ..), span) => Ok(Some((text.into_owned(), span))),
            (_, span) => Err(self.error(&span, "a key must be a plain word")),
        }
    }

    fn alias(&mut self, anchor: usize, span: &Span) -> Result<Node, SyntaxError> {
        let node = self.anchors.get(&anchor);
        let node = node.ok_or_else(|| self.error(span, "an alias to itself"))?;
        let left = self.aliased_left.checked_sub(node.count());
        self.aliased_left =
            left.ok_or_else(|| self.error(span, "aliases expand to too many values"))?;
        Ok(node.clone())
    }
}

/// Whether the key is new. `many` contains the keys of a large mapping.
fn is_new(key: &str, entries: &[(String, Node)], many: &mut HashSet<String>) -> bool {
    if entries.len() < MAX_LINEARLY_SEARCHED_KEYS {
        return !entries.iter().any(|(known, _)| known == key);
    }
    if many.is_empty() {
        many.extend(entries.iter().map(|(known, _)| known.clone()));
    }
    many.insert(key.to_owned())
}

/// The name of a local tag (`!Exact`). Tags of YAML's schema (`!!str`) are ignored.
fn local_tag(tag: &Tag) -> Option<String> {
    (tag.handle == "!").then(|| tag.suffix.clone())
}
