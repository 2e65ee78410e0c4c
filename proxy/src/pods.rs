//! The pods of a node daemon: their sources, facts, settings and enrolment.

pub(crate) mod annotations;
pub(crate) mod cni;
pub(crate) mod directory;
pub(crate) mod enrolment;
pub(crate) mod facts;
pub(crate) mod kubernetes;
pub(crate) mod namespace;
pub(crate) mod node_enroller;
pub(crate) mod probes;
pub(crate) mod registry;
pub(crate) mod settings;
pub(crate) mod source;
pub(crate) mod state;
pub(crate) mod status;
pub(crate) mod take_over;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod zds;
