//! The messages of ZDS (protobuf package `istio.workload.zds`), which passes the pods of a node
//! from its agent to its proxy. Each travels as one datagram.

/// The only version of the protocol.
pub(super) const V1: i32 = 1;

/// The first message of the proxy.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ZdsHello {
    #[prost(int32, tag = "1")]
    pub(super) version: i32,
}

/// A message of the agent, which waits for the response before it sends the next.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WorkloadRequest {
    #[prost(oneof = "Payload", tags = "1, 2, 3, 5")]
    pub(super) payload: Option<Payload>,
}

/// A request of the node agent.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Payload {
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

/// A pod, with its network namespace as the only descriptor.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AddWorkload {
    #[prost(string, tag = "1")]
    pub(super) uid: String,
    #[prost(message, optional, tag = "2")]
    pub(super) workload_info: Option<WorkloadInfo>,
}

/// The names of a pod.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WorkloadInfo {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) namespace: String,
    #[prost(string, tag = "3")]
    pub(super) service_account: String,
}

/// A pod whose namespace the agent does not know, before [`SnapshotSent`] only.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct KeepWorkload {
    #[prost(string, tag = "1")]
    pub(super) uid: String,
}

/// A pod that ended.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DelWorkload {
    #[prost(string, tag = "2")]
    pub(super) uid: String,
}

/// All existing pods were sent.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SnapshotSent {}

/// The response to a [`WorkloadRequest`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WorkloadResponse {
    #[prost(oneof = "Response", tags = "1")]
    pub(super) payload: Option<Response>,
}

/// An answer to the node agent.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Response {
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// The result of a request.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Ack {
    /// Empty if the request succeeded.
    #[prost(string, tag = "1")]
    pub(super) error: String,
}
