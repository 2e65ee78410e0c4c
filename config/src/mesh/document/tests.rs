//! Tests of valid and invalid mesh documents.

use super::*;
use crate::error::ConfigErrors;
use crate::mesh::{
    ApplicationTunnel, Destination, Gateway, GatewayDestination, IpFamilies, LoadBalancingMode,
    Locality, Mesh, NetworkMode, Protocol, Scope, TunnelHeader, Visibility, WorkloadType,
};

fn mesh(text: &str) -> Result<Mesh, ConfigErrors> {
    Mesh::from_text("mesh.yaml", text)
}

fn mistakes(text: &str) -> Vec<String> {
    mesh(text).unwrap_err().problems.iter().map(ToString::to_string).collect()
}

/// Reads a mesh with one workload and one service, with these additional fields.
fn pair(workload: &str, service: &str) -> Result<Mesh, ConfigErrors> {
    mesh(&format!(
        "workloads:\n- {{name: w, workloadIps: [10.0.0.1], services: {{default/s: {{80: 8080}}}}, {workload}}}\n\
         services:\n- {{hostname: s, vips: [/10.1.0.1], ports: {{80: 80}}, {service}}}\n"
    ))
}

/// A workload with all of ztunnel's keys except references.
const WORKLOAD: &str = r#"
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: web
  trustDomain: cluster.local
  workloadIps: ["10.0.0.1", "fd00::1"]
  protocol: HBONE
  node: local
  network: ""
  services: {}
  locality: {region: r, zone: z, subzone: ""}
  workloadName: web
  workloadType: deployment
  canonicalName: web
  canonicalRevision: v1
  clusterId: c1
  capacity: 7
  status: Healthy
  networkMode: Standard
  nativeTunnel: false
  hostname: ""
  authorizationPolicies: []
- {name: plain, namespace: default, workloadIps: ["10.0.0.2"], services: {}}
services: []
policies: []
"#;

#[test]
fn finds_workload_by_each_address() {
    let mesh = mesh(WORKLOAD).unwrap();
    assert_eq!(mesh.workloads().len(), 2);
    for address in ["10.0.0.1", "fd00::1", "::ffff:10.0.0.1"] {
        let workload = mesh.workload("", address.parse().unwrap()).unwrap();
        assert_eq!(&*workload.name, "local");
        assert_eq!(workload.protocol, Protocol::Hbone);
        assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/default/sa/web");
        assert_eq!((workload.capacity, &*workload.cluster_id), (7, "c1"));
    }
    assert_eq!(mesh.workload("", "10.0.0.9".parse().unwrap()), None);
}

#[test]
fn absent_keys_use_defaults() {
    let mesh = mesh(WORKLOAD).unwrap();
    let plain = mesh.workload("", "10.0.0.2".parse().unwrap()).unwrap();
    assert_eq!(plain.protocol, Protocol::Tcp);
    assert_eq!(plain.identity.to_string(), "spiffe://cluster.local/ns/default/sa/default");
    assert_eq!(&*plain.workload_name, "plain");
    assert_eq!(&*plain.canonical_revision, "latest");
    assert_eq!(plain.workload_type, WorkloadType::Pod);
    assert_eq!((plain.healthy, plain.capacity), (true, 1));
    assert_eq!(plain.network_mode, NetworkMode::Standard);
    assert_eq!((&plain.waypoint, &plain.network_gateway), (&None, &None));
    assert_eq!(
        *plain.locality,
        Locality { region: "".into(), zone: "".into(), subzone: "".into() }
    );
}

#[test]
fn reads_workload_type_and_locality() {
    let mesh = mesh(WORKLOAD).unwrap();
    let local = mesh.workload("", "10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!(local.workload_type, WorkloadType::Deployment);
    let Locality { region, zone, subzone } = &*local.locality;
    assert_eq!((&**region, &**zone, &**subzone), ("r", "z", ""));
    let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1], workloadType: pods, \
                locality: {regoin: r}}\n- {name: b, workloadIps: [10.0.0.2], workloadType: '', locality: ~}\n";
    assert_eq!(
        mistakes(text),
        [
            "mesh.yaml:2:52: workloads[0].workloadType: \"pods\": must be one of deployment, cronjob, pod, job",
            "mesh.yaml:2:77: workloads[0].locality.regoin: \"r\": no such key",
        ]
    );
}

