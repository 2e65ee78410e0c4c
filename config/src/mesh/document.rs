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

use self::shared::Shared;
use super::{Item, Mesh, MeshBuilder, Mistake};
use crate::document::{Node, Origin, Part, Value, parts};
use crate::error::{ConfigErrors, Problem};
use crate::read::{Cursor, Problems};

const SECTIONS: &[&str] = &["workloads", "services", "policies"];

/// Reads the documents of one mesh, one after the other; their items may refer to each other.
#[derive(Debug, Default)]
pub(super) struct Reader {
    problems: Problems,
    builder: MeshBuilder,
    shared: Shared,
    places: Places,
}

/// Where the items of a mesh were written, in the order in which the builder was given them.
#[derive(Debug, Default)]
struct Places {
    documents: Vec<Arc<str>>,
    workloads: Vec<Place>,
    services: Vec<Place>,
    policies: Vec<Place>,
}

/// Where one item was written; small, for there are many.
#[derive(Debug, Clone, Copy)]
struct Place {
    document: u32,
    /// Which item of its section.
    index: u32,
    line: u32,
    column: u32,
}

impl Reader {
    /// Reads one document, which is called `name` in errors.
    pub(super) fn document(&mut self, name: &str, text: &str) {
        let Self { problems, builder, shared, places } = self;
        let document = small(places.documents.len());
        let name = Arc::<str>::from(name);
        places.documents.push(name.clone());
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
                let place = Place::new(document, index, &node.origin);
                let list = root.at(section, None);
                item(section, list.item(index, &node), place, builder, shared, places);
            }
        };
        if let Err(error) = parts(text, &origin, &mut tell) {
            let (reason, origin) = (error.reason, Some(error.origin));
            problems.add(Problem { key: String::new(), value: None, reason, origin });
        }
    }

    /// Tells that a document could not be read.
    pub(super) fn unreadable(&mut self, reason: String) {
        self.problems.add(Problem { key: String::new(), value: None, reason, origin: None });
    }

    /// The mesh of all documents.
    pub(super) fn finish(self) -> Result<Mesh, ConfigErrors> {
        let Self { problems, builder, shared, places } = self;
        // What is missing because it could not be read is no second mistake.
        if !problems.is_empty() {
            return problems.or_else(None);
        }
        drop(shared);
        match builder.build() {
            Ok(mesh) => Ok(mesh),
            Err(mistakes) => {
                mistakes.into_iter().for_each(|mistake| problems.add(places.problem(mistake)));
                problems.or_else(None)
            }
        }
    }
}

/// A file without anything in it is more likely to be written just now than to mean a mesh without policies.
fn refuse(root: &Node, problems: &Problems) {
    Cursor::root(root, problems).problem(match root.value {
        Value::Null => "is empty; a mesh without anything in it is written as workloads: []",
        _ => "must be a mapping (key: value)",
    });
}

fn item(
    section: &str,
    item: Cursor<'_>,
    place: Place,
    builder: &mut MeshBuilder,
    shared: &mut Shared,
    places: &mut Places,
) {
    if !item.is_mapping() {
        return item.problem("must be a mapping (key: value)");
    }
    match section {
        "workloads" => {
            if let Some(draft) = workload::workload(item, shared) {
                builder.workload(draft);
                places.workloads.push(place);
            }
        }
        "services" => {
            if let Some(service) = service::service(item, shared) {
                builder.service(service);
                places.services.push(place);
            }
        }
        "policies" => {
            if let Some(policy) = policy::policy(item, &mut shared.names) {
                builder.policy(policy);
                places.policies.push(place);
            }
        }
        // Its key was told.
        _ => {}
    }
}

impl Places {
    fn problem(&self, Mistake { item, key, reason }: Mistake) -> Problem {
        let (section, place) = match item {
            Item::Workload(index) => ("workloads", self.workloads.get(index)),
            Item::Service(index) => ("services", self.services.get(index)),
            Item::Policy(index) => ("policies", self.policies.get(index)),
        };
        let origin = place.and_then(|place| self.origin(place));
        let index = place.map(|place| place.index).unwrap_or_default();
        Problem { key: format!("{section}[{index}].{key}"), value: None, reason, origin }
    }

    fn origin(&self, place: &Place) -> Option<Origin> {
        let name = self.documents.get(usize::try_from(place.document).ok()?)?.clone();
        let line = usize::try_from(place.line).ok()?;
        Some(Origin::Document { name, line, column: usize::try_from(place.column).ok()? })
    }
}

impl Place {
    fn new(document: u32, index: usize, origin: &Origin) -> Self {
        let (line, column) = match origin {
            Origin::Document { line, column, .. } => (*line, *column),
            Origin::Environment(_) | Origin::Flag => (0, 0),
        };
        Self { document, index: small(index), line: small(line), column: small(column) }
    }
}

fn small(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
