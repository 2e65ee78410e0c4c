//! A YAML document as a tree of values with their locations.
//!
//! Scalars stay text, because their meaning depends on the key (`read.rs`): `8080` or `no`. The
//! tree is independent of the known keys.

mod loader;

use std::fmt;
use std::sync::Arc;

use loader::Loader;

/// A value with its location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// A local tag without `!`, such as `Exact` of ztunnel's `!Exact`.
    pub(crate) tag: Option<String>,
    pub(crate) origin: Origin,
}

/// The content of a YAML node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Scalar(String),
    Sequence(Vec<Node>),
    Mapping(Vec<(String, Node)>),
}

/// The location of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line and column in a document.
    Document {
        /// The file, or another name of the document.
        name: Arc<str>,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A `--set KEY=VALUE` flag.
    Flag,
    /// An annotation of a pod.
    Annotation(String),
    /// The settings of the node, which those of a pod overlay.
    NodeSettings,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Document { name, line, column } => write!(f, "{name}:{line}:{column}"),
            Self::Environment(variable) => write!(f, "environment {variable}"),
            Self::Flag => f.write_str("--set"),
            Self::Annotation(key) => write!(f, "annotation {key}"),
            Self::NodeSettings => f.write_str("the node's settings"),
        }
    }
}

/// The reason why a text is not a valid document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub(crate) reason: String,
    pub(crate) origin: Origin,
}

/// A part of a document that [`parts`] reports, in document order.
#[derive(Debug)]
pub(crate) enum Part<'a> {
    /// The entire document if it is not a mapping; null if it is empty.
    Whole(Node),
    /// A key of the top-level mapping, and the location of its value.
    Key(&'a str, Origin),
    /// The value of a top-level key, if it is not a list.
    Value(&'a str, Node),
    /// An item of the list at a top-level key, with its index from 0.
    Item(&'a str, usize, Node),
}

/// Parses the single document in `text`, and reports each item of its top-level lists as soon as it
/// is parsed. So a large document is never entirely in memory as a tree. If an error follows, the
/// caller must discard the reported parts.
pub(crate) fn parts(
    text: &str,
    origin: &dyn Fn(usize, usize) -> Origin,
    report: &mut dyn FnMut(Part<'_>),
) -> Result<(), SyntaxError> {
    Loader::new(text, origin).report_parts(report)
}

impl Node {
    /// An empty mapping, which represents an empty document.
    pub(crate) fn empty(origin: Origin) -> Self {
        Self { value: Value::Mapping(Vec::new()), tag: None, origin }
    }

    /// Parses the single document in `text`. `origin` converts a line and column (from 1) to a
    /// location.
    pub(crate) fn parse(
        text: &str,
        origin: &dyn Fn(usize, usize) -> Origin,
    ) -> Result<Self, SyntaxError> {
        Loader::new(text, origin).document()
    }

    /// Sets the value at `path`, and creates missing mappings.
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

    /// Overlays the value at `path` with the tree `over`: mappings are merged, other values
    /// replaced. Null replaces nothing.
    pub(crate) fn lay_over(&mut self, path: &[&str], over: &Self) {
        match &over.value {
            Value::Mapping(entries) => {
                for (key, node) in entries {
                    self.lay_over(&[path, &[key]].concat(), node);
                }
            }
            Value::Null if self.at(path).is_some() => {}
            _ => self.set(path, over.clone()),
        }
    }

    /// The value at `path`.
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
