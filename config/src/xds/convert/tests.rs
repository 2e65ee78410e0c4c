//! Tests of the conversion of workloads and services.

use bytes::Bytes;

use super::super::testing;
use super::super::workload as message;
use super::*;
use crate::mesh::{
    IpFamilies, LoadBalancingMode, Name, NetworkMode, Protocol, Scope, TunnelHeader, Visibility,
    WorkloadType,
};

#[test]
fn converts_every_field_of_workload() {
    let gateway = |port| GatewayAddress {
        destination: Some(GatewayDestination::Hostname(message::NamespacedHostname {
            namespace: "infra".into(),
            hostname: "gateway".into(),
        })),
        hbone_mtls_port: port,
    };
    let given = message::Workload {
        trust_domain: "td".into(),
        service_account: "sa".into(),
        network: "net".into(),
        hostname: "host".into(),
        waypoint: Some(gateway(15008)),
        network_gateway: Some(gateway(15009)),
        node: "node".into(),
        canonical_name: "app".into(),
        canonical_revision: "v2".into(),
        workload_type: 3,
        workload_name: "job".into(),
        authorization_policies: vec!["ns/p".into()],
        status: 1,
        cluster_id: "c1".into(),
        application_tunnel: Some(message::ApplicationTunnel { protocol: 1, port: 15088 }),
        locality: Some(message::Locality {
            region: "r".into(),
            zone: "z".into(),
            subzone: "s".into(),
        }),
        network_mode: 1,
        capacity: Some(message::Capacity { value: 0 }),
        ..testing::behind("s", testing::workload("a", [10, 0, 0, 1]))
    };
    let draft = workload(Name::from(&*given.uid), &given, &mut Shared::default()).unwrap();
    let workload = draft.workload;
    assert_eq!(workload.identity.to_string(), "spiffe://td/ns/ns/sa/sa");
    assert_eq!((&*workload.network, &*workload.hostname, &*workload.node), ("net", "host", "node"));
    let [waypoint, network_gateway] =
        [workload.waypoint, workload.network_gateway].map(Option::unwrap);
    assert_eq!((waypoint.hbone_port, network_gateway.hbone_port), (15008, 15009));
    assert_eq!(waypoint.destination.to_string(), "infra/gateway");
    assert_eq!((&*workload.canonical_name, &*workload.canonical_revision), ("app", "v2"));
    assert_eq!((workload.workload_type, &*workload.workload_name), (WorkloadType::Job, "job"));
    assert_eq!((workload.healthy, workload.capacity), (false, 0));
    assert_eq!((&*workload.cluster_id, workload.protocol), ("c1", Protocol::Hbone));
    let tunnel = workload.application_tunnel.unwrap();
    assert_eq!((tunnel.header, tunnel.port), (TunnelHeader::Proxy, Some(15088)));
    assert_eq!(&*workload.locality.subzone, "s");
    assert_eq!(workload.network_mode, NetworkMode::HostNetwork);
    assert_eq!(draft.policies, [Name::from("ns/p")]);
    let [(service, ports)] = &*draft.services else { panic!("one service") };
    assert_eq!((service.to_string(), ports.get(80)), ("ns/s".to_owned(), Some(8080)));
}

#[test]
fn empty_fields_of_workload_have_ztunnels_defaults() {
    let given = testing::workload("a", [10, 0, 0, 1]);
    let workload =
        workload(Name::from(&*given.uid), &given, &mut Shared::default()).unwrap().workload;
    assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/ns/sa/default");
    assert_eq!((&*workload.cluster_id, workload.capacity), ("Kubernetes", 1));
    assert_eq!(workload.workload_type, WorkloadType::Deployment);
    assert_eq!([&*workload.workload_name, &*workload.canonical_revision], ["", ""]);
    assert!(workload.healthy && workload.application_tunnel.is_none());
}

/// istiod sends the ports of the service for the workloads behind the gateway of another network.
#[test]
fn accepts_named_port_of_workload() {
    let mut given = testing::behind("s", testing::workload("a", [10, 0, 0, 1]));
    let ports = vec![Port { service_port: 80, target_port: 0 }];
    given.services.values_mut().for_each(|list| list.ports = ports.clone());
    let draft = workload(Name::from(&*given.uid), &given, &mut Shared::default()).unwrap();
    let [(_, ports)] = &*draft.services else { panic!("one service") };
    assert_eq!(ports.get(80), Some(0));
}

