//! Where a caught connection goes: a pure function of its original destination and a snapshot of the mesh.
//!
//! Not here: whether it may go there (`policy.rs`), and going there (`outbound.rs`).

use std::net::SocketAddr;
use std::sync::Arc;

use underpass_config::{Mesh, Protocol, Workload};

/// The way to a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// Through a tunnel to the workload; never otherwise, whatever fails.
    Tunnel {
        workload: Arc<Workload>,
        /// Where the peer's HBONE listener is.
        peer: SocketAddr,
        /// What the peer shall connect to: the CONNECT request's `:authority`.
        target: SocketAddr,
    },
    /// By plain TCP to the address that was asked for; the workload, if the mesh knows one there.
    Plain { workload: Option<Arc<Workload>>, target: SocketAddr },
}

impl Route {
    pub(crate) fn target(&self) -> SocketAddr {
        match self {
            Self::Tunnel { target, .. } | Self::Plain { target, .. } => *target,
        }
    }

    pub(crate) fn workload(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Tunnel { workload, .. } => Some(workload),
            Self::Plain { workload, .. } => workload.as_ref(),
        }
    }
}

/// The way to `destination`; HBONE peers listen on `hbone_port`.
pub(crate) fn outbound(destination: SocketAddr, mesh: &Mesh, hbone_port: u16) -> Route {
    match mesh.workload(destination.ip()) {
        Some(workload) if workload.protocol == Protocol::Hbone => Route::Tunnel {
            workload: workload.clone(),
            peer: SocketAddr::new(destination.ip(), hbone_port),
            target: destination,
        },
        workload => Route::Plain { workload: workload.cloned(), target: destination },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh() -> Mesh {
        let text = "workloads:\n- {name: meshed, workloadIps: [10.0.0.1, \"fd00::1\"], protocol: HBONE}\n\
                    - {name: plain, workloadIps: [10.0.0.2]}\n";
        Mesh::from_text("mesh", text).unwrap()
    }

    fn way(destination: &str) -> (String, Option<String>) {
        let route = outbound(destination.parse().unwrap(), &mesh(), 15008);
        let name = route.workload().map(|workload| workload.name.clone());
        match route {
            Route::Tunnel { peer, target, .. } => (format!("{target} via {peer}"), name),
            Route::Plain { target, .. } => (target.to_string(), name),
        }
    }

    #[test]
    fn the_protocol_of_the_workload_decides_the_way() {
        let named = |name: &str| Some(name.to_owned());
        for (destination, expected) in [
            ("10.0.0.1:80", ("10.0.0.1:80 via 10.0.0.1:15008".to_owned(), named("meshed"))),
            ("[fd00::1]:80", ("[fd00::1]:80 via [fd00::1]:15008".to_owned(), named("meshed"))),
            ("10.0.0.2:80", ("10.0.0.2:80".to_owned(), named("plain"))),
            ("192.0.2.1:443", ("192.0.2.1:443".to_owned(), None)),
        ] {
            assert_eq!(way(destination), expected, "{destination}");
        }
    }
}
