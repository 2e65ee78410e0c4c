//! Checks that the modules of every crate form a directed acyclic graph, and that none imports from
//! its crate root.
//!
//! Each file has an edge to every file that defines a name it mentions. Re-exports are followed to
//! the definition, so that they hide no cycle. Edges to an ancestor are omitted, because children
//! may use their parent, and so are edges from test code.
//!
//! In reading order: `source` reads files into modules, `paths` finds the mentioned paths,
//! `resolve` follows each path to its definition, `graph` finds cycles.
#![expect(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod graph;
mod paths;
mod resolve;
mod source;

use std::fs;
use std::path::{Path, PathBuf};

use crate::graph::Graph;
use crate::source::Crate;

/// The source folders of the workspace.
const SOURCES: [&str; 6] =
    ["config/src", "interception/src", "hbone/src", "proxy/src", "tests/src", "benches/src"];

fn load(folder: &str) -> Crate {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                let name = path.strip_prefix(&root).expect("a file below the root");
                files.push((name.display().to_string(), text));
            }
        }
    }
    Crate::parse(&files)
}

#[test]
fn modules_form_no_cycle() {
    let cycles: Vec<String> = SOURCES
        .iter()
        .flat_map(|folder| {
            let cycles = Graph::of(&load(folder)).cycles();
            cycles.into_iter().map(move |cycle| format!("{folder}: {cycle}"))
        })
        .collect();
    assert!(cycles.is_empty(), "module cycles:\n{}", cycles.join("\n"));
}

#[test]
fn product_code_imports_nothing_from_its_crate_root() {
    let found: Vec<String> = SOURCES
        .iter()
        .flat_map(|folder| {
            let found = resolve::mentions_of_root(&load(folder));
            found.into_iter().map(move |mention| format!("{folder}/{mention}"))
        })
        .collect();
    let hint = "name the module that defines it: crate::error::Error, not crate::Error";
    assert!(found.is_empty(), "imports from the crate root ({hint}):\n{}", found.join("\n"));
}

/// The cycles of a crate with these files.
fn cycles(files: &[(&str, &str)]) -> Vec<String> {
    let own = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
    Graph::of(&Crate::parse(&files.iter().map(own).collect::<Vec<_>>())).cycles()
}

/// The cycles of a crate with the modules `a` and `b`, where `b` uses `a`.
fn crate_of_two_modules(a: &str) -> Vec<String> {
    cycles(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", a),
        (
            "b.rs",
            "use crate::a::A; pub struct B; pub fn b(_: A) {} pub mod inner { pub struct C; } pub trait Trait {} macro_rules! make { () => {} }",
        ),
    ])
}

#[test]
fn module_check_finds_cycle_for_any_form_of_path() {
    for a in [
        "pub struct A; use crate::b::B;",
        "pub struct A; use super::b::B;",
        "pub struct A; use crate::{b::{self, B}};",
        "pub struct A; use crate::b::B as Other;",
        "pub struct A; use crate::b::*;",
        "pub struct A; use crate::b; fn f() { b::b(A) }",
        "pub struct A; use crate::b as other; fn f() -> other::B { other::B }",
        "pub struct A; fn f() { crate::b::b(A) }",
        "pub struct A; fn f(_: &super::b::B) {}",
        "pub struct A; fn f() { use crate::b::b; b(A) }",
        "pub struct A; fn f() { println!(\"{:?}\", crate::b::b(A)) }",
        "pub struct A; macro_rules! m { () => { $crate::b::b(A) } }",
        "pub struct A; mod inline { use super::super::b::B; }",
        "pub struct A; mod inline { fn f() -> crate::b::inner::C { crate::b::inner::C } }",
        "pub struct A; impl From<crate::b::B> for A {}",
        "pub struct A; pub struct T { field: Option<crate::b::B> }",
        "pub struct A; pub trait T: crate::b::Trait {}",
        "pub struct A; #[derive(Debug)] pub enum E { V(#[from] crate::b::B) }",
        "pub struct A; fn f() { crate::b::make!() }",
    ] {
        assert_eq!(crate_of_two_modules(a).len(), 1, "{a}");
    }
}

