//! Decides whether a connection is allowed, and creates the only [`Permit`]s.
//!
//! Dialling requires a permit, so a path without a decision does not compile. The registration of a
//! connection stores the permit's subject, which is checked again whenever the mesh changes
//! ([`MeshChange`]). `authorization.rs` evaluates authorization policies; `connection_registry.rs`
//! terminates connections.

mod context;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{Connection, Mtls, NetworkAddress, Policy, Workload, WorkloadSettings};
use underpass_interception::{KUBELET_PROBE_V4, KUBELET_PROBE_V6, Ports};

pub(crate) use self::context::PolicyContext;
use crate::decide::authorization;
use crate::decide::connection_registry::Registration;
use crate::decide::connection_registry::index::Index;
use crate::decide::snapshot::Snapshot;
use crate::decide::subject::{Decision, Inbound, Outbound, Permitted, Subject};
use crate::error::ProxyError;
use crate::node::pod::Pod;

/// Permission for one pod to dial one destination. Only this module can create one.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    pod: &'a Pod,
    destination: SocketAddr,
    /// The ALLOW policy that matches; `None` without ALLOW policies.
    policy: Option<Arc<Policy>>,
    /// Stores the permit's subject, which the next change of the mesh checks.
    _registration: &'a Registration<Decision>,
}

impl Permit<'_> {
    /// The pod that may dial, from its own sockets.
    pub(crate) fn pod(&self) -> &Pod {
        self.pod
    }

    /// The ALLOW policy that matches; `None` without ALLOW policies.
    pub(crate) fn policy(&self) -> Option<&Arc<Policy>> {
        self.policy.as_ref()
    }

    /// The address that may be dialled.
    pub(crate) fn destination(&self) -> SocketAddr {
        self.destination
    }
}

/// Decides on a registered connection of `pod`, with the current mesh.
pub(crate) fn permit<'a>(
    subject: Subject,
    pod: &'a Pod,
    mesh: &watch::Receiver<Arc<Snapshot>>,
    registration: &'a Registration<Decision>,
) -> Result<Permit<'a>, ProxyError> {
    // The borrow delays the next mesh until the permit is stored, so that the check of that mesh
    // includes this connection.
    let current = mesh.borrow();
    pod.context.check_own(&current)?;
    let policy = check(&subject, &current, &pod.context)?;
    log_dry_run(&subject, &current, &pod.context);
    let destination = subject.destination();
    let permitted = Permitted { subject, generation: current.generation };
    registration.update(|decision| *decision = Decision::permitted(permitted));
    Ok(Permit { pod, destination, policy, _registration: registration })
}

/// Whether a connection is allowed. Returns the ALLOW policy that matches, if there are any.
fn check(
    subject: &Subject,
    snapshot: &Snapshot,
    context: &PolicyContext,
) -> Result<Option<Arc<Policy>>, ProxyError> {
    match subject {
        Subject::Outbound(outbound) => check_outbound(outbound, snapshot, context).map(|()| None),
        Subject::Inbound(inbound) => check_inbound(inbound, snapshot, context),
    }
}

fn check_outbound(
    Outbound { asked, hop, peers, by_address }: &Outbound,
    snapshot: &Snapshot,
    context: &PolicyContext,
) -> Result<(), ProxyError> {
    // Dialling our own loopback listener would loop forever.
    if hop.ip().is_loopback() && is_own_listener(hop.port(), context.ports) {
        return Err(ProxyError::OwnListener(*hop));
    }
    let workload = snapshot.workload(hop.ip()).filter(|_| *by_address);
    match (peers, workload) {
        (Some(peers), Some(workload)) if !peers.contains(&workload.identity) => {
            Err(ProxyError::OtherIdentity { hop: *hop, workload: workload.clone() })
        }
        (Some(_), _) => Ok(()),
        // Plaintext is also refused if several workloads share the address and one of them requires
        // HBONE.
        (None, _) if *by_address && snapshot.mesh.speaks_hbone(&context.own.network, hop.ip()) => {
            Err(ProxyError::PlaintextToHbone(*hop))
        }
        (None, _) if is_in_mesh(snapshot, *asked, *hop, &context.own) => Ok(()),
        (None, _) if context.egress.permits(*asked) => Ok(()),
        (None, _) => Err(ProxyError::Egress(*asked)),
    }
}

/// Whether the mesh has a service or a workload for an outbound connection.
fn is_in_mesh(
    snapshot: &Snapshot,
    asked: SocketAddr,
    hop: SocketAddr,
    own: &WorkloadSettings,
) -> bool {
    snapshot.mesh.service(&own.network, asked.ip(), &own.namespace).is_some()
        || snapshot.mesh.has_workload(&own.network, hop.ip())
}

