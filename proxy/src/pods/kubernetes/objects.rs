//! The parts of the objects of Kubernetes that the daemon uses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Map, Value};
use thiserror::Error;
use underpass_config::{DnsPolicy, PodDns, PodUid};

use crate::pods::annotations::DATAPLANE_MODE;

/// The annotation with the uid of a static pod at the kubelet and the runtime. Its object has
/// another uid.
const STATIC_UID: &str = "kubernetes.io/config.mirror";
/// The domain of the labels and annotations that the daemon interprets.
const DOMAIN: &str = "istio.io";
/// The maximum number of options of a resolver, and the maximum length of each in bytes. Users can
/// set more, which would not fit the messages about a pod.
const MAX_DNS_OPTIONS: usize = 64;
const MAX_DNS_OPTION: usize = 64;

/// A pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterPod {
    /// The uid of the pod at the runtime.
    pub(crate) uid: PodUid,
    /// Whether the uid is that of a static pod: from an annotation, which users can set.
    pub(crate) has_static_uid: bool,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) service_account: String,
    /// The labels of Istio's domain.
    pub(crate) labels: BTreeMap<String, String>,
    /// The annotations of Istio's domain.
    pub(crate) annotations: BTreeMap<String, String>,
    /// The ports to which the kubelet connects.
    pub(crate) probe_ports: BTreeSet<u16>,
    pub(crate) dns: PodDns,
    pub(crate) host_network: bool,
    /// The addresses of the pod's last sandbox; empty before the first one.
    pub(crate) addresses: Vec<IpAddr>,
    /// Whether a container runs.
    pub(crate) is_running: bool,
}

/// A namespace of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterNamespace {
    pub(crate) name: String,
    /// The value of its label `istio.io/dataplane-mode`.
    pub(crate) dataplane_mode: Option<String>,
}

/// The error of an object that no API server sends.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the API server sent an object without a valid {0}")]
pub(crate) struct MalformedObject(pub(crate) &'static str);

impl ClusterPod {
    pub(crate) fn parse(object: &Value) -> Result<Self, MalformedObject> {
        let annotations = object.pointer("/metadata/annotations");
        let parsed = |uid: Option<&str>| uid.and_then(|uid| uid.parse::<PodUid>().ok());
        // Users can set the annotation: an invalid one must not make the list unusable.
        let static_uid = parsed(annotations.and_then(|all| all.get(STATIC_UID)?.as_str()));
        let has_static_uid = static_uid.is_some();
        let uid = static_uid.or_else(|| parsed(text(object, "/metadata/uid")));
        let uid = uid.ok_or(MalformedObject("metadata.uid"))?;
        Ok(Self {
            uid,
            has_static_uid,
            namespace: required(object, "/metadata/namespace")?,
            name: required(object, "/metadata/name")?,
            // Empty if no admission controller sets it. The facts of such a pod are incomplete.
            service_account: text(object, "/spec/serviceAccountName")
                .unwrap_or_default()
                .to_owned(),
            labels: of_istio(object.pointer("/metadata/labels")),
            annotations: of_istio(annotations),
            probe_ports: containers(object, "/spec").flat_map(probe_ports).collect(),
            dns: dns(object),
            host_network: object.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)),
            addresses: addresses(object),
            is_running: is_running(object),
        })
    }

    /// Whether both have the same namespace and name.
    pub(crate) fn is_same_pod(&self, other: &Self) -> bool {
        (&self.namespace, &self.name) == (&other.namespace, &other.name)
    }

    /// `NAMESPACE/NAME`.
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl ClusterNamespace {
    pub(crate) fn parse(object: &Value) -> Result<Self, MalformedObject> {
        let labels = of_istio(object.pointer("/metadata/labels"));
        let dataplane_mode = labels.get(DATAPLANE_MODE).cloned();
        Ok(Self { name: required(object, "/metadata/name")?, dataplane_mode })
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> Option<&'a str> {
    object.pointer(pointer)?.as_str()
}

fn required(object: &Value, pointer: &'static str) -> Result<String, MalformedObject> {
    let found = text(object, pointer).filter(|text| !text.is_empty());
    found.map(str::to_owned).ok_or(MalformedObject(pointer))
}

/// The labels or annotations of Istio's domain. Others may be long, and change often.
fn of_istio(map: Option<&Value>) -> BTreeMap<String, String> {
    let is_of_istio = |key: &str| {
        let domain = key.split_once('/').map_or("", |(domain, _)| domain);
        domain == DOMAIN || domain.strip_suffix(DOMAIN).is_some_and(|sub| sub.ends_with('.'))
    };
    let entries = map.and_then(Value::as_object).into_iter().flatten();
    let texts = entries.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
    texts.filter(|(key, _)| is_of_istio(key)).collect()
}

/// The containers of a specification, or their states in a status. Includes init containers,
/// because sidecars among them have probes.
fn containers<'a>(
    object: &'a Value,
    section: &'static str,
) -> impl Iterator<Item = &'a Map<String, Value>> {
    const LISTS: [&str; 6] = [
        "containers",
        "initContainers",
        "ephemeralContainers",
        "containerStatuses",
        "initContainerStatuses",
        "ephemeralContainerStatuses",
    ];
    let section = object.pointer(section);
    let lists = LISTS.iter().filter_map(move |list| section?.get(list)?.as_array());
    lists.flatten().filter_map(Value::as_object)
}

