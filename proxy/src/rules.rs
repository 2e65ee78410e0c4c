//! Installs, tests, watches and repairs the interception rules of a pod.

pub(crate) mod capture;
pub(crate) mod health;
pub(crate) mod kubelet_probes;
pub(crate) mod owner;
pub(crate) mod reconciler;
pub(crate) mod report;
pub(crate) mod retest;
pub(crate) mod self_test;
pub(crate) mod watch;
