//! The messages of Istio's workload discovery (`istio.workload`), with the fields that the mesh
//! uses. Written by hand with the field numbers of the protocol.

use std::collections::HashMap;

use bytes::Bytes;
use prost::{Message, Oneof};

/// `Address`: a workload or a service.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Address {
    #[prost(oneof = "AddressType", tags = "1, 2")]
    pub(super) kind: Option<AddressType>,
}

/// The choices `AddressType`.
#[derive(Clone, PartialEq, Oneof)]
pub(super) enum AddressType {
    #[prost(message, tag = "1")]
    Workload(Box<Workload>),
    #[prost(message, tag = "2")]
    Service(Box<Service>),
}

/// The message `Workload`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Workload {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) namespace: String,
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub(super) addresses: Vec<Bytes>,
    #[prost(string, tag = "4")]
    pub(super) network: String,
    #[prost(int32, tag = "5")]
    pub(super) tunnel_protocol: i32,
    #[prost(string, tag = "6")]
    pub(super) trust_domain: String,
    #[prost(string, tag = "7")]
    pub(super) service_account: String,
    #[prost(message, optional, tag = "8")]
    pub(super) waypoint: Option<GatewayAddress>,
    #[prost(string, tag = "9")]
    pub(super) node: String,
    #[prost(string, tag = "10")]
    pub(super) canonical_name: String,
    #[prost(string, tag = "11")]
    pub(super) canonical_revision: String,
    #[prost(int32, tag = "12")]
    pub(super) workload_type: i32,
    #[prost(string, tag = "13")]
    pub(super) workload_name: String,
    #[prost(string, repeated, tag = "16")]
    pub(super) authorization_policies: Vec<String>,
    #[prost(int32, tag = "17")]
    pub(super) status: i32,
    #[prost(string, tag = "18")]
    pub(super) cluster_id: String,
    #[prost(message, optional, tag = "19")]
    pub(super) network_gateway: Option<GatewayAddress>,
    #[prost(string, tag = "20")]
    pub(super) uid: String,
    #[prost(string, tag = "21")]
    pub(super) hostname: String,
    #[prost(map = "string, message", tag = "22")]
    pub(super) services: HashMap<String, PortList>,
    #[prost(message, optional, tag = "23")]
    pub(super) application_tunnel: Option<ApplicationTunnel>,
    #[prost(message, optional, tag = "24")]
    pub(super) locality: Option<Locality>,
    #[prost(int32, tag = "25")]
    pub(super) network_mode: i32,
    #[prost(message, optional, tag = "27")]
    pub(super) capacity: Option<Capacity>,
}

/// The message `Service`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Service {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) namespace: String,
    #[prost(string, tag = "3")]
    pub(super) hostname: String,
    #[prost(message, repeated, tag = "4")]
    pub(super) addresses: Vec<NetworkAddress>,
    #[prost(message, repeated, tag = "5")]
    pub(super) ports: Vec<Port>,
    #[prost(string, repeated, tag = "6")]
    pub(super) subject_alt_names: Vec<String>,
    #[prost(message, optional, tag = "7")]
    pub(super) waypoint: Option<GatewayAddress>,
    #[prost(message, optional, tag = "8")]
    pub(super) load_balancing: Option<LoadBalancing>,
    #[prost(int32, tag = "9")]
    pub(super) ip_families: i32,
    #[prost(bool, tag = "11")]
    pub(super) canonical: bool,
    #[prost(message, repeated, tag = "13")]
    pub(super) weighted_waypoints: Vec<WeightedWaypoint>,
    #[prost(int32, tag = "14")]
    pub(super) visibility: i32,
}

/// The message `NetworkAddress`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct NetworkAddress {
    #[prost(string, tag = "1")]
    pub(super) network: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) address: Bytes,
    #[prost(uint32, optional, tag = "3")]
    pub(super) length: Option<u32>,
}

/// The message `GatewayAddress`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct GatewayAddress {
    #[prost(oneof = "GatewayDestination", tags = "1, 2")]
    pub(super) destination: Option<GatewayDestination>,
    #[prost(uint32, tag = "3")]
    pub(super) hbone_mtls_port: u32,
}

/// The choices `GatewayDestination`.
#[derive(Clone, PartialEq, Oneof)]
pub(super) enum GatewayDestination {
    #[prost(message, tag = "1")]
    Hostname(NamespacedHostname),
    #[prost(message, tag = "2")]
    Address(NetworkAddress),
}

/// The message `NamespacedHostname`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct NamespacedHostname {
    #[prost(string, tag = "1")]
    pub(super) namespace: String,
    #[prost(string, tag = "2")]
    pub(super) hostname: String,
}

/// The message `WeightedWaypoint`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct WeightedWaypoint {
    #[prost(message, optional, tag = "1")]
    pub(super) destination: Option<GatewayAddress>,
    #[prost(uint32, tag = "2")]
    pub(super) weight: u32,
}

/// The message `LoadBalancing`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LoadBalancing {
    #[prost(int32, repeated, tag = "1")]
    pub(super) routing_preference: Vec<i32>,
    #[prost(int32, tag = "2")]
    pub(super) mode: i32,
    #[prost(int32, tag = "3")]
    pub(super) health_policy: i32,
}

/// The message `PortList`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PortList {
    #[prost(message, repeated, tag = "1")]
    pub(super) ports: Vec<Port>,
}

/// The message `Port`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Port {
    #[prost(uint32, tag = "1")]
    pub(super) service_port: u32,
    #[prost(uint32, tag = "2")]
    pub(super) target_port: u32,
}

/// The message `ApplicationTunnel`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct ApplicationTunnel {
    #[prost(int32, tag = "1")]
    pub(super) protocol: i32,
    #[prost(uint32, tag = "2")]
    pub(super) port: u32,
}

/// The message `Locality`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Locality {
    #[prost(string, tag = "1")]
    pub(super) region: String,
    #[prost(string, tag = "2")]
    pub(super) zone: String,
    #[prost(string, tag = "3")]
    pub(super) subzone: String,
}

/// `google.protobuf.UInt32Value`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Capacity {
    #[prost(uint32, tag = "1")]
    pub(super) value: u32,
}
