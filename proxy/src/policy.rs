//! Who may talk to whom: pure functions of a connection, the mesh and the settings that make the only [`Permit`]s there are.
//!
//! Dialling takes a permit by reference, so that a path which forgot to ask does not compile. A permit registers its connection,
//! so that it is asked about again whenever the mesh changes ([`Change`]). Not here: what authorization policies say
//! (`authorization.rs`), and how connections are ended (`live.rs`).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{
    Connection, EgressSettings, KubeletProbes, Mtls, MtlsSettings, SpiffeId, TrustDomain, Workload,
    WorkloadSettings,
};
use underpass_hbone::PeerIdentity;
use underpass_interception::{KUBELET_PROBE_V4, KUBELET_PROBE_V6, Ports};

use crate::authorization;
use crate::error::ProxyError;
use crate::live::{Live, Registration, Revocation};
use crate::snapshot::Snapshot;

/// What is decided by beside the mesh: the settings.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) ports: Ports,
    /// Who we are.
    pub(crate) own: WorkloadSettings,
    pub(crate) egress: EgressSettings,
    pub(crate) mtls: MtlsSettings,
    /// Which connections from the kubelet's probe address `mtls: strict` lets in.
    pub(crate) probes: KubeletProbes,
}

/// A connection, as far as it is decided on.
#[derive(Debug)]
pub(crate) enum Subject {
    Outbound(Outbound),
    Inbound(Inbound),
}

/// A connection that leaves the workload.
#[derive(Debug)]
pub(crate) struct Outbound {
    /// Where it was meant to go.
    pub(crate) asked: SocketAddr,
    /// Where it goes: the application's address, or that of whoever ends the tunnel.
    pub(crate) hop: SocketAddr,
    /// Who may end the tunnel; `None` in plain.
    pub(crate) peers: Option<Arc<[SpiffeId]>>,
    /// Whether the address tells who is there: in our network, and not where several share an address and a service chose one.
    pub(crate) by_address: bool,
}

/// A connection that comes to the workload.
#[derive(Debug)]
pub(crate) struct Inbound {
    source: SocketAddr,
    destination: SocketAddr,
    /// Who came through a tunnel; `None` in plain.
    principal: Option<Principal>,
}

/// A proven identity, and the trust domains in whose names policies may speak of it.
#[derive(Debug, Clone)]
pub(crate) struct Principal {
    id: SpiffeId,
    aliases: Arc<[TrustDomain]>,
}

impl From<&PeerIdentity> for Principal {
    fn from(peer: &PeerIdentity) -> Self {
        Self { id: peer.spiffe_id().clone(), aliases: peer.aliases().clone() }
    }
}

impl Subject {
    /// A connection from `source` to the application at `destination`; `principal` is proven by the tunnel that it came through.
    pub(crate) fn inbound(
        source: SocketAddr,
        destination: SocketAddr,
        principal: Option<Principal>,
    ) -> Self {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        Self::Inbound(Inbound { source, destination, principal })
    }

    /// What is connected to.
    pub(crate) fn destination(&self) -> SocketAddr {
        match self {
            Self::Outbound(outbound) => outbound.hop,
            Self::Inbound(inbound) => inbound.destination,
        }
    }
}

/// Leave to dial one destination. Only this module can make one.
#[derive(Debug)]
pub(crate) struct Permit {
    destination: SocketAddr,
    /// The connection is asked about again for as long as this lives.
    _registration: Registration,
}

impl Permit {
    /// What may be dialled.
    pub(crate) fn destination(&self) -> SocketAddr {
        self.destination
    }
}

/// Decides on a connection by the mesh as it is now.
pub(crate) fn permit(
    subject: Subject,
    mesh: &watch::Receiver<Arc<Snapshot>>,
    rules: &Rules,
    live: &Arc<Live>,
) -> Result<(Permit, Revocation), ProxyError> {
    let current = mesh.borrow();
    check(&subject, &current, rules)?;
    log_dry_run(&subject, &current, rules);
    let destination = subject.destination();
    let (registration, revocation) = live.register(subject, current.generation);
    Ok((Permit { destination, _registration: registration }, revocation))
}

/// Whether a connection is allowed.
fn check(subject: &Subject, snapshot: &Snapshot, rules: &Rules) -> Result<(), ProxyError> {
    match subject {
        Subject::Outbound(outbound) => check_outbound(outbound, snapshot, rules),
        Subject::Inbound(inbound) => check_inbound(inbound, snapshot, rules),
    }
}

fn check_outbound(
    Outbound { asked, hop, peers, by_address }: &Outbound,
    snapshot: &Snapshot,
    rules: &Rules,
) -> Result<(), ProxyError> {
    // Our own listener on loopback would hand the connection straight back to us, for ever.
    if hop.ip().is_loopback() && is_own_listener(hop.port(), rules.ports) {
        return Err(ProxyError::OwnListener(*hop));
    }
    let workload = snapshot.workload(hop.ip()).filter(|_| *by_address);
    match (peers, workload) {
        (Some(peers), Some(workload)) if !peers.contains(&workload.identity) => {
            Err(ProxyError::OtherIdentity { hop: *hop, workload: workload.clone() })
        }
        (Some(_), _) => Ok(()),
        // Also where several share the address, so that the mesh cannot tell who would take the connection.
        (None, _) if *by_address && snapshot.mesh.speaks_hbone(&rules.own.network, hop.ip()) => {
            Err(ProxyError::PlaintextToHbone(*hop))
        }
        (None, _) if knows(snapshot, *asked, *hop, &rules.own) => Ok(()),
        (None, _) if rules.egress.permits(*asked) => Ok(()),
        (None, _) => Err(ProxyError::Egress(*asked)),
    }
}

