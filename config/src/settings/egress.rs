//! The setting that allows or refuses connections to destinations outside the mesh.
//!
//! It does not restrict destinations in the mesh.

use std::net::SocketAddr;

use ipnet::IpNet;

use super::{PortRange, Word};

/// The allowed destinations outside the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressSettings {
    /// The treatment of destinations without an exception.
    pub mode: Egress,
    /// Addresses that are always allowed; empty in [`Egress::Allow`].
    pub cidrs: Vec<IpNet>,
    /// Ports that are always allowed; empty in [`Egress::Allow`].
    pub ports: Vec<PortRange>,
}

/// Treatment of connections to destinations outside the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Egress {
    /// Connections pass unchanged.
    Allow,
    /// Connections are refused.
    MeshOnly,
}

impl Word for Egress {
    const WORDS: &'static [(&'static str, Self)] =
        &[("allow", Self::Allow), ("mesh-only", Self::MeshOnly)];
}

impl EgressSettings {
    /// Whether a connection to `destination`, which is outside the mesh, is allowed.
    #[must_use]
    pub fn permits(&self, destination: SocketAddr) -> bool {
        let address = destination.ip().to_canonical();
        self.mode == Egress::Allow
            || self.cidrs.iter().any(|cidr| cidr.contains(&address))
            || self.ports.iter().any(|ports| ports.contains(destination.port()))
    }
}
