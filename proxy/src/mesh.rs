//! Publishes the mesh to the workers, and tracks the generations that are in force.

pub(crate) mod publish;
