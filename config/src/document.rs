//! A YAML document as a tree in which every value knows where it was written.
//!
//! Scalars stay text: what a `8080` or a `no` means is the business of whoever reads the key (`read.rs`). Not here: any
//! knowledge of which keys exist.

mod loader;

use std::fmt;
use std::sync::Arc;

use loader::Loader;

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
        name: Arc<str>,
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

/// What [`parts`] tells of a document, in the order of the text.
#[derive(Debug)]
pub(crate) enum Part<'a> {
    /// The document is not a mapping, but this; a null if there is nothing in it.
    Whole(Node),
    /// A key of the mapping that the document is, and where its value begins.
    Key(&'a str, Origin),
    /// The value of that key, which is not a list.
    Value(&'a str, Node),
    /// An item of the list that the value of that key is, counted from 0.
    Item(&'a str, usize, Node),
}

/// Reads the one document in `text` and gives away each item of the lists at its top as soon as it is read, so that a
/// large document is never a tree as a whole. What was told before an error counts for nothing.
pub(crate) fn parts(
    text: &str,
    origin: &dyn Fn(usize, usize) -> Origin,
    tell: &mut dyn FnMut(Part<'_>),
) -> Result<(), SyntaxError> {
    Loader::new(text, origin).parts(tell)
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
        Loader::new(text, origin).document()
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

#[cfg(test)]
mod tests;
