//! The pod's addresses and resolver settings according to the result of the previous plugin.
//!
//! The plugin passes the result on unchanged. A result also lists interfaces of the host, such as
//! the bridge; the addresses are those of interfaces inside the pod.

use std::net::IpAddr;

use serde_json::Value;
use underpass_config::{DnsPolicy, MAX_NAME_SERVERS, PodDns};

use super::plugin_error::PluginError;
use crate::pods::cni::protocol::dns_fits_line;

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

/// The resolver settings, if the result names servers. A search path and options that do not fit a
/// message are left out.
pub(super) fn dns(result: &str) -> Option<PodDns> {
    let result: Value = serde_json::from_str(result).ok()?;
    let dns = result.get("dns")?;
    let list = |key: &str| dns.get(key).and_then(Value::as_array).into_iter().flatten();
    let words = |key: &str| -> Vec<_> { list(key).filter_map(word).collect() };
    let servers = list("nameservers").filter_map(|server| server.as_str()?.parse().ok());
    let nameservers: Vec<_> = servers.take(MAX_NAME_SERVERS).collect();
    let (mut search, options) = (words("search"), words("options"));
    if search.is_empty() {
        // As in resolv.conf(5), one of the two counts.
        search.extend(dns.get("domain").and_then(word));
    }
    let dns = PodDns { policy: DnsPolicy::None, nameservers, search, options };
    match () {
        () if dns.nameservers.is_empty() => None,
        () if dns_fits_line(&dns) => Some(dns),
        () => Some(PodDns { search: Vec::new(), options: Vec::new(), ..dns }),
    }
}

/// A domain or an option of resolv.conf(5), whose characters JSON does not escape.
fn word(value: &Value) -> Option<String> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"._-:".contains(&c);
    let text = value.as_str()?;
    (!text.is_empty() && text.bytes().all(allowed)).then(|| text.to_owned())
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
    fn resolver_settings_are_those_of_a_result_that_names_servers() {
        use serde_json::json;
        let read = |dns: &Value| dns_of(&json!({"dns": dns}));
        let full = json!({
            "nameservers": ["10.0.0.53", "x", "fd00::53", "10.0.0.54", "10.0.0.55"],
            "domain": "ignored.example", "search": ["a.example", "b c"], "options": ["timeout:1"],
        });
        let dns = read(&full).unwrap();
        assert_eq!((dns.policy, dns.nameservers.len()), (DnsPolicy::None, MAX_NAME_SERVERS));
        assert_eq!((&*dns.search.join(" "), &*dns.options.join(" ")), ("a.example", "timeout:1"));
        let dns = read(&json!({"nameservers": ["10.0.0.53"], "domain": "a.example"})).unwrap();
        assert_eq!(dns.search, ["a.example"]);
        let long = json!({"nameservers": ["10.0.0.53"], "search": ["a".repeat(600)]});
        let dns = read(&long).unwrap();
        assert_eq!((dns.nameservers.len(), dns.search.len()), (1, 0));
        for without_servers in [json!({}), json!({"search": ["a.example"]}), json!([]), json!(null)]
        {
            assert_eq!(read(&without_servers), None, "{without_servers}");
        }
        assert_eq!(dns_of(&json!({})), None);
    }

    fn dns_of(result: &Value) -> Option<PodDns> {
        dns(&result.to_string())
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
