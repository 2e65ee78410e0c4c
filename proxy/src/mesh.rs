//! The mesh as the workers see it: published, and in force.

pub(crate) mod publish;
