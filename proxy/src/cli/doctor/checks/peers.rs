//! The HBONE ports of the peers: connects to each, and performs both handshakes with our identity.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::FutureExt as _;
use futures_util::stream::{self, StreamExt as _};
use tokio::time::timeout;
use underpass_config::{
    Hint as _, Mesh, NetworkMode, Profile, Protocol, Settings, SpiffeId, Workload,
};
use underpass_hbone::{ClientSettings, Connector, Credentials, Dial as _, HboneError};

use crate::admin::api::status::{OutboundTunnels, Status};
use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome};
use crate::cli::doctor::subject::Subject;
use crate::error::chain;

/// The maximum number of peers, in a large mesh, that are connected to.
const MAX_PEERS: usize = 64;
/// The number of peers that are connected to at the same time.
const AT_ONCE: usize = 16;
/// The maximum number of named peers.
const MAX_NAMED: usize = 10;

/// The handshakes with the peers.
pub(super) struct Handshakes;

impl Check for Handshakes {
    fn info(&self) -> Info {
        Info::proxy("peers-connect", Category::Peers)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            // Another check reports that there is no certificate.
            let Ok(Some(credentials)) = subject.credentials().await else { return None };
            let mesh = subject.mesh().await;
            let mut peers = peers(&mesh, &subject.settings);
            // Such a control plane does not list the workloads: the running proxy knows its peers.
            let on_demand = subject.settings.xds.as_ref().is_some_and(|xds| xds.on_demand);
            if on_demand {
                peers.extend(subject.status().into_iter().flat_map(peers_of_proxy));
            }
            if peers.is_empty() && on_demand {
                return None;
            }
            if peers.is_empty() {
                return Some(Finding::ok("the mesh has no other workload with HBONE"));
            }
            let untried = peers.len().saturating_sub(MAX_PEERS);
            peers.truncate(MAX_PEERS);
            let handshake = |peer: Peer| async move {
                let outcome = handshake(subject, credentials, &peer).await;
                (peer, outcome)
            };
            let outcomes: Vec<_> =
                stream::iter(peers).map(handshake).buffered(AT_ONCE).collect().await;
            let mut finding = finding(&outcomes);
            if untried > 0 {
                finding.message += &format!("; further peers, which were not tried: {untried}");
            }
            // The rules redirect connections of other programs to the proxy, also if none runs.
            let is_captured =
                !subject.is_node() && subject.settings.interception.profile != Profile::None;
            if is_captured {
                let outside = "# in a network namespace without rules of underpass";
                finding.command = finding.command.map(|command| format!("{command}  {outside}"));
            }
            Some(finding)
        }
        .boxed_local()
    }
}

/// A workload that accepts tunnels.
struct Peer {
    name: String,
    address: SocketAddr,
    /// The identities that it may have.
    identities: Vec<SpiffeId>,
}

/// The healthy workloads with HBONE in our network, except for our own.
fn peers(mesh: &Mesh, settings: &Settings) -> Vec<Peer> {
    let own = &settings.workload;
    let is_node = settings.node.pods.is_some();
    let is_own = |workload: &Workload| {
        !is_node && (&*workload.namespace, &*workload.name) == (&*own.namespace, &*own.name)
    };
    let workloads = mesh.workloads().into_iter().filter(|workload| {
        workload.protocol == Protocol::Hbone
            && workload.healthy
            && workload.network_mode == NetworkMode::Standard
            && *workload.network == *own.network
            && !is_own(workload)
    });
    let peers = workloads.filter_map(|workload| {
        let address = SocketAddr::new(*workload.addresses.first()?, settings.proxy.hbone_port);
        let (name, identities) = (workload.to_string(), vec![workload.identity.clone()]);
        Some(Peer { name, address, identities })
    });
    peers.collect()
}

/// The peers to which the running proxy has, or had, tunnels.
fn peers_of_proxy(status: &Status) -> Vec<Peer> {
    let peer = |tunnels: &OutboundTunnels| {
        let OutboundTunnels { address, identities, .. } = tunnels;
        let ids = identities.iter().map(|id| id.parse().ok()).collect::<Option<_>>()?;
        Some(Peer { name: identities.join(" or "), address: (*address)?, identities: ids })
    };
    let mut peers: Vec<_> = status.tunnels.outbound.iter().filter_map(peer).collect();
    // Several pods of a node may have the same peer.
    peers.sort_by(|one, other| (one.address, &one.name).cmp(&(other.address, &other.name)));
    peers.dedup_by(|one, other| (one.address, &one.name) == (other.address, &other.name));
    peers
}

