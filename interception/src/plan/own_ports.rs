//! The ports at which the proxy itself serves metrics and readiness: inbound connections to them
//! are not the workload's, so mTLS and policies of the workload do not apply.
//!
//! Only what the proxy really listens on is spared. A port of the loopback interface cannot be
//! reached from outside, so the same port of another address may be the workload's.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use underpass_config::PortRange;

use super::build::{Builder, Inputs};
use super::{Action, ChainId, Families, Match, Protocol};

const REASON: &str = "the proxy's own metrics and readiness are not the workload's";

/// Adds rules `id` to `chain`, a chain of inbound connections. `spared`: ports that other rules of
/// the chain spare.
pub(super) fn add(b: &mut Builder, inputs: &Inputs<'_>, chain: ChainId, id: &str, spared: &[u16]) {
    let services = inputs.ports.services;
    let services = || services.into_iter().filter(|service| !spared.contains(&service.port()));
    let everywhere = ports(services().filter(|service| is_any(*service, true)));
    if !everywhere.is_empty() {
        b.rule(chain, id, REASON)
            .ours()
            .numbered()
            .families(inputs.neutral())
            .when([Match::DestinationPort(Protocol::Tcp, everywhere)], Action::Return);
    }
    for &family in &inputs.families {
        let any_v4 = ports(services().filter(|service| !family.v6 && is_any(*service, false)));
        if !any_v4.is_empty() {
            b.rule(chain, id, REASON)
                .ours()
                .numbered()
                .families(Families::V4)
                .when([Match::DestinationPort(Protocol::Tcp, any_v4)], Action::Return);
        }
        for service in services().filter(|service| is_outer(*service, family.v6)) {
            let port = Match::DestinationPort(Protocol::Tcp, vec![service.port().into()]);
            let address = Match::Destination(vec![IpNet::from(service.ip())]);
            b.rule(chain, id, REASON)
                .ours()
                .numbered()
                .twin(family)
                .when([address, port], Action::Return);
        }
    }
}

/// Port 0 is chosen by the kernel when the proxy binds, so no rule can name it.
fn ports(services: impl Iterator<Item = SocketAddr>) -> Vec<PortRange> {
    let mut ports: Vec<PortRange> =
        services.map(|service| service.port()).filter(|port| *port != 0).map(Into::into).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Whether it listens on every address: `[::]`, which takes IPv4 too, or `0.0.0.0`.
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