/// Whether the mesh knows what a connection is for.
fn knows(snapshot: &Snapshot, asked: SocketAddr, hop: SocketAddr, own: &WorkloadSettings) -> bool {
    snapshot.mesh.service(&own.network, asked.ip(), &own.namespace).is_some()
        || snapshot.mesh.has_workload(&own.network, hop.ip())
}

fn check_inbound(inbound: &Inbound, snapshot: &Snapshot, rules: &Rules) -> Result<(), ProxyError> {
    let Inbound { source, destination, principal } = inbound;
    if is_own_listener(destination.port(), rules.ports) {
        return Err(ProxyError::OwnListener(*destination));
    }
    let local = local(destination.ip(), snapshot, rules);
    let is_probe = is_probe_source(source.ip()) && rules.probes.exempt(destination.port());
    if principal.is_none() && !is_probe {
        let mode = rules.mtls.mode(local.namespace, local.name, destination.port());
        if mode == Mtls::Strict {
            return Err(ProxyError::PlaintextRefused(*destination));
        }
    }
    let policies = snapshot.mesh.policies(local.namespace, local.workload);
    let denied = if principal.is_some() { ProxyError::Denied } else { ProxyError::DeniedInPlain };
    authorization::decide(policies, &inbound.connection()).map_err(denied)
}

impl Inbound {
    fn connection(&self) -> Connection<'_> {
        Connection {
            source: self.source.ip(),
            destination: self.destination,
            identity: self.principal.as_ref().map(|principal| &principal.id),
            aliases: self
                .principal
                .as_ref()
                .map(|principal| &*principal.aliases)
                .unwrap_or_default(),
        }
    }
}

/// Says what policies in dry run would have done.
fn log_dry_run(subject: &Subject, snapshot: &Snapshot, rules: &Rules) {
    let Subject::Inbound(inbound) = subject else { return };
    let local = local(inbound.destination.ip(), snapshot, rules);
    let policies = snapshot.mesh.policies(local.namespace, local.workload);
    for would in authorization::dry_run(policies, &inbound.connection()) {
        let identity =
            inbound.principal.as_ref().map(|principal| tracing::field::display(&principal.id));
        tracing::info!(
            target: "policy", source = %inbound.source, identity, destination = %inbound.destination, "{would}"
        );
    }
}

/// The workload that a connection comes to.
struct Local<'a> {
    namespace: &'a str,
    name: &'a str,
    workload: Option<&'a Workload>,
}

fn local<'a>(address: IpAddr, snapshot: &'a Snapshot, rules: &'a Rules) -> Local<'a> {
    let workload = snapshot.local(address).map(|workload| &**workload);
    Local {
        namespace: workload.map_or(&rules.own.namespace, |workload| &workload.namespace),
        name: workload.map_or(&rules.own.name, |workload| &workload.name),
        workload,
    }
}

fn is_probe_source(source: IpAddr) -> bool {
    source == KUBELET_PROBE_V4 || source == KUBELET_PROBE_V6
}

fn is_own_listener(port: u16, ports: Ports) -> bool {
    [ports.outbound, ports.inbound, ports.hbone].contains(&port)
}

/// A change of the mesh: what it means for the connections that are open.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    old: &'a Snapshot,
    new: &'a Snapshot,
    rules: &'a Rules,
    /// Whether the change touches what holds for connections to one of our addresses: found out once for each.
    touched: HashMap<IpAddr, bool>,
}

impl<'a> Change<'a> {
    pub(crate) fn new(old: &'a Snapshot, new: &'a Snapshot, rules: &'a Rules) -> Self {
        Self { old, new, rules, touched: HashMap::new() }
    }

    /// Whether a connection that was allowed `since` some generation of the mesh still is.
    pub(crate) fn check(&mut self, subject: &Subject, since: u64) -> Result<(), ProxyError> {
        // What began by a mesh between the two was never decided on by the old one.
        let by_old = since <= self.old.generation;
        match subject {
            Subject::Inbound(inbound) if by_old && !self.touches(inbound.destination.ip()) => {
                Ok(())
            }
            subject => check(subject, self.new, self.rules),
        }
    }

    fn touches(&mut self, address: IpAddr) -> bool {
        let Self { old, new, rules, touched } = self;
        *touched.entry(address).or_insert_with(|| {
            let (before, after) = (local(address, old, rules), local(address, new, rules));
            let same_place = (before.namespace, before.name) == (after.namespace, after.name);
            let policies = |snapshot: &'a Snapshot, local: &Local<'a>| {
                snapshot.mesh.policies(local.namespace, local.workload)
            };
            !same_place || policies(old, &before) != policies(new, &after)
        })
    }
}

#[cfg(test)]
mod tests;
