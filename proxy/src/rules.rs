//! The interception rules of a pod: installed, tested, watched and repaired.

pub(crate) mod capture;
pub(crate) mod guard;
pub(crate) mod kubelet_probes;
pub(crate) mod owner;
pub(crate) mod retest;
pub(crate) mod self_test;
