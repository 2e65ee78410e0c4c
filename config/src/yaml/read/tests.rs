//! Tests of typed values and mistakes in small documents.

use super::*;

fn problems_of(text: &str, read: impl Fn(Cursor<'_>)) -> Vec<String> {
    let origin = |line, column| Origin::Document { name: "f".into(), line, column };
    let node = Node::parse(text, &origin).unwrap();
    let problems = Problems::default();
    read(Cursor::root(&node, &problems));
    problems.kept.into_inner().iter().map(ToString::to_string).collect()
}

#[test]
fn mistakes_report_place_key_and_value() {
    let found = problems_of("a:\n  port: 99999\n  list: [1, x]\n  outboundport: 1\n", |root| {
        let a = root.key("a");
        a.only(&["port", "list", "outbound_port"]);
        a.key("port").port();
        a.key("list").items(|item| item.parse::<u8>("a small number"));
    });
    assert_eq!(
        found,
        [
            "f:4:17: a.outboundport: \"1\": no such key",
            "f:2:9: a.port: \"99999\": must be a port, 1 to 65535",
            "f:3:13: a.list[1]: \"x\": must be a small number",
        ]
    );
}

#[test]
fn duration_requires_unit_and_rejects_zero() {
    assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
    assert_eq!(parse_duration("5m"), Some(Duration::from_secs(300)));
    for bad in
        ["10", "s", "", "0s", "1d", "-1s", "1.5s", "99999999999999999999h", "18446744073709551615h"]
    {
        assert_eq!(parse_duration(bad), None, "{bad}");
    }
}

#[test]
fn ports_and_booleans_are_written_as_in_yaml() {
    for (text, port) in [("80", 80), ("0x50", 80), ("0o120", 80), ("0xFfFf", 65535), ("0", 0)] {
        assert_eq!(parse_port(text), Some(port), "{text}");
    }
    for bad in
        ["", "0x", "0o", "0x+50", "0o8", "0X50", "0b1", "0x10000", "-1", "80.0", "1e2", "x50"]
    {
        assert_eq!(parse_port(bad), None, "{bad}");
    }
    for (text, flag) in [("true", true), ("TRUE", true), ("False", false), ("FALSE", false)] {
        assert_eq!(parse_flag(text), Some(flag), "{text}");
    }
    for bad in ["", "tRUE", "yes", "on", "1", "y"] {
        assert_eq!(parse_flag(bad), None, "{bad}");
    }
}

#[test]
fn wrong_type_of_value_is_a_mistake() {
    let found = problems_of("a: [1]\nb: 1\nc: {d: 1}\n", |root| {
        root.key("a").text();
        root.key("b").items(|_| Some(()));
        root.key("c").port();
        root.key("b").entries();
    });
    assert_eq!(found.len(), 4, "{found:?}");
}