fn probe_ports(container: &Map<String, Value>) -> BTreeSet<u16> {
    let probes = ["livenessProbe", "readinessProbe", "startupProbe"];
    let probes = probes.into_iter().filter_map(|probe| container.get(probe));
    let lifecycle = container.get("lifecycle");
    let hooks = ["postStart", "preStop"];
    let hooks = hooks.into_iter().filter_map(|hook| lifecycle?.get(hook));
    probes.chain(hooks).filter_map(|handler| probe_port(container, handler)).collect()
}

/// The port to which the kubelet connects for a probe or a hook.
fn probe_port(container: &Map<String, Value>, handler: &Value) -> Option<u16> {
    let actions = ["httpGet", "tcpSocket", "grpc"];
    let action = actions.iter().find_map(|action| handler.get(action))?;
    match action.get("host").and_then(Value::as_str) {
        None | Some("") => {}
        // The kubelet connects to that host instead of the pod.
        Some(_) => return None,
    }
    let port = action.get("port")?;
    let number = match port.as_str() {
        Some(name) => named_port(container, name).or_else(|| name.parse().ok()),
        None => port.as_u64(),
    };
    number.and_then(|number| u16::try_from(number).ok())
}

fn named_port(container: &Map<String, Value>, name: &str) -> Option<u64> {
    let ports = container.get("ports")?.as_array()?;
    let named = ports.iter().find(|port| port.get("name").and_then(Value::as_str) == Some(name))?;
    named.get("containerPort")?.as_u64()
}

