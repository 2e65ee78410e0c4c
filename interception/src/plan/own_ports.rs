//! Exempts the ports on which the proxy serves metrics and readiness from inbound capture.
//!
//! These connections are for the proxy, so the workload's mTLS setting and policies do not apply.
//! Only the addresses on which the proxy listens are exempt: the workload may use the same port of
//! another address.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use underpass_config::PortRange;

use super::build::{Builder, Inputs};
use super::{Action, ChainId, Families, Match, Protocol};

const REASON: &str = "the proxy serves its own metrics and readiness there";

/// Adds rules with the id `id` to `chain`, which inbound connections pass. Other rules of the chain
/// already exempt `exempt_ports`.
pub(super) fn add(
    b: &mut Builder,
    inputs: &Inputs<'_>,
    chain: ChainId,
    id: &str,
    exempt_ports: &[u16],
) {
    let services = inputs.ports.services;
    let services =
        || services.into_iter().filter(|service| !exempt_ports.contains(&service.port()));
    let everywhere = ports(services().filter(|service| is_any(*service, true)));
    if !everywhere.is_empty() {
        b.rule(chain, id, REASON)
            .omitted_by_exact()
            .numbered()
            .families(inputs.captured())
            .when([Match::DestinationPort(Protocol::Tcp, everywhere)], Action::Return);
    }
    for &family in &inputs.families {
        let any_v4 = ports(services().filter(|service| !family.v6 && is_any(*service, false)));
        if !any_v4.is_empty() {
            b.rule(chain, id, REASON)
                .omitted_by_exact()
                .numbered()
                .families(Families::V4)
                .when([Match::DestinationPort(Protocol::Tcp, any_v4)], Action::Return);
        }
        for service in services().filter(|service| is_outer(*service, family.v6)) {
            let port = Match::DestinationPort(Protocol::Tcp, vec![service.port().into()]);
            let address = Match::Destination(vec![IpNet::from(service.ip())]);
            b.rule(chain, id, REASON)
                .omitted_by_exact()
                .numbered()
                .for_family(family)
                .when([address, port], Action::Return);
        }
    }
}

/// The ports of `services`. Port 0 is omitted: the kernel chooses it at bind, so no rule can name
/// it.
fn ports(services: impl Iterator<Item = SocketAddr>) -> Vec<PortRange> {
    let mut ports: Vec<PortRange> =
        services.map(|service| service.port()).filter(|port| *port != 0).map(Into::into).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Returns true for a wildcard address: `[::]`, which accepts IPv4 too, or `0.0.0.0`.
fn is_any(service: SocketAddr, v6: bool) -> bool {
    service.ip().is_unspecified() && service.is_ipv6() == v6
}

fn is_outer(service: SocketAddr, v6: bool) -> bool {
    let address: IpAddr = service.ip();
    service.is_ipv6() == v6
        && service.port() != 0
        && !address.is_unspecified()
        && !address.is_loopback()
}
