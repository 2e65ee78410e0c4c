//! The graph of a crate's files, and its cycles.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::resolve;
use crate::source::Crate;

/// The files that each file uses, each with the first name that causes the edge.
pub(crate) struct Graph(BTreeMap<String, BTreeMap<String, String>>);

impl Graph {
    /// The graph of a crate. Uses of an ancestor are omitted.
    pub(crate) fn of(files: &Crate) -> Self {
        let mut edges: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for (module, target) in resolve::uses(files) {
            if module.starts_with(target.module()) {
                continue;
            }
            let file = |path| files.modules.get(path).map(|module| module.file.clone());
            let (Some(from), Some(to)) = (file(&module), file(target.module())) else { continue };
            if from != to {
                edges
                    .entry(from)
                    .or_default()
                    .entry(to)
                    .or_insert_with(|| target.name().to_owned());
            }
        }
        Self(edges)
    }

    /// One line for each group of files that use each other: a shortest cycle among them.
    pub(crate) fn cycles(&self) -> Vec<String> {
        let mut reported: BTreeSet<&String> = BTreeSet::new();
        let mut cycles = Vec::new();
        for start in self.0.keys() {
            if reported.contains(start) {
                continue;
            }
            if let Some(cycle) = self.shortest_cycle(start) {
                cycles.push(self.describe(&cycle));
                reported.extend(cycle);
            }
        }
        cycles
    }

    /// The files of a shortest cycle through `start`, from `start` on. `start` is not repeated at
    /// the end.
    fn shortest_cycle<'a>(&'a self, start: &'a String) -> Option<Vec<&'a String>> {
        let mut came_from: BTreeMap<&String, &String> = BTreeMap::new();
        let mut queue = VecDeque::from([start]);
        while let Some(file) = queue.pop_front() {
            for next in self.0.get(file).into_iter().flat_map(BTreeMap::keys) {
                if next == start {
                    let before = |file: &&'a String| came_from.get(*file).copied();
                    let mut cycle: Vec<_> = std::iter::successors(Some(file), before).collect();
                    cycle.reverse();
                    return Some(cycle);
                }
                if !came_from.contains_key(next) {
                    came_from.insert(next, file);
                    queue.push_back(next);
                }
            }
        }
        None
    }

    fn describe(&self, cycle: &[&String]) -> String {
        let mut text = String::new();
        let next = cycle.iter().skip(1).chain(cycle.first());
        for (file, next) in cycle.iter().zip(next) {
            let name = self.0.get(*file).and_then(|edges| edges.get(*next));
            text.push_str(&format!("{file} -({})-> ", name.map_or("", String::as_str)));
        }
        text + cycle.first().map_or("", |file| file)
    }
}
