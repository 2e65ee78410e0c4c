//! The mesh as this proxy stands in it: what every connection is decided by, swapped whole when the mesh changes.

use std::net::IpAddr;
use std::sync::Arc;

use underpass_config::{Mesh, Workload, WorkloadSettings};

/// One state of the mesh, and who we are in it.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) mesh: Arc<Mesh>,
    /// Counted from 1.
    pub(crate) generation: u64,
    network: String,
    /// The workload that has our namespace and name.
    own: Option<Arc<Workload>>,
}

impl Snapshot {
    pub(crate) fn new(mesh: Arc<Mesh>, own: &WorkloadSettings, generation: u64) -> Self {
        let is_own = |workload: &&Arc<Workload>| {
            *workload.namespace == *own.namespace && *workload.name == *own.name
        };
        let own_workload = mesh.workloads().iter().find(is_own).cloned();
        Self { mesh, generation, network: own.network.clone(), own: own_workload }
    }

    /// The workload at an address of our network.
    pub(crate) fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.mesh.workload(&self.network, address)
    }

    /// The workload that we stand for at `address`: as the mesh knows it by this address, or else by our name. A workload that is
    /// reached at an address which the mesh does not know is still under the policies that select it.
    pub(crate) fn local(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workload(address).or(self.own.as_ref())
    }
}
