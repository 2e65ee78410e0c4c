//! Tests of editing network configurations, on lists in the style of common network plugins.

use proptest::prelude::*;

use super::*;

/// As flannel writes it: indented by two spaces.
const FLANNEL: &str = r#"{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"#;

/// As calico writes it: `plugins` first, and a number that a JSON parser would rewrite.
const CALICO: &str = r#"{"plugins":[{"type":"calico","mtu":1.50e3,"ipam":{"type":"calico-ipam"}},{"type":"bandwidth","capabilities":{"bandwidth":true}}],"cniVersion":"0.3.1","name":"k8s-pod-network"}"#;

/// As cilium writes it: one plugin, indented by tabs.
const CILIUM: &str = "{\n\t\"cniVersion\": \"0.3.1\",\n\t\"name\": \"cilium\",\n\t\"plugins\": [\n\t\t{\n\t\t\t\"type\": \"cilium-cni\",\n\t\t\t\"enable-debug\": false\n\t\t}\n\t]\n}";

/// From containerd's documentation: another order of keys.
const BRIDGE: &str = r#"{
    "cniVersion": "1.0.0",
    "plugins": [ { "type": "bridge", "bridge": "cni0" }, { "type": "firewall" } ],
    "name": "containerd-net"
}
"#;

const SOCKET: &str = "/run/underpass/cni.sock";
const ENTRY: &str = r#"{"socket":"/run/underpass/cni.sock","type":"underpass-cni"}"#;

fn added(text: &str) -> Result<Option<String>, ConflistError> {
    Conflist::parse(text).and_then(|list| list.with_entry(Path::new(SOCKET)))
}

fn removed(text: &str) -> Option<String> {
    Conflist::parse(text).unwrap().without_entry().unwrap()
}

#[test]
fn entry_is_added_at_the_end_and_removed_byte_for_byte() {
    for text in [FLANNEL, CALICO, CILIUM, BRIDGE] {
        let new = added(text).unwrap().unwrap();
        let list: Value = serde_json::from_str(&new).unwrap();
        let last = list["plugins"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(last, serde_json::from_str::<Value>(ENTRY).unwrap());
        assert_eq!(added(&new).unwrap(), None, "adding is idempotent");
        assert_eq!(removed(&new).as_deref(), Some(text));
        assert_eq!(removed(text), None);
    }
}

#[test]
fn entry_has_the_indent_of_its_neighbours() {
    let new = added(FLANNEL).unwrap().unwrap();
    assert!(new.contains(&format!("    }},\n    {ENTRY}\n  ]\n")), "{new}");
    let new = added(CALICO).unwrap().unwrap();
    assert!(new.contains(&format!("}}}},{ENTRY}],\"cniVersion\"")), "{new}");
    let new = added(BRIDGE).unwrap().unwrap();
    assert!(new.contains(&format!("{{ \"type\": \"firewall\" }}, {ENTRY} ]")), "{new}");
}

#[test]
fn plugin_entry_with_other_socket_path_is_replaced_in_position() {
    let text = format!(
        r#"{{"name":"n","cniVersion":"1.0.0","plugins":[{{"type":"a"}},{},{{"type":"b"}}]}}"#,
        ENTRY.replace("cni.sock", "old.sock")
    );
    let new = added(&text).unwrap().unwrap();
    assert_eq!(new, text.replace("old.sock", "cni.sock"));
    assert_eq!(
        removed(&new).unwrap(),
        r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{"type":"b"}]}"#
    );
}

