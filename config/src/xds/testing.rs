//! Resources and responses of a control plane, for tests.

use std::hash::BuildHasher as _;

use bytes::Bytes;
use foldhash::fast::FixedState;
use prost::Message as _;

use super::authorization::{Authorization, Group, Match, Rules};
use super::message::{Any, DeltaResponse, Node, Resource};
use super::resource_type::ResourceType;
use super::workload::{Address, AddressType, NetworkAddress, Port, PortList, Service, Workload};

pub(super) fn node() -> Node {
    Node { id: "ztunnel~10.0.0.1~pod.ns~ns.svc.cluster.local".into(), metadata: None }
}

/// The HBONE workload `ns/NAME` with this address.
pub(super) fn workload(name: &str, address: [u8; 4]) -> Workload {
    Workload {
        uid: format!("cluster//Pod/ns/{name}"),
        name: name.into(),
        namespace: "ns".into(),
        addresses: vec![Bytes::copy_from_slice(&address)],
        tunnel_protocol: 1,
        ..Workload::default()
    }
}

/// The workload as an endpoint of the service `ns/HOSTNAME`.
pub(super) fn behind(hostname: &str, mut workload: Workload) -> Workload {
    let ports = PortList { ports: vec![Port { service_port: 80, target_port: 8080 }] };
    workload.services.insert(format!("ns/{hostname}"), ports);
    workload
}

/// The service `ns/HOSTNAME` with this address.
pub(super) fn service(hostname: &str, address: [u8; 4]) -> Service {
    let address = Bytes::copy_from_slice(&address);
    Service {
        name: hostname.into(),
        namespace: "ns".into(),
        hostname: hostname.into(),
        addresses: vec![NetworkAddress { address, ..NetworkAddress::default() }],
        ports: vec![Port { service_port: 80, target_port: 0 }],
        ..Service::default()
    }
}

/// The policy `ns/NAME` that matches the destination port 80.
pub(super) fn policy(name: &str, scope: i32, action: i32) -> Authorization {
    let matches = vec![Match { destination_ports: vec![80], ..Match::default() }];
    Authorization {
        name: name.into(),
        namespace: "ns".into(),
        scope,
        action,
        groups: vec![Group { rules: vec![Rules { matches }] }],
        dry_run: false,
    }
}

/// The resource of an item.
pub(super) trait IntoResource {
    const KIND: ResourceType;
    fn name(&self) -> String;
    fn encoded(self) -> Vec<u8>;
}

impl IntoResource for Workload {
    const KIND: ResourceType = ResourceType::Address;

    fn name(&self) -> String {
        self.uid.clone()
    }

    fn encoded(self) -> Vec<u8> {
        Address { kind: Some(AddressType::Workload(Box::new(self))) }.encode_to_vec()
    }
}

impl IntoResource for Service {
    const KIND: ResourceType = ResourceType::Address;

    fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }

    fn encoded(self) -> Vec<u8> {
        Address { kind: Some(AddressType::Service(Box::new(self))) }.encode_to_vec()
    }
}

impl IntoResource for Authorization {
    const KIND: ResourceType = ResourceType::Authorization;

    fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn encoded(self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

pub(super) fn resource<T: IntoResource>(item: T) -> Resource {
    let name = item.name();
    encoded(T::KIND, &name, item.encoded())
}

/// A resource whose version depends on its content, as istiod's.
pub(super) fn encoded(kind: ResourceType, name: &str, value: Vec<u8>) -> Resource {
    let version = format!("{:x}", FixedState::default().hash_one(&value));
    let any = Any { type_url: kind.url().into(), value: value.into() };
    Resource { version, resource: Some(any), name: name.into(), aliases: Vec::new() }
}

pub(super) fn response(
    kind: ResourceType,
    resources: Vec<Resource>,
    removed: &[&str],
) -> DeltaResponse {
    DeltaResponse {
        resources: resources.into_iter().map(Bytes::from).collect(),
        type_url: kind.url().into(),
        nonce: "nonce".into(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}
