//! Objects of Kubernetes for tests.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::objects::{ClusterNamespace, ClusterPod};
use super::view::{ClusterView, Kind, Object};

/// Replaces the pods and the namespaces of a cluster.
pub(crate) fn cluster(view: &watch::Sender<ClusterView>, pods: &[Value], namespaces: &[Value]) {
    let pod = |object| Object::Pod(Arc::new(ClusterPod::parse(object).unwrap()));
    let namespace = |object| Object::Namespace(ClusterNamespace::parse(object).unwrap());
    view.send_modify(|view| {
        view.replace(Kind::Pods, pods.iter().map(pod).collect());
        view.replace(Kind::Namespaces, namespaces.iter().map(namespace).collect());
    });
}

/// Reports that the API server does not answer.
pub(crate) fn unreachable(view: &watch::Sender<ClusterView>) {
    view.send_modify(|view| {
        view.set_problem(Kind::Pods, Some("connection refused".to_owned()));
    });
}

/// The pod `shop/NAME` with the uid `uid-of-NAME`.
pub(crate) fn pod(name: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-of-{name}"), "resourceVersion": "7",
            "labels": {"istio.io/dataplane-mode": "ambient", "app": "web", "notistio.io/x": "y"},
            "annotations": {
                "traffic.sidecar.istio.io/excludeOutboundPorts": "22",
                "kubectl.kubernetes.io/last-applied-configuration": "{}",
            },
        },
        "spec": {"serviceAccountName": format!("{name}-account"), "containers": [{}]},
        "status": {
            "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "containerStatuses": [{"state": {"running": {}}}],
        },
    })
}

/// The namespace `NAME`, whose pods have this mode.
pub(crate) fn namespace(name: &str, mode: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"istio.io/dataplane-mode": mode}}})
}
