//! The settings by key.

use serde_json::{Map, Value};
use underpass_config::{SettingValue, Settings};

/// The setting whose values may be secrets, such as tokens.
const HEADERS: &str = "mesh.xds.headers";

/// Every setting with its value in effect, as in a settings file.
pub(super) fn dump(settings: &Settings) -> Map<String, Value> {
    settings.values().map(|(key, value)| (key.to_owned(), shown(key, value))).collect()
}

fn shown(key: &str, value: SettingValue) -> Value {
    match value {
        SettingValue::Scalar(text) => text.into(),
        SettingValue::List(items) if key == HEADERS => {
            let name = |item: &String| item.split_once('=').map_or("", |(name, _)| name).to_owned();
            items.iter().map(|item| format!("{}=(redacted)", name(item))).collect()
        }
        SettingValue::List(items) => items.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::settings;

    #[test]
    fn values_of_headers_are_redacted() {
        let headers = "mesh.xds.headers=x-token=secret,x-revision=canary";
        let settings =
            settings(&["mesh.xds.address=https://istiod:15012", "mesh.xds.roots=r.pem", headers]);
        let dump = dump(&settings);
        let expected = ["x-token=(redacted)", "x-revision=(redacted)"];
        assert_eq!(dump.get(HEADERS), Some(&expected.into_iter().map(Value::from).collect()));
        assert_eq!(dump.get("proxy.hbone_port"), Some(&Value::from("15008")));
        assert!(!Value::from(dump).to_string().contains("secret"));
    }
}
