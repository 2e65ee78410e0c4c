//! Tests of valid and invalid documents, as trees and in parts.

use super::*;

fn at(line: usize, column: usize) -> Origin {
    Origin::Document { name: "t".into(), line, column }
}

fn parse(text: &str) -> Result<Node, SyntaxError> {
    Node::parse(text, &at)
}

#[test]
fn values_have_line_and_column() {
    let root = parse("a: 1\nb:\n  - x\n  - !Exact y\n").unwrap();
    let Value::Mapping(entries) = &root.value else { panic!("{root:?}") };
    assert_eq!(entries[0].1.origin, at(1, 4));
    let Value::Sequence(items) = &entries[1].1.value else { panic!("{root:?}") };
    assert_eq!(items[0].origin, at(3, 5));
    assert_eq!(items[1].tag.as_deref(), Some("Exact"));
    assert_eq!(items[1].value, Value::Scalar("y".into()));
}

#[test]
fn empty_document_is_empty_mapping() {
    for text in ["", "# only a comment\n", "---\n"] {
        let root = parse(text).unwrap();
        assert!(matches!(root.value, Value::Null) || root.value == Value::Mapping(vec![]));
    }
}

#[test]
fn yaml_alias_repeats_its_anchor() {
    let root = parse("a: &x [1, 2]\nb: *x\n").unwrap();
    let Value::Mapping(entries) = &root.value else { panic!("{root:?}") };
    assert_eq!(entries[0].1.value, entries[1].1.value);
}

#[test]
fn rejects_hostile_documents_without_expansion() {
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let last = format!("*a{}, ", level - 1).repeat(9);
        laughs.push_str(&format!("a{level}: &a{level} [{last} *a{}]\n", level - 1));
    }
    let deep = format!("{}x{}", "[".repeat(40), "]".repeat(40));
    for (text, reason) in [
        (laughs.as_str(), "aliases expand"),
        (deep.as_str(), "nested too deeply"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: 1\n---\nb: 2\n", "second document"),
        ("a: [1, 2\n", "not YAML"),
        ("? [a]\n: b\n", "a key must be"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.reason.contains(reason), "{text:.40}: {}", error.reason);
    }
}

#[test]
fn setting_a_value_replaces_it_or_creates_its_path() {
    let mut root = parse("proxy: {workers: 1, hbone_port: 15008}\n").unwrap();
    let node = |text| Node { origin: Origin::Flag, ..parse(text).unwrap() };
    root.set(&["proxy", "workers"], node("4"));
    root.set(&["mesh", "file"], node("m.yaml"));
    let expected = parse("proxy: {workers: 4, hbone_port: 15008}\nmesh: {file: m.yaml}\n");
    assert_eq!(shape(&root), shape(&expected.unwrap()));
}

fn shape(node: &Node) -> String {
    match &node.value {
        Value::Null => "~".into(),
        Value::Scalar(text) => text.clone(),
        Value::Sequence(items) => items.iter().map(shape).collect::<Vec<_>>().join(","),
        Value::Mapping(entries) => {
            entries.iter().map(|(key, node)| format!("{{{key}:{}}}", shape(node))).collect()
        }
    }
}
