//! The messages of ZDS (protobuf package `istio.workload.zds`), in which a node agent passes the
//! pods of its node. Each message is one datagram.

pub(super) const V1: i32 = 1;

/// The first message, from the proxy.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ZdsHello {
    #[prost(int32, tag = "1")]
    pub(super) version: i32,
}

/// A request of the agent, which waits for the response before it sends the next.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WorkloadRequest {
    #[prost(oneof = "Payload", tags = "1, 2, 3, 5")]
    pub(super) payload: Option<Payload>,
}

/// The kinds of requests.
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

/// Adds a pod. The only descriptor of the datagram is its network namespace.
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

/// Keeps a pod whose namespace the agent does not know. Only allowed before [`SnapshotSent`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct KeepWorkload {
    #[prost(string, tag = "1")]
    pub(super) uid: String,
}

/// Removes a pod.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DelWorkload {
    #[prost(string, tag = "2")]
    pub(super) uid: String,
}

/// Ends the snapshot: all existing pods were sent.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SnapshotSent {}

/// The response to a [`WorkloadRequest`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WorkloadResponse {
    #[prost(oneof = "Response", tags = "1")]
    pub(super) payload: Option<Response>,
}

/// The kinds of responses.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Response {
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// The outcome of a request.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Ack {
    /// Empty if the request succeeded.
    #[prost(string, tag = "1")]
    pub(super) error: String,
}
