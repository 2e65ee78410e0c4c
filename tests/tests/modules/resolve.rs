//! Follows a path to the file that defines its item.

use std::collections::BTreeSet;

use crate::paths::mentioned;
use crate::source::{Crate, Module, ModulePath};

/// The item or module that a path resolves to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    Module(ModulePath),
    /// A name that the module defines.
    Item(ModulePath, String),
}

impl Target {
    pub(crate) fn module(&self) -> &ModulePath {
        match self {
            Self::Module(module) | Self::Item(module, _) => module,
        }
    }

    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Module(module) => module.last().map_or("the crate root", String::as_str),
            Self::Item(_, name) => name,
        }
    }
}

/// The references between the crate's modules: (module, referenced target).
pub(crate) fn uses(of: &Crate) -> BTreeSet<(ModulePath, Target)> {
    let mut found = BTreeSet::new();
    for body in &of.bodies {
        for path in mentioned(&body.items) {
            let targets = Resolver::new(of).targets(&body.module, &path);
            found.extend(targets.into_iter().map(|target| (body.module.clone(), target)));
        }
    }
    found
}

/// The paths that a module imports from the crate root, as `file: path`.
pub(crate) fn mentions_of_root(of: &Crate) -> Vec<String> {
    let mut found = BTreeSet::new();
    for body in of.bodies.iter().filter(|body| !body.module.is_empty()) {
        for path in mentioned(&body.items) {
            let Some((start, rest)) = anchor(&body.module, &path) else { continue };
            let Some(first) = rest.first().filter(|_| start.is_empty()) else { continue };
            if !of.modules.contains_key(std::slice::from_ref(first)) {
                let file = of.modules.get(&body.module).map_or("", |module| &module.file);
                found.insert(format!("{file}: {}", path.join("::")));
            }
        }
    }
    found.into_iter().collect()
}

/// The module in which a path starts, and the rest of the path; `None` if it starts with a name in
/// scope.
fn anchor<'a>(module: &ModulePath, path: &'a [String]) -> Option<(ModulePath, &'a [String])> {
    let mut start = match path.first()?.as_str() {
        "crate" => Vec::new(),
        "self" | "super" => module.clone(),
        _ => return None,
    };
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        match first.as_str() {
            "super" => drop(start.pop()),
            "crate" | "self" => {}
            _ => break,
        }
        rest = after;
    }
    Some((start, rest))
}

struct Resolver<'a> {
    of: &'a Crate,
    /// The lookups in progress, to end the resolution of cyclic imports.
    open: BTreeSet<(ModulePath, String)>,
}

impl<'a> Resolver<'a> {
    fn new(of: &'a Crate) -> Self {
        Self { of, open: BTreeSet::new() }
    }

    /// The targets of `path` in `module`; empty if it leads to another crate. A glob has every name
    /// that it imports as a target.
    fn targets(&mut self, module: &ModulePath, path: &[String]) -> Vec<Target> {
        match path.split_last() {
            Some((last, before)) if last == "*" => match self.resolve(module, before) {
                Some(Target::Module(all)) => self.all_names(&all),
                other => other.into_iter().collect(),
            },
            _ => self.resolve(module, path).into_iter().collect(),
        }
    }

    fn all_names(&mut self, module: &ModulePath) -> Vec<Target> {
        let Some(found) = self.of.modules.get(module) else { return Vec::new() };
        let imported = found.imports.iter().map(|(name, _)| name);
        let names: BTreeSet<&String> = found.items.iter().chain(imported).collect();
        let mut all: Vec<Target> =
            names.into_iter().filter_map(|name| self.lookup(module, name)).collect();
        for glob in &found.globs {
            if self.open.insert((module.clone(), format!("{}::*", glob.join("::")))) {
                all.extend(self.targets(module, &[glob.as_slice(), &["*".to_owned()]].concat()));
            }
        }
        all
    }

    fn resolve(&mut self, module: &ModulePath, path: &[String]) -> Option<Target> {
        let (start, rest) = match anchor(module, path) {
            Some((start, rest)) => (Target::Module(start), rest),
            None => {
                let (first, rest) = path.split_first()?;
                (self.lookup(module, first)?, rest)
            }
        };
        rest.iter().try_fold(start, |target, name| match target {
            Target::Module(module) => self.lookup(&module, name),
            // The rest of the path is part of the item: a variant, an associated function.
            item @ Target::Item(..) => Some(item),
        })
    }

    /// The target of `name` in `module`: a child, an item, or an import.
    fn lookup(&mut self, module: &ModulePath, name: &str) -> Option<Target> {
        let child = [module.as_slice(), &[name.to_owned()]].concat();
        if self.of.modules.contains_key(&child) {
            return Some(Target::Module(child));
        }
        let Module { items, imports, globs, .. } = self.of.modules.get(module)?;
        if items.contains(name) {
            return Some(Target::Item(module.clone(), name.to_owned()));
        }
        let key = (module.clone(), name.to_owned());
        if !self.open.insert(key.clone()) {
            return None;
        }
        let imported = imports.iter().find(|(imported, _)| imported == name);
        let found = match imported {
            Some((_, path)) => self.resolve(module, path),
            None => globs.iter().find_map(|glob| {
                self.resolve(module, &[glob.as_slice(), &[name.to_owned()]].concat())
            }),
        };
        self.open.remove(&key);
        found
    }
}
