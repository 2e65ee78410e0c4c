//! Who may talk to whom: pure functions that make the only [`Permit`]s there are.
//!
//! Dialling takes a permit by reference, so that a path which forgot to ask does not compile.

use std::net::SocketAddr;

use underpass_interception::Ports;

use crate::error::ProxyError;
use crate::route::Route;

/// Leave to dial one destination. Only this module can make one.
#[derive(Debug)]
pub(crate) struct Permit {
    destination: SocketAddr,
}

impl Permit {
    /// What may be dialled: the application's address, whatever carries the bytes to it.
    pub(crate) fn destination(&self) -> SocketAddr {
        self.destination
    }
}

/// Decides on a connection that leaves the workload.
pub(crate) fn outbound(route: &Route, ports: Ports) -> Result<Permit, ProxyError> {
    let destination = route.target();
    // Our own listener on loopback would hand the connection straight back to us, for ever.
    if destination.ip().is_loopback() && is_own_listener(destination.port(), ports) {
        return Err(ProxyError::OwnListener(destination));
    }
    Ok(Permit { destination })
}

/// Decides on a connection that comes to the workload, through a tunnel or in plain.
pub(crate) fn inbound(destination: SocketAddr, ports: Ports) -> Result<Permit, ProxyError> {
    if is_own_listener(destination.port(), ports) {
        return Err(ProxyError::OwnListener(destination));
    }
    Ok(Permit { destination })
}

fn is_own_listener(port: u16, ports: Ports) -> bool {
    [ports.outbound, ports.inbound, ports.hbone].contains(&port)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: Ports = Ports { outbound: 15001, inbound: 15006, hbone: 15008, dns: 15053 };

    #[test]
    fn nobody_may_reach_the_proxys_own_listeners_through_the_proxy() {
        for port in [15001, 15006, 15008] {
            let pod = SocketAddr::from(([10, 0, 0, 1], port));
            let loopback = SocketAddr::from(([127, 0, 0, 1], port));
            assert!(matches!(inbound(pod, PORTS), Err(ProxyError::OwnListener(_))), "{port}");
            let route = Route::Plain { workload: None, target: loopback };
            assert!(matches!(outbound(&route, PORTS), Err(ProxyError::OwnListener(_))), "{port}");
        }
        let other_pod = Route::Plain { workload: None, target: ([10, 0, 0, 1], 15008).into() };
        assert_eq!(
            outbound(&other_pod, PORTS).unwrap().destination(),
            ([10, 0, 0, 1], 15008).into()
        );
        let app = SocketAddr::from(([10, 0, 0, 1], 8080));
        assert_eq!(inbound(app, PORTS).unwrap().destination(), app);
    }
}
