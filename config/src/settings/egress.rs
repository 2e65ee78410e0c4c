//! Where the workload may connect to outside the mesh.
//!
//! Not here: destinations that the mesh knows, which every mode allows.

use std::net::SocketAddr;

use ipnet::IpNet;

use super::{PortRange, Word};

/// Which destinations that the mesh does not know may be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressSettings {
    /// What happens to them.
    pub mode: Egress,
    /// Those that are allowed all the same, by their address; empty in [`Egress::Allow`].
    pub cidrs: Vec<IpNet>,
    /// Those that are allowed all the same, by their port; empty in [`Egress::Allow`].
    pub ports: Vec<PortRange>,
}

/// What happens to connections whose destination the mesh does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Egress {
    /// They are passed through.
    Allow,
    /// They are refused.
    MeshOnly,
}

impl Word for Egress {
    const WORDS: &'static [(&'static str, Self)] =
        &[("allow", Self::Allow), ("mesh-only", Self::MeshOnly)];
}

impl EgressSettings {
    /// Whether `destination`, which the mesh does not know, may be connected to.
    #[must_use]
    pub fn permits(&self, destination: SocketAddr) -> bool {
        let address = destination.ip().to_canonical();
        self.mode == Egress::Allow
            || self.cidrs.iter().any(|cidr| cidr.contains(&address))
            || self.ports.iter().any(|ports| ports.contains(destination.port()))
    }
}