#[test]
fn reports_every_mistake_with_location() {
    let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1], protocol: HBON}\n\
                - {name: b, workloadIps: [10.0.0], serviceAcount: x}\n- {name: c}\n";
    assert_eq!(
        mistakes(text),
        [
            "mesh.yaml:2:48: workloads[0].protocol: \"HBON\": must be one of TCP, HBONE",
            "mesh.yaml:3:51: workloads[1].serviceAcount: \"x\": no such key",
            "mesh.yaml:3:27: workloads[1].workloadIps[0]: \"10.0.0\": must be an IP address",
            "mesh.yaml:4:3: workloads[2].workloadIps: needs at least one IP address, unless there is a hostname or networkGateway",
        ]
    );
}

#[test]
fn reports_broken_references_with_location() {
    let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1]}\n- {name: b, workloadIps: [\"::ffff:10.0.0.1\"]}\n\
                - {name: b, workloadIps: [10.0.0.3], services: {default/none: {80: 80}}, authorizationPolicies: [default/none]}\n\
                services:\n- {hostname: s, waypoint: {destination: default/none}}\n- {hostname: s}\n";
    assert_eq!(
        mistakes(text),
        [
            "mesh.yaml:7:3: services[1].hostname: duplicate service default/s",
            "mesh.yaml:3:3: workloads[1].workloadIps: 10.0.0.1 already belongs to default/a",
            "mesh.yaml:4:3: workloads[2].name: duplicate workload default/b",
            "mesh.yaml:4:3: workloads[2].authorizationPolicies: there is no policy default/none",
            "mesh.yaml:4:3: workloads[2].services: there is no service default/none",
            "mesh.yaml:6:3: services[0].waypoint: there is no service and no workload default/none",
        ]
    );
}

#[test]
fn shared_host_address_matches_no_workload() {
    let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1], networkMode: HostNetwork}\n\
                - {name: b, workloadIps: [10.0.0.1], networkMode: HostNetwork}\n";
    let mesh = mesh(text).unwrap();
    assert_eq!(mesh.workload("", "10.0.0.1".parse().unwrap()), None);
}

#[test]
fn accepts_workloads_in_other_networks_or_without_address() {
    let text = "workloads:\n- {name: gw, workloadIps: [10.0.0.1]}\n\
                - {name: far, network: far, networkGateway: {destination: /10.0.0.1, hboneMtlsPort: 15009}}\n\
                - {name: named, hostname: db.example.com, namespace: data}\n\
                - {name: same, network: far, workloadIps: [10.0.0.1]}\n";
    let mesh = mesh(text).unwrap();
    let address = "10.0.0.1".parse().unwrap();
    assert_eq!(&*mesh.workload("", address).unwrap().name, "gw");
    assert_eq!(&*mesh.workload("far", address).unwrap().name, "same");
    let of = |name| mesh.workloads_named("default", name).first().unwrap();
    let gateway = of("far").network_gateway.as_deref().unwrap();
    assert_eq!(
        (gateway.destination.to_string().as_str(), gateway.hbone_port),
        ("/10.0.0.1", 15009)
    );
    let named = mesh.named(&"data/db.example.com".parse().unwrap());
    let expected = &mesh.workloads_named("data", "named")[0];
    assert_eq!(named, Some(Destination::Workload(expected)));
}

