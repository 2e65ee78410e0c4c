//! Reads values that workloads and services share: gateways and port maps.

use crate::mesh::names::Set;
use crate::mesh::shared::Shared;
use crate::mesh::{Gateway, GatewayDestination, NamespacedHostname, NetworkAddress, PortMap};
use crate::yaml::read::{Cursor, parse_port};

/// The default port of a gateway's tunnels: that of HBONE.
const HBONE_PORT: u16 = 15008;

/// Reads a gateway or waypoint, if present.
pub(super) fn gateway(section: Cursor<'_>, shared: &mut Shared) -> Option<Gateway> {
    if !section.is_given() {
        return None;
    }
    section.only(&["destination", "hboneMtlsPort"]);
    let port = section.key("hboneMtlsPort");
    let hbone_port = if port.is_given() { port.port()? } else { HBONE_PORT };
    Some(Gateway { destination: destination(section.key("destination"), shared)?, hbone_port })
}

/// Reads an address or a hostname. As in ztunnel, a text that does not parse as an address is a
/// hostname.
fn destination(given: Cursor<'_>, shared: &mut Shared) -> Option<GatewayDestination> {
    if !given.is_given() {
        given.problem("must be given: NETWORK/ADDRESS or NAMESPACE/HOSTNAME");
        return None;
    }
    let text = given.text()?;
    if let Ok(address) = text.parse::<NetworkAddress>() {
        return Some(GatewayDestination::Address(address.shared(&mut shared.names)));
    }
    match NamespacedHostname::read(text, |text| shared.name(text)) {
        Ok(name) => Some(GatewayDestination::Hostname(name)),
        Err(_) => {
            given.problem(
                "must be NETWORK/ADDRESS or NAMESPACE/HOSTNAME, such as /10.0.0.1 or default/gateway",
            );
            None
        }
    }
}

/// Reads a map from ports of a service to target ports. With `named`, target 0 denotes a named
/// port.
pub(super) fn ports(section: Cursor<'_>, named: bool, shared: &mut Shared) -> PortMap {
    let mut known = Set::default();
    let pairs = section.each(|key, target| {
        let Some(port) = parse_port(key).filter(|port| *port != 0) else {
            target.problem("the key must be a port of the service, 1 to 65535");
            return None;
        };
        if !known.insert(port) {
            target.problem(format!("the port {port} is given twice"));
        }
        if !target.is_given() {
            target.problem("must be the target port");
            return None;
        }
        let target = if named { target.port_or_named() } else { target.port() };
        Some((port, target?))
    });
    shared.ports(pairs.into_iter().collect())
}
