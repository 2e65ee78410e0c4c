//! Pods from a node agent over ZDS. istio-cni and Cilium select the pods, install their rules, and
//! pass their network namespaces as they do to ztunnel.
//!
//! In reading order: `messages`, `session` (the protocol without I/O).

mod messages;
pub(crate) mod session;