#[test]
fn reads_every_key_of_service() {
    let mesh = mesh(
        "workloads:
- {name: w, workloadIps: [10.0.0.1], services: {ns/example.com: {80: 8080, 443: 8443}}, status: Unhealthy,
   applicationTunnel: {protocol: PROXY, port: 15088}}
services:
- name: s
  namespace: ns
  hostname: example.com
  vips: [/127.10.0.1, remote/127.10.0.2, '/::ffff:127.10.0.3']
  cidrVips: [{network: '', cidr: 10.1.2.3/16}, /10.3.0.0/16]
  ports: {80: 0, 443: 8443}
  subjectAltNames: [spiffe://cluster.local/ns/ns/sa/s]
  waypoint: {destination: ns/example.com}
  weightedWaypoints: [{destination: {destination: /10.0.0.1, hboneMtlsPort: 15008}, weight: 3}]
  loadBalancer: {routingPreferences: [Region, Node], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: IPv4
  canonical: true
  visibility: Namespace
  endpoints: {}
",
    )
    .unwrap();
    let service = mesh.services()[0];
    let vips: Vec<_> = service.vips.iter().map(ToString::to_string).collect();
    assert_eq!(vips, ["/127.10.0.1", "remote/127.10.0.2", "/127.10.0.3"]);
    let ranges: Vec<_> = service.cidr_vips.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["/10.1.0.0/16", "/10.3.0.0/16"]);
    assert_eq!(service.ports.iter().collect::<Vec<_>>(), [(80, 0), (443, 8443)]);
    assert_eq!(service.subject_alt_names[0].principal(), "cluster.local/ns/ns/sa/s");
    let waypoint = GatewayDestination::Hostname("ns/example.com".parse().unwrap());
    assert_eq!(service.waypoint, Some(Gateway { destination: waypoint, hbone_port: 15008 }));
    assert_eq!(service.weighted_waypoints[0].weight, 3);
    assert_eq!(service.load_balancing.mode, LoadBalancingMode::Failover);
    assert_eq!(*service.load_balancing.preferences, [Scope::Region, Scope::Node]);
    assert_eq!((service.ip_families, service.canonical), (IpFamilies::V4, true));
    assert_eq!(service.visibility, Visibility::Namespace);
    assert_eq!(service.endpoints[0].ports.get(443), Some(8443));
    let workload = &service.endpoints[0].workload;
    let tunnel = ApplicationTunnel { header: TunnelHeader::Proxy, port: Some(15088) };
    assert_eq!((workload.healthy, workload.application_tunnel), (false, Some(tunnel)));
    for (network, address) in [("", "127.10.0.1"), ("remote", "127.10.0.2"), ("", "10.1.9.9")] {
        assert_eq!(mesh.service(network, address.parse().unwrap(), "ns"), Some(service));
        assert_eq!(mesh.service(network, address.parse().unwrap(), "other"), None);
    }
}

#[test]
fn invalid_value_of_any_key_rejects_document() {
    pair("", "").unwrap();
    for workload in [
        "protocol: hbone",
        "protocol: [TCP]",
        "networkMode: Host",
        "status: Sick",
        "capacity: -1",
        "capacity: 4294967296",
        "nativeTunnel: yes",
        "trustDomain: A B",
        "namespace: a/b",
        "waypoint: {hboneMtlsPort: 15008}",
        "waypoint: {destination: /10.0.0.1, hboneMtlsPort: 0}",
        "waypoint: {destination: /10.0.0.1, port: 1}",
        "waypoint: /10.0.0.1",
        "networkGateway: {destination: 10.0.0.1}",
        "applicationTunnel: {protocol: HTTP}",
        "applicationTunnel: {port: 0}",
        "authorizationPolicies: [~]",
        "authorizationPolicies: default/a",
        "locality: eu",
        "hostname: [a]",
        "fancy: 1",
    ] {
        assert!(pair(workload, "").is_err(), "{workload}");
    }
    for service in [
        "endpoints: {uid: {workloadUid: uid, port: {}, status: Healthy}}",
        "cidrVips: [10.0.0.0/8]",
        "cidrVips: [{network: ''}]",
        "cidrVips: [~]",
        "subjectAltNames: [cluster.local]",
        "subjectAltNames: [~]",
        "weightedWaypoints: [{weight: 1}]",
        "weightedWaypoints: [{destination: {destination: /10.0.0.1}, weight: -1}]",
        "weightedWaypoints: [~]",
        "loadBalancer: {mode: Random}",
        "loadBalancer: {routingPreferences: [Planet]}",
        "loadBalancer: {healthPolicy: All}",
        "loadBalancer: Strict",
        "ipFamilies: IPv5",
        "canonical: yes",
        "canonical: 1",
        "canonical: tRUE",
        "visibility: Private",
        "loadBalancing: {mode: Strict}",
    ] {
        assert!(pair("", service).is_err(), "{service}");
    }
    for document in [
        "workloads: [~]",
        "workloads: [a]",
        "workloads: {}",
        "workload: []",
        "services: [{name: s}]",
        "services: [{hostname: a/b}]",
        "services: [{hostname: s, vips: [10.0.0.1]}]",
        "services: [{hostname: s, vips: [~]}]",
        "services: [{hostname: s, ports: {http: 80}}]",
        "services: [{hostname: s, ports: {0: 80}}]",
        "services: [{hostname: s, ports: {80: ~}}]",
        "services: [{hostname: s, ports: {80: 80, '080': 81}}]",
        "services: [{hostname: s, ports: {80: 80, 0x50: 81}}]",
        "services: [{hostname: s, ports: {0x0: 80}}]",
        "services: [{hostname: s, ports: {80: 0x10000}}]",
        "services: [{hostname: s}]\nworkloads: [{name: a, workloadIps: [10.0.0.1], services: {default/s: {80: 0}}}]",
        "workloads: [{name: a, workloadIps: [10.0.0.1], services: {s: {}}}]",
        "policies: [~]",
        "[]",
        "a",
        "",
        "# nothing\n",
        "workloads: []\n---\nservices: []\n",
    ] {
        assert!(!mistakes(document).is_empty(), "{document}");
    }
}

#[test]
fn reads_yaml_numbers_and_booleans() {
    let mesh = mesh(
        "
workloads:
- name: w
  workloadIps: [10.0.0.1]
  applicationTunnel: {port: 0x3AF0}
  nativeTunnel: FALSE
  services: {default/s: {0x50: 0x1F90}}
  waypoint: {destination: /10.0.0.1, hboneMtlsPort: 0o35240}
services:
- {hostname: s, canonical: True, ports: {0x50: 0o0, 443: 0x20Fb}}
policies:
- {name: p, namespace: n, scope: Global, action: Allow, dryRun: True, rules: [[[{principals: [{presence: TRUE}]}]]]}
",
    )
    .unwrap();
    let (workload, service) = (&mesh.workloads()[0], &mesh.services()[0]);
    assert_eq!(workload.application_tunnel.unwrap().port, Some(15088));
    assert_eq!(workload.waypoint.as_ref().unwrap().hbone_port, 15008);
    assert!(service.canonical);
    assert_eq!(service.ports.iter().collect::<Vec<_>>(), [(80, 0), (443, 8443)]);
    assert_eq!(service.endpoints[0].ports.get(80), Some(8080));
    assert!(mesh.policies("", None).iter().next().unwrap().dry_run);
}

#[test]
fn accepts_document_with_empty_lists() {
    for text in ["workloads: []", "{}", "workloads:\nservices: ~\npolicies: []\n"] {
        assert!(mesh(text).unwrap().workloads().is_empty(), "{text}");
    }
}

#[test]
fn mistake_in_one_item_causes_no_mistakes_in_other_items() {
    let text = "workloads: [{name: a, workloadIps: [10.0.0.1], services: {default/s: {}}}]\n\
                services: [{hostname: s, canonical: maybe}]\n";
    assert_eq!(
        mistakes(text),
        ["mesh.yaml:2:37: services[0].canonical: \"maybe\": must be true or false"]
    );
}

#[test]
fn reports_first_mistakes_and_number_of_the_rest() {
    let text = format!("workloads:\n{}", "- {name: a}\n".repeat(100_000));
    let errors = mesh(&text).unwrap_err();
    assert_eq!((errors.problems.len(), errors.more), (1000, 99_000));
    let message = errors.to_string();
    assert_eq!(message.lines().count(), 22);
    assert!(
        message.starts_with("100000 mistakes") && message.ends_with("and 99980 more"),
        "{message}"
    );
}

#[test]
fn accepts_anchors_and_json() {
    let anchors = "workloads:\n- {name: a, workloadIps: [10.0.0.1], locality: &here {region: r}}\n\
                   - {name: b, workloadIps: [10.0.0.2], locality: *here}\n";
    assert_eq!(&*mesh(anchors).unwrap().workloads()[1].locality.region, "r");
    let json = "{\n\t\"workloads\": [\n\t\t{\"name\": \"a\", \"workloadIps\": [\"10.0.0.1\"],\"capacity\":2}\n\t]\n}\n";
    assert_eq!(mesh(json).unwrap().workloads()[0].capacity, 2);
    let dense = "{\"workloads\":[{\"name\":\"a\\u0062\",\"workloadIps\":[\"10.0.0.1\"],\"canonicalName\":null}]}";
    assert_eq!(&*mesh(dense).unwrap().workloads()[0].name, "ab");
}

/// The document is that of ztunnel's `examples/localhost.yaml`, except for policies.
#[test]
fn workloads_become_endpoints_of_their_services() {
    let workload = |name: &str, address: &str| {
        format!(
            "- {{name: {name}, workloadIps: [{address}], services: {{default/example.com: {{80: 8080}}, \
             default/example2.com: {{80: 8080}}}}}}\n"
        )
    };
    let text = format!(
        "workloads:\n{}{}services:\n\
         - {{name: local, namespace: default, hostname: example.com, vips: [/127.10.0.1], ports: {{80: 8080}}}}\n\
         - {{name: remote, namespace: default, hostname: example2.com, vips: [remote/127.10.0.2], ports: {{80: 8080}}}}\n",
        workload("b", "127.0.0.1"),
        workload("a", "127.0.0.2")
    );
    let mesh = mesh(&text).unwrap();
    for service in mesh.services() {
        let names: Vec<_> = service.endpoints.iter().map(|end| &*end.workload.name).collect();
        assert_eq!(names, ["a", "b"]);
    }
}

/// Quadratic algorithms would take minutes.
#[test]
fn reads_large_and_deep_documents_in_linear_time() {
    let ports: String = (1..=65_535).map(|port| format!("{port}: 80,")).collect();
    let services: String = (0..50_000).map(|n| format!("default/s{n}: {{}},")).collect();
    let text = format!(
        "workloads: [{{name: a, workloadIps: [10.0.0.1], services: {{{services}}}}}]\n\
         services: [{{hostname: s, ports: {{{ports}}}}}]\n"
    );
    let errors = mesh(&text).unwrap_err();
    assert_eq!(errors.problems.len() + errors.more, 50_000);
    for nested in ["[", "{a: ", "- ", "? ", "workloads: [{a: ", "!a &a "] {
        mesh(&nested.repeat(100_000)).unwrap_err();
    }
}

#[test]
fn deduplicates_names_identities_and_localities() {
    let text = "workloads:\n- {name: a, workloadIps: [10.0.0.1], node: n, locality: {region: r}, services: {default/s: {80: 1}}}\n\
                - {name: b, workloadIps: [10.0.0.2], node: n, locality: {region: r}, services: {default/s: {80: 1}}}\n\
                services: [{hostname: s}]\n";
    let mesh = mesh(text).unwrap();
    let [a, b] = *mesh.workloads() else { panic!("two") };
    assert!(Arc::ptr_eq(&a.node, &b.node) && Arc::ptr_eq(&a.locality, &b.locality));
    assert!(std::ptr::eq(a.identity.principal(), b.identity.principal()));
    assert!(Arc::ptr_eq(&a.services[0].hostname, &mesh.services()[0].hostname));
}