async fn handshake(
    subject: &Subject,
    credentials: &Credentials,
    Peer { address, identities, .. }: &Peer,
) -> Result<(), HboneError> {
    let timeouts = &subject.settings.timeouts;
    let dialer = subject.dialer();
    let dialled = timeout(timeouts.connect, dialer.dial(*address)).await;
    let dialled = dialled.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
    let io = dialled
        .map_err(|source| HboneError::Dial { address: *address, source: Arc::new(source) })?;
    let connector = Connector::new(credentials.clone().fixed(), ClientSettings::default());
    connector.probe(io, *address, identities, timeouts.handshake).await.map(drop)
}

fn finding(outcomes: &[(Peer, Result<(), HboneError>)]) -> Finding {
    let failed: Vec<_> = outcomes
        .iter()
        .filter_map(|(peer, outcome)| Some((peer, outcome.as_ref().err()?)))
        .collect();
    let count = outcomes.len();
    let Some((first, first_error)) = failed.first() else {
        return Finding::ok(format!("tunnels to all {count} peers can be opened"));
    };
    let name = |peer: &Peer| format!("{} at {}", peer.name, peer.address);
    let details = failed.iter().take(MAX_NAMED).map(|(peer, error)| {
        let hint = error.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
        format!("{}: {}: {}{hint}", name(peer), error.kind(), chain(*error))
    });
    let message = format!("no tunnel to {} of {count} peers", failed.len());
    let finding = match failed.as_slice() {
        [(peer, error)] => {
            let message = format!("{message}: {}: {}: {}", name(peer), error.kind(), chain(*error));
            let hint = error.hint().map(Cow::into_owned);
            Finding { hint, ..Finding::failure(message) }
        }
        _ => Finding::failure(message).details(details),
    };
    match first_error {
        HboneError::Dial { .. } => {
            let (ip, port) = (first.address.ip(), first.address.port());
            finding.command(format!("nc -zvw3 {ip} {port}"))
        }
        _ => finding.command(format!(
            "openssl s_client -connect {} -alpn h2 -showcerts </dev/null",
            first.address
        )),
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;
    use crate::admin::api::status::Tunnels;
    use crate::cli::doctor::check::Level;

    fn some_peers() -> Vec<Peer> {
        let mesh = "workloads:\n\
                    - {name: a, workloadIps: [10.0.0.1], protocol: HBONE}\n\
                    - {name: default, workloadIps: [10.0.0.2], protocol: HBONE}\n\
                    - {name: plain, workloadIps: [10.0.0.3]}\n\
                    - {name: far, workloadIps: [10.0.0.4], protocol: HBONE, network: other}\n\
                    - {name: b, workloadIps: [10.0.0.5], protocol: HBONE}\n";
        let settings = Sources::default().load().unwrap();
        peers(&Mesh::from_text("mesh", mesh).unwrap(), &settings)
    }

    #[test]
    fn peers_are_other_workloads_with_hbone_in_own_network() {
        let names: Vec<_> = some_peers().into_iter().map(|peer| peer.name).collect();
        assert_eq!(names, ["default/a", "default/b"]);
    }

    #[test]
    fn peers_of_running_proxy_are_listed_once() {
        let tunnels = |pod: &str| OutboundTunnels {
            pod: pod.to_owned(),
            address: Some(([10, 0, 0, 1], 15008).into()),
            identities: vec!["spiffe://td/ns/default/sa/a".to_owned()],
            ..OutboundTunnels::default()
        };
        let outbound = vec![tunnels("default/x"), tunnels("default/y")];
        let tunnels = Tunnels { outbound, ..Tunnels::default() };
        let peers = peers_of_proxy(&Status { tunnels, ..Status::default() });
        let names: Vec<_> = peers.into_iter().map(|peer| peer.name).collect();
        assert_eq!(names, ["spiffe://td/ns/default/sa/a"]);
    }

    #[test]
    fn failed_peers_are_named_with_reason_and_hint() {
        let refused = |peer: &Peer| HboneError::Dial {
            address: peer.address,
            source: Arc::new(std::io::ErrorKind::ConnectionRefused.into()),
        };
        let outcomes = |failures: usize| {
            let outcome = |(index, peer): (usize, Peer)| {
                let outcome = if index < failures { Err(refused(&peer)) } else { Ok(()) };
                (peer, outcome)
            };
            some_peers().into_iter().enumerate().map(outcome).collect::<Vec<_>>()
        };
        assert_eq!(finding(&outcomes(0)).level, Level::Ok);
        let one = finding(&outcomes(1));
        assert!(one.message.contains("1 of 2 peers: default/a at 10.0.0.1:15008: connect: "));
        assert!(one.hint.is_some_and(|hint| hint.contains("the peer's proxy runs")));
        assert_eq!(one.command.as_deref(), Some("nc -zvw3 10.0.0.1 15008"));
        let both = finding(&outcomes(2));
        assert!(both.details.len() == 2 && both.message.ends_with("2 of 2 peers"), "{both:?}");
    }
}
