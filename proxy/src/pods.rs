//! The pods of a node daemon: what their sources say about them, and what follows from it.

pub(crate) mod annotations;
pub(crate) mod facts;
pub(crate) mod settings;
