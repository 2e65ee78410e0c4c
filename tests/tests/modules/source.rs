//! Reads the files of a crate into modules: the items that each one defines, imports and declares.

use std::collections::{BTreeMap, BTreeSet};

use syn::{Attribute, Item, ItemMod, Meta, UseTree};

/// A module's path from the crate root; empty for the root.
pub(crate) type ModulePath = Vec<String>;

/// The modules of a crate, without those of its tests.
pub(crate) struct Crate {
    pub(crate) modules: BTreeMap<ModulePath, Module>,
    /// The items of each file outside tests, whose paths are collected.
    pub(crate) bodies: Vec<Body>,
}

/// The items of one module in a file.
pub(crate) struct Body {
    pub(crate) module: ModulePath,
    pub(crate) items: Vec<Item>,
}

#[derive(Default)]
pub(crate) struct Module {
    /// The file of the module. An inline module has the file of its parent.
    pub(crate) file: String,
    /// The names that the module defines, except for modules.
    pub(crate) items: BTreeSet<String>,
    /// Imported names, as (local name, imported path).
    pub(crate) imports: Vec<(String, Vec<String>)>,
    /// Paths of glob imports.
    pub(crate) globs: Vec<Vec<String>>,
}

impl Crate {
    /// Parses files, given as (path below `src`, text).
    pub(crate) fn parse(files: &[(String, String)]) -> Self {
        let mut parsed: BTreeMap<ModulePath, (String, Vec<Item>)> = BTreeMap::new();
        for (file, text) in files {
            let Some(path) = module_path(file) else { continue };
            let syntax = syn::parse_file(text).unwrap_or_else(|error| panic!("{file}: {error}"));
            parsed.insert(path, (file.clone(), syntax.items));
        }
        let mut found = Self { modules: BTreeMap::new(), bodies: Vec::new() };
        found.add(&Vec::new(), &parsed);
        found
    }

    /// Adds the module with the file at `path`, and the modules that it declares.
    fn add(&mut self, path: &ModulePath, parsed: &BTreeMap<ModulePath, (String, Vec<Item>)>) {
        let (file, items) = parsed.get(path).unwrap_or_else(|| panic!("no file for {path:?}"));
        self.add_items(path, file, items, parsed);
    }

    fn add_items(
        &mut self,
        path: &ModulePath,
        file: &str,
        items: &[Item],
        parsed: &BTreeMap<ModulePath, (String, Vec<Item>)>,
    ) {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        let product: Vec<Item> =
            items.iter().filter(|item| !is_test(attributes(item))).cloned().collect();
        for item in &product {
            match item {
                Item::Mod(child) => self.add_child(path, file, child, parsed),
                Item::Use(import) => module.import(&[], &import.tree),
                _ => module.items.extend(name(item)),
            }
        }
        self.modules.insert(path.clone(), module);
        self.bodies.push(Body { module: path.clone(), items: product });
    }

    fn add_child(
        &mut self,
        path: &ModulePath,
        file: &str,
        child: &ItemMod,
        parsed: &BTreeMap<ModulePath, (String, Vec<Item>)>,
    ) {
        let has_path_attribute =
            child.attrs.iter().any(|attribute| attribute.path().is_ident("path"));
        assert!(!has_path_attribute, "{file}: #[path] hides where a module is");
        let path = [path.as_slice(), &[child.ident.to_string()]].concat();
        match &child.content {
            None => self.add(&path, parsed),
            Some((_, items)) => self.add_items(&path, file, items, parsed),
        }
    }
}

impl Module {
    /// Adds an import. An import inside a function counts as the module's.
    pub(crate) fn import(&mut self, prefix: &[String], tree: &UseTree) {
        for (name, path) in imports(prefix, tree) {
            match name {
                Some(name) => self.imports.push((name, path)),
                None => self.globs.push(path),
            }
        }
    }
}

/// The imports of a `use`: the local name, `None` for a glob, and the imported path.
pub(crate) fn imports(prefix: &[String], tree: &UseTree) -> Vec<(Option<String>, Vec<String>)> {
    let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
    match tree {
        UseTree::Path(path) => imports(&with(&path.ident), &path.tree),
        UseTree::Name(name) if name.ident == "self" => {
            vec![(prefix.last().cloned(), prefix.to_vec())]
        }
        UseTree::Name(name) => vec![(Some(name.ident.to_string()), with(&name.ident))],
        UseTree::Rename(rename) if rename.ident == "self" => {
            vec![(Some(rename.rename.to_string()), prefix.to_vec())]
        }
        UseTree::Rename(rename) => vec![(Some(rename.rename.to_string()), with(&rename.ident))],
        UseTree::Glob(_) => vec![(None, prefix.to_vec())],
        UseTree::Group(group) => {
            group.items.iter().flat_map(|tree| imports(prefix, tree)).collect()
        }
    }
}

/// The module of a file; `None` for a program's `main.rs`, which uses the library like other
/// programs.
fn module_path(file: &str) -> Option<ModulePath> {
    match file.strip_suffix(".rs")? {
        "main" => None,
        "lib" => Some(Vec::new()),
        path => Some(path.split('/').map(str::to_owned).collect()),
    }
}

/// Whether an item is compiled only for tests.
pub(crate) fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let condition = list.tokens.to_string();
            let negated = condition.replace(' ', "").contains("not(test");
            let words = condition.split(|c: char| !c.is_alphanumeric() && c != '_');
            !negated && words.into_iter().any(|word| word == "test")
        }
        meta => meta.path().is_ident("test"),
    })
}

pub(crate) fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn name(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(ident.to_string())
}
