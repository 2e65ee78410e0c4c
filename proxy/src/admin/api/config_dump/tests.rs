//! Tests of the dump: its keys, its order, and what istioctl reads.

use futures_util::StreamExt as _;
use serde_json::Value;
use tokio::sync::watch;

use super::*;
use crate::node::testing::{node_in, settings, snapshot};

/// The chunks of the dump of a mesh, and the whole of it.
async fn dump(mesh: &str) -> (Vec<Bytes>, Value) {
    let node = node_in(1, watch::Sender::new(snapshot(1, mesh)).subscribe());
    let admin = Admin::new(&Arc::new(settings(&[])), &node);
    let chunks: Vec<_> = chunks(&admin, Vec::new()).collect().await;
    let whole = serde_json::from_slice(&chunks.concat()).unwrap();
    (chunks, whole)
}

const MESH: &str = "
workloads:
- uid: cluster//Pod/shop/web
  name: web
  namespace: shop
  serviceAccount: web
  workloadIps: [10.0.0.1, 'fd00::1']
  protocol: HBONE
  network: east
  node: node-1
  capacity: 3
  status: Healthy
  waypoint: {destination: shop/waypoint, hboneMtlsPort: 15008}
  locality: {region: r, zone: z}
  services: {shop/web.shop: {80: 8080}}
  authorizationPolicies: [shop/only-clients]
- {name: plain, namespace: shop, workloadIps: [10.0.0.2]}
services:
- {name: web, namespace: shop, hostname: web.shop, vips: [east/10.1.0.1], cidrVips: [east/10.2.0.0/16], ipFamilies: Dual, ports: {80: 0}, loadBalancer: {healthPolicy: AllowAll}}
- {name: waypoint, namespace: shop, hostname: waypoint, vips: [/10.1.0.2], ports: {}}
policies:
- name: only-clients
  namespace: shop
  scope: WorkloadSelector
  action: Allow
  rules: [[[{principals: [{exact: td/ns/shop/sa/client}, {presence: true}], notSourceIps: [10.0.0.0/8]}]]]
- {name: nothing, namespace: shop, scope: Namespace, action: Deny, rules: []}
";

#[tokio::test]
async fn dump_has_the_keys_and_values_that_istioctl_reads() {
    let (_, dump) = dump(MESH).await;
    let web = &dump["workloads"][0];
    let expected = json!({
        "uid": "cluster//Pod/shop/web", "name": "web", "namespace": "shop", "serviceAccount": "web",
        "workloadIps": ["10.0.0.1", "fd00::1"], "protocol": "HBONE", "network": "east",
        "node": "node-1", "capacity": 3, "status": "Healthy", "trustDomain": "cluster.local",
        "authorizationPolicies": ["shop/only-clients"], "services": ["shop/web.shop"],
        "waypoint": {"destination": "shop/waypoint", "hboneMtlsPort": 15008},
        "locality": {"region": "r", "zone": "z", "subzone": ""}, "networkMode": "Standard",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&web[key], value, "{key}: {web}");
    }
    let service = &dump["services"][1];
    assert_eq!(service["vips"], json!(["east/10.1.0.1"]), "{service}");
    assert_eq!(service["endpoints"]["cluster//Pod/shop/web"]["port"], json!({"80": 8080}));
    assert_eq!(service["loadBalancer"]["mode"], "Standard");
    assert_eq!(service["cidrVips"], json!([{"network": "east", "cidr": "10.2.0.0/16"}]));
    assert_eq!(service["ipFamilies"], "Dual");
    let [nothing, only_clients] = &dump["policies"].as_array().unwrap()[..] else {
        panic!("{dump}")
    };
    assert_eq!((&nothing["action"], &nothing["rules"]), (&json!("Deny"), &json!([])));
    let rule = json!([[[
        {"principals": [{"Exact": "td/ns/shop/sa/client"}, {"Presence": []}], "notSourceIps": ["10.0.0.0/8"]}
    ]]]);
    assert_eq!(only_clients["rules"], rule);
    for key in
        ["certificates", "workloadState", "stagedServices", "staticConfig", "version", "config"]
    {
        assert!(dump.get(key).is_some(), "{key}: {dump}");
    }
}

#[tokio::test]
async fn dump_of_many_workloads_is_made_in_small_chunks() {
    let workload =
        |n: usize| format!("- {{name: w{n}, workloadIps: [10.0.{}.{}]}}\n", n / 250, n % 250);
    let mesh: String = (0..1000).map(workload).collect();
    let (chunks, dump) = dump(&format!("workloads:\n{mesh}")).await;
    assert_eq!(dump["workloads"].as_array().map(Vec::len), Some(1000));
    let largest = chunks.iter().map(Bytes::len).max();
    assert!(largest < Some(64 << 10), "{largest:?}");
}
