//! The pod's addresses according to the result of the previous plugin.
//!
//! The plugin passes the result on unchanged, and reads only the addresses of interfaces inside the
//! pod. A result also lists interfaces of the host, such as the bridge.

use std::net::IpAddr;

use serde_json::Value;

use super::plugin_error::PluginError;

/// The hint for an unusable result.
const NO_ADDRESS_HINT: &str = "the plugin before underpass-cni must report an address of an interface inside the pod; the runtime tries again";

/// The addresses of the interfaces inside the pod, without duplicates.
pub(super) fn addresses(result: &str) -> Result<Vec<IpAddr>, PluginError> {
    let invalid = |reason: &str| PluginError::config("prevResult", reason);
    let result: Value =
        serde_json::from_str(result).map_err(|_| invalid("is not a result of a plugin"))?;
    if !result.is_object() {
        return Err(invalid("is not a result of a plugin"));
    }
    let interfaces = list(&result, "interfaces")?;
    let mut addresses = Vec::new();
    for entry in list(&result, "ips")? {
        if is_inside(entry, interfaces)? {
            let address = address(entry)?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    if addresses.is_empty() {
        let message = "prevResult has no address of an interface inside the pod".to_owned();
        return Err(PluginError::Fact { message, hint: NO_ADDRESS_HINT });
    }
    Ok(addresses)
}

fn list<'a>(result: &'a Value, key: &str) -> Result<&'a [Value], PluginError> {
    match result.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(PluginError::config("prevResult", format!("`{key}` is not a list"))),
    }
}

/// Whether an address belongs to an interface inside the pod. A plugin may omit the interface if
/// the result lists no interfaces.
fn is_inside(entry: &Value, interfaces: &[Value]) -> Result<bool, PluginError> {
    let index = match entry.get("interface") {
        None | Some(Value::Null) => return Ok(true),
        Some(index) => index,
    };
    let interface = index
        .as_u64()
        .and_then(|index| usize::try_from(index).ok())
        .and_then(|i| interfaces.get(i));
    let Some(interface) = interface else {
        let message =
            format!("prevResult has an address of interface {index}, which it does not list");
        return Err(PluginError::Fact { message, hint: NO_ADDRESS_HINT });
    };
    let sandbox = interface.get("sandbox").and_then(Value::as_str).unwrap_or_default();
    Ok(!sandbox.is_empty())
}

fn address(entry: &Value) -> Result<IpAddr, PluginError> {
    let text = entry.get("address").and_then(Value::as_str).unwrap_or_default();
    let parsed = text.split_once('/').and_then(|(address, _)| address.parse().ok());
    parsed.ok_or_else(|| {
        let reason = format!("has the address {text:?}, which is not ADDRESS/LENGTH");
        PluginError::config("prevResult", reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(result: &Value) -> Result<Vec<String>, String> {
        let addresses = addresses(&result.to_string()).map_err(|error| error.to_string())?;
        Ok(addresses.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn addresses_inside_the_pod_are_read_in_every_version() {
        use serde_json::json;
        let interfaces = json!([
            {"name": "cni0", "mac": "0a:58:0a:f4:00:01"},
            {"name": "veth1", "mac": "0a:58:0a:f4:00:02", "sandbox": ""},
            {"name": "eth0", "mac": "0a:58:0a:f4:00:03", "sandbox": "/var/run/netns/a"},
        ]);
        let dual = json!({
            "cniVersion": "1.1.0",
            "interfaces": interfaces,
            "ips": [
                {"interface": 2, "address": "10.244.0.5/24", "gateway": "10.244.0.1"},
                {"interface": 2, "address": "fd00::5/64"},
                {"interface": 0, "address": "10.244.0.1/24"},
                {"interface": 1, "address": "10.244.0.2/24"},
            ],
        });
        assert_eq!(read(&dual).unwrap(), ["10.244.0.5", "fd00::5"]);
        let old = json!({
            "cniVersion": "0.3.1",
            "interfaces": interfaces,
            "ips": [{"version": "6", "interface": 2, "address": "fd00::5/64"}],
        });
        assert_eq!(read(&old).unwrap(), ["fd00::5"]);
        let bare = json!({"ips": [{"address": "10.0.0.1/32"}, {"address": "10.0.0.1/24"}]});
        assert_eq!(read(&bare).unwrap(), ["10.0.0.1"]);
    }

    #[test]
    fn unusable_previous_result_is_an_error() {
        use serde_json::json;
        let host = json!({"interfaces": [{"name": "cni0"}], "ips": [{"interface": 0, "address": "10.0.0.1/24"}]});
        for (result, error) in [
            (json!({}), "prevResult has no address of an interface inside the pod"),
            (host, "prevResult has no address of an interface inside the pod"),
            (
                json!({"ips": [{"interface": 0, "address": "10.0.0.1/24"}]}),
                "prevResult has an address of interface 0, which it does not list",
            ),
            (
                json!({"ips": [{"interface": -1, "address": "10.0.0.1/24"}]}),
                "prevResult has an address of interface -1, which it does not list",
            ),
            (
                json!({"ips": [{"address": "10.0.0.1"}]}),
                r#"the configuration is invalid: prevResult: has the address "10.0.0.1", which is not ADDRESS/LENGTH"#,
            ),
            (json!({"ips": {}}), "the configuration is invalid: prevResult: `ips` is not a list"),
            (json!([]), "the configuration is invalid: prevResult: is not a result of a plugin"),
        ] {
            assert_eq!(read(&result).unwrap_err(), error, "{result}");
        }
    }
}
