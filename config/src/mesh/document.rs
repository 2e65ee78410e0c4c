//! Reads the mesh file: ztunnel's `LOCAL_XDS_PATH` document (YAML with camelCase keys).
//!
//! Only one item of the document is in memory as a tree at a time, which bounds memory for large
//! documents. A value that affects routing or policies and is not understood is an error: ignoring
//! a policy would allow traffic, and ignoring a waypoint would bypass it. `source.rs` reads files,
//! and `builder.rs` checks references between items.

mod gateway;
mod policy;
mod service;
mod workload;

use std::sync::Arc;

use super::shared::Shared;
use super::{Item, MeshBuilder, Mistake};
use crate::error::{Problem, Reason};
use crate::yaml::document::{Node, Origin, Part, Value, parts};
use crate::yaml::read::{Cursor, Problems};

const SECTIONS: &[&str] = &["workloads", "services", "policies"];

/// The items of one document with their locations.
#[derive(Debug)]
pub(super) struct Document {
    name: Arc<str>,
    items: MeshBuilder,
    /// The locations of the workloads in `items`. Items with mistakes are missing.
    workloads: Vec<ItemLocation>,
    services: Vec<ItemLocation>,
    policies: Vec<ItemLocation>,
}

/// The location of an item, in a compact form.
#[derive(Debug, Clone, Copy)]
struct ItemLocation {
    line: u32,
    column: u32,
}

impl Document {
    /// Reads a document; errors use `name` as its name. `None` if it has mistakes.
    pub(super) fn read(
        name: &str,
        text: &str,
        shared: &mut Shared,
        problems: &Problems,
    ) -> Option<Self> {
        let before = problems.count();
        let mut document = Self {
            name: name.into(),
            items: MeshBuilder::default(),
            workloads: Vec::new(),
            services: Vec::new(),
            policies: Vec::new(),
        };
        let name = document.name.clone();
        let origin = |line, column| Origin::Document { name: name.clone(), line, column };
        let root = Cursor::absent_root(problems);
        let mut tell = |part: Part<'_>| match part {
            Part::Whole(node) => reject_non_mapping(&node, problems),
            Part::Key(key, _) if SECTIONS.contains(&key) => {}
            Part::Key(key, origin) => {
                let node = Node { value: Value::Null, tag: None, origin };
                root.at(key, Some(&node)).no_such_key(key, SECTIONS);
            }
            Part::Value(_, Node { value: Value::Null, .. }) => {}
            Part::Value(key, node) => root.at(key, Some(&node)).problem("must be a list"),
            Part::Item(section, index, node) => {
                let list = root.at(section, None);
                document.read_item(
                    section,
                    list.item(index, &node),
                    ItemLocation::of(&node.origin),
                    shared,
                );
            }
        };
        if let Err(error) = parts(text, &origin, &mut tell) {
            let (reason, origin) = (error.reason, Some(error.origin));
            problems.add(Problem { key: String::new(), value: None, reason, hint: None, origin });
        }
        document.shrink();
        (problems.count() == before).then_some(document)
    }

    /// The items.
    pub(super) fn items(&self) -> &MeshBuilder {
        &self.items
    }

    fn read_item(
        &mut self,
        section: &str,
        item: Cursor<'_>,
        place: ItemLocation,
        shared: &mut Shared,
    ) {
        if !item.is_mapping() {
            return item.problem("must be a mapping (key: value)");
        }
        match section {
            "workloads" => {
                if let Some(draft) = workload::workload(item, shared) {
                    self.items.workload(draft);
                    self.workloads.push(place);
                }
            }
            "services" => {
                if let Some(service) = service::service(item, shared) {
                    self.items.service(service);
                    self.services.push(place);
                }
            }
            "policies" => {
                if let Some(policy) = policy::policy(item, &mut shared.names) {
                    self.items.policy(policy);
                    self.policies.push(place);
                }
            }
            // The unknown key was reported.
            _ => {}
        }
    }

    /// Releases unused capacity, because documents are kept.
    fn shrink(&mut self) {
        self.items.shrink();
        for places in [&mut self.workloads, &mut self.services, &mut self.policies] {
            places.shrink_to_fit();
        }
    }

    fn origin(&self, ItemLocation { line, column }: ItemLocation) -> Option<Origin> {
        let (line, column) = (line.try_into().ok()?, column.try_into().ok()?);
        Some(Origin::Document { name: self.name.clone(), line, column })
    }
}

/// Converts a mistake in the combination of `documents` to a problem with a location.
pub(super) fn problem(documents: &[Arc<Document>], mistake: Mistake) -> Problem {
    let Mistake { item, key, reason, hint } = mistake;
    let (section, mut index) = match item {
        Item::Workload(index) => ("workloads", index),
        Item::Service(index) => ("services", index),
        Item::Policy(index) => ("policies", index),
    };
    let mut origin = None;
    for document in documents {
        let places = match item {
            Item::Workload(_) => &document.workloads,
            Item::Service(_) => &document.services,
            Item::Policy(_) => &document.policies,
        };
        if let Some(place) = places.get(index) {
            origin = document.origin(*place);
            break;
        }
        index -= places.len();
    }
    Problem { key: format!("{section}[{index}].{key}"), value: None, reason, hint, origin }
}

/// Rejects an empty file: a program is probably writing it, and it would remove all policies.
fn reject_non_mapping(root: &Node, problems: &Problems) {
    Cursor::root(root, problems).problem(match root.value {
        Value::Null => Reason::with_hint("is empty", "write an empty mesh as workloads: []"),
        _ => "must be a mapping (key: value)".into(),
    });
}

impl ItemLocation {
    fn of(origin: &Origin) -> Self {
        match origin {
            Origin::Document { line, column, .. } => {
                Self { line: small(*line), column: small(*column) }
            }
            _ => Self { line: 0, column: 0 },
        }
    }
}

fn small(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