#[test]
fn refuses_workload_with_invalid_value() {
    type Change = fn(&mut message::Workload);
    let changes: [(Change, &str); 10] = [
        (|it| it.tunnel_protocol = 2, "tunnel_protocol: unsupported value 2"),
        (|it| it.status = 5, "status: unsupported value 5"),
        (|it| it.network_mode = -1, "network_mode: unsupported value -1"),
        (
            |it| it.addresses = vec![Bytes::from_static(b"12345")],
            "addresses: unsupported value b\"12345\"",
        ),
        (
            |it| it.trust_domain = "a/b".into(),
            "namespace, service account and trust domain form no SPIFFE id: ",
        ),
        (
            |it| drop(it.services.insert("nohost".into(), message::PortList::default())),
            "services: unsupported value \"nohost\"",
        ),
        (
            |it| it.application_tunnel = Some(message::ApplicationTunnel { protocol: 7, port: 1 }),
            "application_tunnel.protocol: unsupported value 7",
        ),
        (
            |it| it.waypoint = Some(GatewayAddress { destination: None, hbone_mtls_port: 15008 }),
            "waypoint: unsupported value \"no destination\"",
        ),
        (|it| it.canonical_name = "n".repeat(1025), "canonical_name: 1025 bytes, more than 1024"),
        (
            |it| {
                let zone = "z".repeat(2000);
                it.locality = Some(message::Locality { zone, ..Default::default() });
            },
            "zone: 2000 bytes, more than 1024",
        ),
    ];
    for (change, reason) in changes {
        let mut given = testing::workload("a", [10, 0, 0, 1]);
        change(&mut given);
        let rejection =
            workload(Name::from(&*given.uid), &given, &mut Shared::default()).unwrap_err();
        assert!(rejection.to_string().starts_with(reason), "{rejection}");
    }
}

#[test]
fn converts_every_field_of_service() {
    let address = |bytes: &'static [u8], length| NetworkAddress {
        network: "net".into(),
        address: Bytes::from_static(bytes),
        length,
    };
    let waypoint = GatewayAddress {
        destination: Some(GatewayDestination::Address(address(&[10, 0, 0, 7], None))),
        hbone_mtls_port: 15008,
    };
    let given = message::Service {
        addresses: vec![address(&[10, 96, 0, 1], None), address(&[10, 97, 3, 4], Some(16))],
        // UDP and TCP on one port.
        ports: [(80, 0), (53, 5353), (53, 5300)]
            .map(|(service_port, target_port)| Port { service_port, target_port })
            .into(),
        subject_alt_names: vec!["spiffe://td/ns/a/sa/b".into(), "example.com".into()],
        waypoint: Some(waypoint.clone()),
        weighted_waypoints: vec![message::WeightedWaypoint {
            destination: Some(waypoint),
            weight: 3,
        }],
        load_balancing: Some(message::LoadBalancing {
            routing_preference: vec![1, 4],
            mode: 2,
            health_policy: 1,
        }),
        ip_families: 1,
        canonical: true,
        visibility: 1,
        ..testing::service("s", [10, 96, 0, 1])
    };
    let service = service("ns/s", &given, &mut Shared::default()).unwrap();
    assert_eq!(service.vips[0].to_string(), "net/10.96.0.1");
    assert_eq!(service.cidr_vips[0].to_string(), "net/10.97.0.0/16");
    assert_eq!(service.ports.iter().collect::<Vec<_>>(), [(53, 5300), (80, 0)]);
    assert_eq!(service.subject_alt_names.len(), 1);
    assert_eq!(service.waypoint.unwrap().destination.to_string(), "net/10.0.0.7");
    assert_eq!(service.weighted_waypoints[0].weight, 3);
    assert_eq!(service.load_balancing.mode, LoadBalancingMode::Failover);
    assert_eq!(*service.load_balancing.preferences, [Scope::Region, Scope::Node]);
    assert!(service.load_balancing.allow_unhealthy && service.canonical);
    assert_eq!((service.ip_families, service.visibility), (IpFamilies::V4, Visibility::Namespace));
}

#[test]
fn refuses_service_with_invalid_value() {
    type Change = fn(&mut message::Service);
    let changes: [(Change, &str); 7] = [
        (|it| it.name = "s".repeat(1025), "name: 1025 bytes, more than 1024"),
        (|it| it.visibility = 2, "visibility: unsupported value 2"),
        (|it| it.ip_families = 4, "ip_families: unsupported value 4"),
        (|it| it.addresses[0].length = Some(33), "addresses.length: unsupported value 33"),
        (|it| it.ports[0].service_port = 70_000, "ports: unsupported value 70000"),
        (|it| it.hostname = "a/b".into(), "hostname: unsupported value \"a/b\""),
        (
            |it| it.load_balancing = Some(message::LoadBalancing { mode: 9, ..Default::default() }),
            "mode: unsupported value 9",
        ),
    ];
    for (change, reason) in changes {
        let mut given = testing::service("s", [10, 96, 0, 1]);
        change(&mut given);
        let rejection = service("ns/s", &given, &mut Shared::default()).unwrap_err();
        assert_eq!(rejection.to_string(), reason);
    }
}
