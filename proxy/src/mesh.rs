//! The mesh as the workers see it: where it comes from, published, and in force.

pub(crate) mod control_plane;
pub(crate) mod feed;
pub(crate) mod publish;
mod report;
