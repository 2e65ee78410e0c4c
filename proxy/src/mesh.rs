//! The mesh in the proxy: its sources, its publication to the workers, and the generation in force.

pub(crate) mod control_plane;
pub(crate) mod feed;
pub(crate) mod first_state;
pub(crate) mod follow;
pub(crate) mod on_demand;
pub(crate) mod publish;
mod report;
