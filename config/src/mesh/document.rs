//! The mesh file: ztunnel's `LOCAL_XDS_PATH` document (camelCase YAML), checked whole.
//!
//! Of a large document there is never more than one item in memory as a tree: each is turned into a part of the mesh as soon
//! as it is read. What would change routing or policy and cannot be understood is refused: to ignore a policy would open a
//! door, to ignore a waypoint would go round it. Not here: where the texts come from (`source.rs`), and what must fit together
//! across items (`builder.rs`).

mod gateway;
mod policy;
mod service;
mod shared;
mod workload;

use std::sync::Arc;

pub(super) use self::shared::Shared;
use super::{Item, MeshBuilder, Mistake};
use crate::document::{Node, Origin, Part, Value, parts};
use crate::error::Problem;
use crate::read::{Cursor, Problems};

const SECTIONS: &[&str] = &["workloads", "services", "policies"];

/// What one document says, and where.
#[derive(Debug)]
pub(super) struct Document {
    name: Arc<str>,
    items: MeshBuilder,
    /// Of each kind in the order of `items`, which is that of the section: an item that is left out has a mistake.
    workloads: Vec<Place>,
    services: Vec<Place>,
    policies: Vec<Place>,
}

/// Where one item was written; small, for there are many.
#[derive(Debug, Clone, Copy)]
struct Place {
    line: u32,
    column: u32,
}

impl Document {
    /// Reads one document, which is called `name` in errors; `None` if there is a mistake in it.
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
        let root = Cursor::nowhere(problems);
        let mut tell = |part: Part<'_>| match part {
            Part::Whole(node) => refuse(&node, problems),
            Part::Key(key, _) if SECTIONS.contains(&key) => {}
            Part::Key(key, origin) => {
                let node = Node { value: Value::Null, tag: None, origin };
                root.at(key, Some(&node)).no_such_key(key, SECTIONS);
            }
            Part::Value(_, Node { value: Value::Null, .. }) => {}
            Part::Value(key, node) => root.at(key, Some(&node)).problem("must be a list"),
            Part::Item(section, index, node) => {
                let list = root.at(section, None);
                document.item(section, list.item(index, &node), Place::of(&node.origin), shared);
            }
        };
        if let Err(error) = parts(text, &origin, &mut tell) {
            let (reason, origin) = (error.reason, Some(error.origin));
            problems.add(Problem { key: String::new(), value: None, reason, origin });
        }
        document.shrink();
        (problems.count() == before).then_some(document)
    }

    /// What it says.
    pub(super) fn items(&self) -> &MeshBuilder {
        &self.items
    }

    fn item(&mut self, section: &str, item: Cursor<'_>, place: Place, shared: &mut Shared) {
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
            // Its key was told.
            _ => {}
        }
    }

    /// Gives back the memory that more items would have taken: documents are kept.
    fn shrink(&mut self) {
        self.items.shrink();
        for places in [&mut self.workloads, &mut self.services, &mut self.policies] {
            places.shrink_to_fit();
        }
    }

    fn origin(&self, Place { line, column }: Place) -> Option<Origin> {
        let (line, column) = (line.try_into().ok()?, column.try_into().ok()?);
        Some(Origin::Document { name: self.name.clone(), line, column })
    }
}

/// What to tell of a mistake in what `documents` say together.
pub(super) fn problem(documents: &[Arc<Document>], mistake: Mistake) -> Problem {
    let Mistake { item, key, reason } = mistake;
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
    Problem { key: format!("{section}[{index}].{key}"), value: None, reason, origin }
}

/// A file without anything in it is more likely to be written just now than to mean a mesh without policies.
fn refuse(root: &Node, problems: &Problems) {
    Cursor::root(root, problems).problem(match root.value {
        Value::Null => "is empty; a mesh without anything in it is written as workloads: []",
        _ => "must be a mapping (key: value)",
    });
}

impl Place {
    fn of(origin: &Origin) -> Self {
        match origin {
            Origin::Document { line, column, .. } => {
                Self { line: small(*line), column: small(*column) }
            }
            Origin::Environment(_) | Origin::Flag => Self { line: 0, column: 0 },
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
