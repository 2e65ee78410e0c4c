//! Tests of all declarations.

use std::collections::BTreeSet;

use super::*;
use crate::settings::declare::Written;
use crate::settings::load::settings_of;

#[test]
fn every_setting_is_declared_once_with_type_default_and_help() {
    assert_eq!(keys().collect::<BTreeSet<_>>().len(), keys().count());
    for Reference { key, kind, default, help } in reference() {
        assert!(![kind, &default, &help].contains(&""), "{key}");
        for text in [kind, &default, &help] {
            assert!(!text.contains(['|', '\n']), "{key} breaks the table: {text}");
        }
    }
}

#[test]
fn documented_default_is_the_value_of_an_absent_setting() {
    let settings = settings_of("identity: {local_ca: /ca}").unwrap();
    for setting in declared() {
        let default = setting.reference().default;
        let Some(in_words) = default.strip_prefix('`').and_then(|rest| rest.strip_suffix('`'))
        else {
            continue;
        };
        let expected = match setting.written(&settings) {
            Some(Written::Scalar(text)) if text.is_empty() => "\"\"".to_owned(),
            Some(Written::Scalar(text)) => text,
            Some(Written::List(items)) => format!("[{}]", items.join(", ")),
            // The setting belongs to another source of the identity.
            None => continue,
        };
        // The description of a varying default begins with a word.
        if !in_words.contains('`') {
            assert_eq!(in_words, expected, "{}", setting.key());
        }
    }
}
