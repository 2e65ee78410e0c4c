//! The client of a control plane: the mesh over delta xDS, as istiod serves it to ztunnel, without
//! I/O.
//!
//! ```text
//! stream ─ DeltaResponse ─▶ session.rs ─▶ control_plane.rs ─▶ convert/ ─▶ MeshStore ─▶ Mesh
//!        ◀─ DeltaRequest ── ACK, or NACK by name ◀── rejections ──┘
//! ```

pub(crate) mod authorization;
pub(crate) mod control_plane;
pub(crate) mod convert;
pub(crate) mod message;
pub(crate) mod on_demand;
pub(crate) mod request;
pub(crate) mod resource_type;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod script;
pub(crate) mod session;
#[cfg(test)]
mod testing;
pub(crate) mod workload;
