//! The messages of delta xDS (`envoy.service.discovery.v3`), with the fields that the client uses.
//!
//! Written by hand with the field numbers of the protocol; prost skips all other fields.

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message as _;

/// `DeltaDiscoveryRequest`: a subscription, an ACK or a NACK.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaRequest {
    /// The client, in the first message of a stream.
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    /// The type of the resources.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names to subscribe to. Without names, the first message of a type means all.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names to unsubscribe from.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// The resources of an earlier stream with their versions.
    #[prost(map = "string, string", tag = "5")]
    pub initial_resource_versions: HashMap<String, String>,
    /// The nonce of the response that this message answers.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// The reason of a NACK.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// `core.v3.Node`: the identity of the client.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Node {
    /// The id, in Istio's form.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Facts about the client.
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<Metadata>,
}

/// `google.protobuf.Struct`, of strings only.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    /// The facts by name.
    #[prost(map = "string, message", tag = "1")]
    pub fields: HashMap<String, MetadataValue>,
}

/// `google.protobuf.Value`, of a string.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetadataValue {
    /// The string.
    #[prost(string, optional, tag = "3")]
    pub text: Option<String>,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// The gRPC status code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// The explanation.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `DeltaDiscoveryResponse`: new, changed and removed resources of one type.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaResponse {
    /// New and changed resources, each an encoded [`Resource`]: a first state has so many that
    /// they are decoded one after another.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<Bytes>,
    /// The type of the resources.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// The nonce that the answer repeats.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// The names of removed resources.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// `Resource`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Resource {
    /// The version; empty if the control plane has none.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The content.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// The name, unique in its type.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Other names that a subscription may have used.
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
}

impl From<Resource> for Bytes {
    fn from(resource: Resource) -> Self {
        resource.encode_to_vec().into()
    }
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Any {
    /// The type of the value.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}
