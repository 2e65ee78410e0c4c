//! The metrics of the mesh and of the control plane. The names and labels of `istio_xds_*` are
//! those of ztunnel.

use std::time::SystemTime;

use metrics::{counter, describe_counter, describe_gauge, gauge};
use underpass_config::{MeshSize, ResourceType};

const UPDATES: &str = "underpass_mesh_updates_total";
const GENERATION: &str = "underpass_mesh_generation";
const SIZE: &str = "underpass_mesh_size";
const TERMINATED: &str = "underpass_connections_terminated_total";
const CONNECTED: &str = "underpass_control_plane_connected";
const STREAMS_ENDED: &str = "underpass_control_plane_streams_ended_total";
const RESOURCES: &str = "underpass_control_plane_resources_total";
const LAST_MESSAGE: &str = "underpass_control_plane_last_message_timestamp_seconds";
const REJECTIONS: &str = "underpass_control_plane_rejections_total";
const TERMINATIONS: &str = "istio_xds_connection_terminations_total";
const MESSAGES: &str = "istio_xds_message_total";
const MESSAGE_BYTES: &str = "istio_xds_message_bytes_total";

/// Why a stream of the control plane ended, in ztunnel's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamEndReason {
    /// No stream could be opened.
    ConnectionError,
    /// The stream failed, or the control plane violated the protocol.
    Error,
    /// The control plane closed the stream without an error.
    Complete,
}

impl StreamEndReason {
    fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Complete => "Complete",
        }
    }
}

pub(super) fn describe() {
    describe_counter!(UPDATES, "Changes of the mesh, by result.");
    describe_gauge!(GENERATION, "Generation of the mesh that every worker has applied.");
    describe_gauge!(SIZE, "Workloads, services and policies in the mesh.");
    describe_counter!(
        TERMINATED,
        "Open connections terminated because a change of the mesh forbids them."
    );
    describe_gauge!(CONNECTED, "Whether the stream of the control plane is open.");
    describe_counter!(
        STREAMS_ENDED,
        "Streams of the control plane that ended or could not be opened."
    );
    describe_counter!(RESOURCES, "Resources of the control plane, by type and result.");
    describe_gauge!(
        LAST_MESSAGE,
        "When the control plane sent its last message, in seconds since 1970."
    );
    describe_counter!(
        REJECTIONS,
        "Responses of the control plane that were answered with a rejection (NACK), by type."
    );
    describe_counter!(TERMINATIONS, "Ended streams of the control plane, by reason.");
    describe_counter!(MESSAGES, "Messages of the control plane, by the URL of their type.");
    describe_counter!(
        MESSAGE_BYTES,
        "Bytes of the control plane's messages, by the URL of their type."
    );
}

/// Reports that all workers have applied this generation of the mesh.
pub(crate) fn applied(mesh: MeshSize, generation: u64) {
    gauge!(GENERATION).set(generation as f64);
    let size =
        [("workload", mesh.workloads), ("service", mesh.services), ("policy", mesh.policies)];
    for (kind, count) in size {
        gauge!(SIZE, "kind" => kind).set(count as f64);
    }
    counter!(UPDATES, "result" => "applied").increment(1);
    counter!(UPDATES, "result" => "superseded").increment(0);
    counter!(UPDATES, "result" => "refused").increment(0);
}

/// Counts a generation of the mesh that a newer one replaced before every worker had applied it.
pub(crate) fn superseded() {
    counter!(UPDATES, "result" => "superseded").increment(1);
}

/// Counts a change of the mesh that could not be read.
pub(crate) fn refused() {
    counter!(UPDATES, "result" => "refused").increment(1);
}

/// Counts connections that a change of the mesh has terminated.
pub(crate) fn connections_terminated(connections: usize) {
    counter!(TERMINATED).increment(connections as u64);
}

/// Reports that the process follows a control plane, before its first stream.
pub(crate) fn control_plane_followed() {
    control_plane_connected(false);
    for kind in ResourceType::ALL {
        counter!(REJECTIONS, "type" => kind.name()).increment(0);
    }
}

/// Reports whether the stream of the control plane is open.
pub(crate) fn control_plane_connected(is_open: bool) {
    gauge!(CONNECTED).set(f64::from(is_open));
}

/// Counts a stream of the control plane that ended or could not be opened.
pub(crate) fn control_plane_lost(reason: StreamEndReason) {
    counter!(STREAMS_ENDED).increment(1);
    counter!(TERMINATIONS, "reason" => reason.as_str()).increment(1);
}

/// Counts a message of the control plane.
pub(crate) fn control_plane_message(kind: ResourceType, bytes: usize) {
    counter!(MESSAGES, "url" => kind.url()).increment(1);
    counter!(MESSAGE_BYTES, "url" => kind.url()).increment(bytes as u64);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    gauge!(LAST_MESSAGE).set(now.as_secs_f64());
}

/// Counts the resources of one response, which is rejected if a resource is.
pub(crate) fn control_plane_resources(
    kind: ResourceType,
    set: usize,
    removed: usize,
    rejected: usize,
) {
    for (result, count) in [("set", set), ("removed", removed), ("rejected", rejected)] {
        counter!(RESOURCES, "type" => kind.name(), "result" => result).increment(count as u64);
    }
    if rejected > 0 {
        counter!(REJECTIONS, "type" => kind.name()).increment(1);
    }
}