#[test]
fn module_check_accepts_modules_without_cycle() {
    for a in [
        "pub struct A;",
        "pub struct A; // use crate::b::B;\n/// See [`crate::b::B`].\npub struct D;",
        "pub struct A; #[cfg(test)] mod tests { use crate::b::B; }",
        "pub struct A; #[cfg(test)] use crate::b::B;",
        "pub struct A; #[cfg(all(test, unix))] fn f(_: crate::b::B) {}",
        "pub struct A; use std::b::B;",
        "pub struct A; fn f() -> &'static str { \"crate::b::B\" }",
    ] {
        assert_eq!(crate_of_two_modules(a), Vec::<String>::new(), "{a}");
    }
}

#[test]
fn module_check_follows_reexport_to_defining_file() {
    for lib in [
        "mod a; mod b; mod facade { pub use crate::b::B; }",
        "mod a; mod b; mod facade { pub use super::b::*; }",
        "mod a; mod b; use b as other; mod facade { pub use crate::other::B; }",
    ] {
        let files = [
            ("lib.rs", lib),
            ("a.rs", "use crate::facade::B; pub struct A;"),
            ("b.rs", "use crate::a::A; pub struct B;"),
        ];
        assert_eq!(cycles(&files).len(), 1, "{lib}");
    }
}

#[test]
fn module_check_follows_reexport_of_parent_to_sibling() {
    let files = [
        ("lib.rs", "mod node;"),
        ("node.rs", "mod pod; mod seat; pub use pod::Pod; pub use self::seat::Seat;"),
        ("node/pod.rs", "use super::Seat; pub struct Pod;"),
        ("node/seat.rs", "use crate::node::Pod; pub struct Seat;"),
    ];
    let found = cycles(&files);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("node/pod.rs") && found[0].contains("node/seat.rs"), "{found:?}");
}

#[test]
fn module_check_names_every_file_of_a_long_cycle() {
    let files = [
        ("lib.rs", "mod a; mod b; mod c; mod d;"),
        ("a.rs", "use crate::b::B; pub struct A;"),
        ("b.rs", "use crate::c::C; pub struct B;"),
        ("c.rs", "use crate::a::A; pub struct C;"),
        ("d.rs", "use crate::a::A; use crate::c::C;"),
    ];
    let expected = "a.rs -(B)-> b.rs -(C)-> c.rs -(A)-> a.rs";
    assert_eq!(cycles(&files), [expected]);
}

#[test]
fn module_check_lets_children_use_their_parent() {
    let files = [
        ("lib.rs", "mod node;"),
        ("node.rs", "mod pod; pub struct Node(pod::Pod);"),
        ("node/pod.rs", "use super::Node; use crate::node::Node as Same; pub struct Pod;"),
    ];
    assert_eq!(cycles(&files), Vec::<String>::new());
}

#[test]
fn module_check_ignores_files_of_tests() {
    let files = [
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "pub struct A; #[cfg(test)] mod tests;"),
        ("a/tests.rs", "mod deeper; use crate::b::B;"),
        ("a/tests/deeper.rs", "use crate::b::B;"),
        ("b.rs", "use crate::a::A; pub struct B;"),
    ];
    assert_eq!(cycles(&files), Vec::<String>::new());
}

#[test]
fn module_check_finds_import_from_crate_root() {
    let of = |text: &str| {
        let files = [("lib.rs", "mod a; mod b; pub use b::B; pub struct Root;"), ("a.rs", text)];
        let own = |(name, text): (&str, &str)| (name.to_owned(), text.to_owned());
        let mut files = files.map(own).to_vec();
        files.push(("b.rs".to_owned(), "pub struct B;".to_owned()));
        resolve::mentions_of_root(&Crate::parse(&files))
    };
    for text in [
        "use crate::B;",
        "use crate::{B, b};",
        "use super::Root;",
        "use crate::*;",
        "fn f(_: crate::Root) {}",
        "fn f() { println!(\"{}\", crate::B) }",
    ] {
        assert_eq!(of(text).len(), 1, "{text}");
    }
    for text in ["use crate::b::B;", "use crate::b;", "use super::b;", "use crate::b::{self, B};"] {
        assert_eq!(of(text), Vec::<String>::new(), "{text}");
    }
}