/// The resolver settings. The API server has checked and limited them, except for the options.
fn dns(object: &Value) -> PodDns {
    let config = object.pointer("/spec/dnsConfig");
    let list = |key: &str| {
        let list = config.and_then(|config| config.get(key)?.as_array());
        list.into_iter().flatten()
    };
    let option = |option: &Value| {
        let name = option.get("name")?.as_str()?;
        match option.get("value").and_then(Value::as_str) {
            Some(value) => Some(format!("{name}:{value}")),
            None => Some(name.to_owned()),
        }
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let policy = object.pointer("/spec/dnsPolicy").and_then(Value::as_str);
    PodDns {
        // `ClusterFirstWithHostNet` means the same as the default.
        policy: policy.and_then(DnsPolicy::of_name).unwrap_or_default(),
        nameservers: list("nameservers")
            .filter_map(|server| server.as_str()?.parse().ok())
            .collect(),
        search: list("searches").filter_map(text).collect(),
        options: list("options")
            .filter_map(option)
            .filter(|option| option.len() <= MAX_DNS_OPTION)
            .take(MAX_DNS_OPTIONS)
            .collect(),
    }
}

fn addresses(object: &Value) -> Vec<IpAddr> {
    let list = object.pointer("/status/podIPs").and_then(Value::as_array);
    let several = list.into_iter().flatten().filter_map(|entry| text(entry, "/ip"));
    let addresses: Vec<IpAddr> = several.filter_map(|ip| ip.parse().ok()).collect();
    if !addresses.is_empty() {
        return addresses;
    }
    let one = text(object, "/status/podIP").and_then(|ip| ip.parse().ok());
    one.into_iter().collect()
}

fn is_running(object: &Value) -> bool {
    // A pod that is being deleted may have lost its sandbox already.
    let is_deleted = object.pointer("/metadata/deletionTimestamp").is_some();
    let runs = |status: &Map<String, Value>| {
        status.get("state").is_some_and(|state| state.get("running").is_some())
    };
    !is_deleted && containers(object, "/status").any(runs)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pods::kubernetes::testing::pod;

    #[test]
    fn pod_has_its_facts_and_only_labels_of_istio() {
        let parsed = ClusterPod::parse(&pod("web")).unwrap();
        assert_eq!(
            (parsed.full_name(), &*parsed.service_account),
            ("shop/web".into(), "web-account")
        );
        assert_eq!(parsed.labels, BTreeMap::from([(DATAPLANE_MODE.into(), "ambient".into())]));
        assert_eq!(parsed.annotations.len(), 1, "{parsed:?}");
        assert_eq!(
            parsed.addresses,
            ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]
        );
        assert!(parsed.is_running && !parsed.host_network);
    }

    #[test]
    fn probe_ports_are_those_that_the_kubelet_connects_to() {
        let mut object = pod("web");
        object["spec"] = json!({
            "containers": [{
                "ports": [{"name": "health", "containerPort": 9000}],
                "livenessProbe": {"httpGet": {"port": "health"}},
                "readinessProbe": {"tcpSocket": {"port": 8080}},
                "startupProbe": {"exec": {"command": ["true"]}},
                "lifecycle": {"preStop": {"httpGet": {"port": "8081"}}},
            }],
            "initContainers": [
                {"livenessProbe": {"grpc": {"port": 9001}}},
                {"livenessProbe": {"httpGet": {"port": 1, "host": "192.0.2.1"}}},
                {"livenessProbe": {"httpGet": {"port": "unknown"}}},
                {"livenessProbe": {"httpGet": {"port": 70000}}},
            ],
        });
        let ports = ClusterPod::parse(&object).unwrap().probe_ports;
        assert_eq!(ports, BTreeSet::from([8080, 8081, 9000, 9001]));
    }

    #[test]
    fn pod_has_the_resolver_settings_of_its_specification() {
        assert_eq!(ClusterPod::parse(&pod("web")).unwrap().dns, PodDns::default());
        let mut object = pod("web");
        object["spec"]["dnsPolicy"] = json!("None");
        object["spec"]["dnsConfig"] = json!({
            "nameservers": ["198.51.100.1", "fd00::1", "x"],
            "searches": ["a.example"],
            "options": [
                {"name": "timeout", "value": "1"}, {"name": "rotate"}, {},
                {"name": "x".repeat(MAX_DNS_OPTION + 1)},
            ],
        });
        let dns = ClusterPod::parse(&object).unwrap().dns;
        assert_eq!((dns.policy, dns.nameservers.len()), (DnsPolicy::None, 2));
        assert_eq!(
            (dns.search, dns.options),
            (vec!["a.example".to_owned()], vec!["timeout:1".to_owned(), "rotate".to_owned()])
        );
        object["spec"]["dnsPolicy"] = json!("ClusterFirstWithHostNet");
        assert_eq!(ClusterPod::parse(&object).unwrap().dns.policy, DnsPolicy::ClusterFirst);
    }

    #[test]
    fn static_pod_has_the_uid_of_the_runtime() {
        let mut object = pod("etcd");
        object["metadata"]["annotations"][STATIC_UID] = json!("0123456789abcdef");
        assert_eq!(ClusterPod::parse(&object).unwrap().uid.as_str(), "0123456789abcdef");
    }

    #[test]
    fn terminating_or_waiting_pod_is_not_running() {
        for (pointer, value) in [
            (
                "/metadata",
                json!({"uid": "u", "name": "n", "namespace": "s", "deletionTimestamp": "t"}),
            ),
            ("/status", json!({"containerStatuses": [{"state": {"waiting": {}}}]})),
            ("/status", json!({})),
        ] {
            let mut object = pod("web");
            *object.pointer_mut(pointer).unwrap() = value;
            assert!(!ClusterPod::parse(&object).unwrap().is_running, "{object}");
        }
    }

    #[test]
    fn rejects_object_without_its_names() {
        for pointer in ["/metadata/uid", "/metadata/name", "/metadata/namespace"] {
            let mut object = pod("web");
            *object.pointer_mut(pointer).unwrap() = json!("");
            ClusterPod::parse(&object).unwrap_err();
            *object.pointer_mut(pointer).unwrap() = json!(7);
            ClusterPod::parse(&object).unwrap_err();
        }
        ClusterNamespace::parse(&json!([])).unwrap_err();
    }
}