#[test]
fn keys_that_the_operator_added_to_the_entry_are_kept() {
    let own =
        r#"{"type":"underpass-cni","timeout":"60s","args":{"underpass":{"namespace":"default"}}}"#;
    let text = format!(r#"{{"name":"n","cniVersion":"1.0.0","plugins":[{{"type":"a"}},{own}]}}"#);
    assert_eq!(added(&text).unwrap(), None);
}

#[test]
fn misplaced_entry_is_moved_to_the_end() {
    let wanted =
        format!(r#"{{"name":"n","cniVersion":"1.0.0","plugins":[{{"type":"a"}},{ENTRY}]}}"#);
    for plugins in [
        format!(r#"[{ENTRY},{{"type":"a"}}]"#),
        format!(r#"[{{"type":"a"}},{ENTRY},{ENTRY}]"#),
        format!(r#"[{ENTRY},{ENTRY},{{"type":"a"}},{ENTRY}]"#),
    ] {
        let text = format!(r#"{{"name":"n","cniVersion":"1.0.0","plugins":{plugins}}}"#);
        assert_eq!(added(&text).unwrap().unwrap(), wanted);
    }
}

#[test]
fn unsuitable_configurations_are_refused() {
    let too_old =
        |version: &str| format!("its cniVersion {version:?} is too old for chained plugins");
    for (text, error) in [
        ("", "it is not JSON".to_owned()),
        (r#"{"name":"n","plugins":[{"type":"a"}]}"#, too_old("")),
        (r#"{"cniVersion":"0.2.0","name":"n","plugins":[{"type":"a"}]}"#, too_old("0.2.0")),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#, "it has no `plugins`".to_owned()),
        (r#"{"cniVersion":"1.0.0","name":"n"}"#, "it has no `plugins`".to_owned()),
        (
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"underpass-cni"}]}"#,
            "it has no plugin that creates the interface, which ours must follow".to_owned(),
        ),
    ] {
        assert_eq!(added(text).unwrap_err().to_string(), error, "{text}");
    }
    added(r#"{"cniVersions":["0.1.0","1.0.0"],"name":"n","plugins":[{"type":"a"}]}"#).unwrap();
}

#[test]
fn single_configuration_becomes_a_list() {
    let single = r#"{
  "cniVersion": "0.4.0",
  "name": "mynet",
  "type": "bridge",
  "mtu": 1.50e3
}
"#;
    let list = list_of(single, Path::new(SOCKET)).unwrap();
    assert!(list.contains(single.trim()), "{list}");
    let value: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&value["name"], &value["cniVersion"]), (&"mynet".into(), &"0.4.0".into()));
    assert_eq!(value["plugins"][0]["type"], "bridge");
    assert_eq!(value["plugins"][1]["type"], "underpass-cni");
    assert_eq!(added(&list).unwrap(), None);
    let error = list_of(r#"{"cniVersion":"0.4.0","name":"n"}"#, Path::new(SOCKET)).unwrap_err();
    assert_eq!(error.to_string(), "it has no `type`");
}

#[test]
fn drop_in_is_refused_where_the_runtime_ignores_it() {
    let check = |key: &str| {
        let text =
            format!(r#"{{"cniVersion":"1.1.0","name":"n","plugins":[{{"type":"a"}}]{key}}}"#);
        Conflist::parse(&text).unwrap().check_drop_in().map_err(|error| error.to_string())
    };
    check("").unwrap();
    check(r#","loadOnlyInlinedPlugins":false"#).unwrap();
    for value in ["true", r#""true""#, r#""True""#] {
        let error = check(&format!(r#","loadOnlyInlinedPlugins":{value}"#)).unwrap_err();
        assert!(error.contains("loadOnlyInlinedPlugins"), "{error}");
    }
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(".{0,6}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn removal_of_the_entry_restores_the_list_byte_for_byte(
        plugins in proptest::collection::vec(json(), 1..5), extra in json(), pretty in any::<bool>(),
    ) {
        let list = json!({"cniVersion": "1.1.0", "name": "n", "plugins": plugins, "x": extra});
        let text = if pretty { format!("{list:#}\n") } else { list.to_string() };
        let new = added(&text).unwrap().unwrap();
        serde_json::from_str::<Value>(&new).unwrap();
        prop_assert_eq!(removed(&new).unwrap(), text);
    }
}