fn check_inbound(
    inbound: &Inbound,
    snapshot: &Snapshot,
    context: &PolicyContext,
) -> Result<Option<Arc<Policy>>, ProxyError> {
    let Inbound { source, destination, principal } = inbound;
    if is_own_listener(destination.port(), context.ports) {
        return Err(ProxyError::OwnListener(*destination));
    }
    let local = local(destination.ip(), snapshot, context);
    let is_probe = is_probe_source(source.ip()) && context.probes.exempt(destination.port());
    if principal.is_none() && !is_probe {
        let mode = context.mtls.mode(local.namespace, local.name, destination.port());
        if mode == Mtls::Strict {
            return Err(ProxyError::PlaintextRefused(*destination));
        }
    }
    let policies = snapshot.mesh.policies(local.namespace, local.workload);
    let denied = if principal.is_some() { ProxyError::Denied } else { ProxyError::DeniedInPlain };
    let policy = authorization::decide(policies, &inbound.connection()).map_err(denied)?;
    Ok(policy.cloned())
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

/// Logs the decisions of policies in dry run, which are not enforced.
fn log_dry_run(subject: &Subject, snapshot: &Snapshot, context: &PolicyContext) {
    let Subject::Inbound(inbound) = subject else { return };
    let local = local(inbound.destination.ip(), snapshot, context);
    let policies = snapshot.mesh.policies(local.namespace, local.workload);
    for would in authorization::dry_run(policies, &inbound.connection()) {
        let identity =
            inbound.principal.as_ref().map(|principal| tracing::field::display(&principal.id));
        tracing::info!(
            target: "policy", source = %inbound.source, identity, destination = %inbound.destination, "{would}"
        );
    }
}

/// The workload of an inbound connection, at an address of the pod.
struct Local<'a> {
    namespace: &'a str,
    name: &'a str,
    workload: Option<&'a Workload>,
}

fn local<'a>(address: IpAddr, snapshot: &'a Snapshot, context: &'a PolicyContext) -> Local<'a> {
    let workload = snapshot.local(&context.own, address).map(|workload| &**workload);
    Local {
        namespace: workload.map_or(&context.own.namespace, |workload| &workload.namespace),
        name: workload.map_or(&context.own.name, |workload| &workload.name),
        workload,
    }
}

fn is_probe_source(source: IpAddr) -> bool {
    source == KUBELET_PROBE_V4 || source == KUBELET_PROBE_V6
}

fn is_own_listener(port: u16, ports: Ports) -> bool {
    [ports.outbound, ports.inbound, ports.hbone].contains(&port)
}

/// A change of the mesh, and the check of a pod's open connections against it.
#[derive(Debug)]
pub(crate) struct MeshChange<'a> {
    old: &'a Snapshot,
    new: &'a Snapshot,
    context: &'a PolicyContext,
    /// Whether the change affects connections to an address of the pod. Cached for each address.
    affected: HashMap<IpAddr, bool>,
}

impl<'a> MeshChange<'a> {
    pub(crate) fn new(old: &'a Snapshot, new: &'a Snapshot, context: &'a PolicyContext) -> Self {
        Self { old, new, context, affected: HashMap::new() }
    }

    /// Checks whether the new mesh still allows a connection. A connection without a permit passes:
    /// this mesh or a newer one will decide on it.
    pub(crate) fn check(
        &mut self,
        Decision { permitted, .. }: &Decision,
    ) -> Result<(), ProxyError> {
        let Some(Permitted { subject, generation }) = permitted else { return Ok(()) };
        if *generation >= self.new.generation {
            return Ok(());
        }
        // If false, a generation between the old and the new one permitted the connection, so the
        // old one never checked it.
        let by_old = *generation <= self.old.generation;
        match subject {
            Subject::Inbound(inbound) if by_old && !self.affects(inbound.destination.ip()) => {
                Ok(())
            }
            subject => check(subject, self.new, self.context).map(drop),
        }
    }

    /// The keys of the connections that the change may forbid; `None` for all. Only a change from
    /// one generation to the next one has a known difference.
    pub(crate) fn concerned(&mut self, index: &Index) -> Option<Vec<usize>> {
        if self.new.generation != self.old.generation + 1 {
            return None;
        }
        let mut keys = Vec::new();
        for NetworkAddress { network, address } in self.new.mesh.touched_since(&self.old.mesh)? {
            if **network == *self.context.own.network {
                keys.extend(index.outbound_to(*address));
            }
        }
        for address in index.inbound_addresses() {
            if self.affects(address) {
                keys.extend(index.inbound_to(address));
            }
        }
        Some(keys)
    }

    fn affects(&mut self, address: IpAddr) -> bool {
        let Self { old, new, context, affected } = self;
        *affected.entry(address).or_insert_with(|| {
            let (before, after) = (local(address, old, context), local(address, new, context));
            let same_workload = (before.namespace, before.name) == (after.namespace, after.name);
            let same_policies = old.mesh.policies(before.namespace, before.workload)
                == new.mesh.policies(after.namespace, after.workload);
            !same_workload || !same_policies
        })
    }
}

#[cfg(test)]
mod tests;
