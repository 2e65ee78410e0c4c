//! Delivers connections to pods of this process without a tunnel (`proxy.same_node: direct`).
//!
//! A connection is delivered directly only if a tunnel would end at a pod of this process and carry
//! the same facts. Other connections take a tunnel. `traffic/inbound/delivery.rs` is the
//! destination pod's part.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{SameNode, SpiffeId, Workload};
use underpass_hbone::{Credentials, HboneError};

use super::OutboundConnect;
use crate::decide::route::{Route, Target};
use crate::error::ProxyError;
use crate::node::identities::CredentialLease;
use crate::node::pod::Pod;
use crate::node::worker::seat::Seat;
use crate::observe::metrics;
use crate::observe::record::Facts;
use crate::traffic::accepted::Source;
use crate::traffic::headers;
use crate::traffic::inbound::{Delivery, DeliveryRequest, deliver, record_distrust};

/// The credentials of a pod; `None` without a certificate.
fn issued(pod: &Pod) -> Option<&watch::Receiver<Credentials>> {
    pod.credentials.as_ref().and_then(CredentialLease::issued)
}

impl OutboundConnect<'_> {
    /// The seat, on this worker, of the pod at which a tunnel to `hop` for `target` would end;
    /// `None` if the connection must take a tunnel.
    pub(super) fn neighbour(
        &self,
        route: &Route,
        hop: SocketAddr,
        target: &Target,
    ) -> Option<Arc<Seat>> {
        let node = self.seat.node();
        // A waypoint or a gateway forwards to another address than its own.
        let ends_there = matches!(target, Target::Address(target) if target.ip() == hop.ip());
        if node.same_node != SameNode::Direct || !ends_there || !self.has_one_address() {
            return None;
        }
        let workload = route.workload.as_ref()?;
        let pod = node.pods.proven(workload)?;
        if pod.context.ports.hbone != hop.port() {
            return None;
        }
        let seat = self.seat.worker.seat(&pod);
        // The pod's namespace confirms that the mesh has the right address.
        seat.is_local(hop.ip()).is_ok_and(|is_local| is_local).then_some(seat)
    }

    /// Whether the destination of a tunnel would see the client's own address. This requires that
    /// the workload's identity is proven, and that the pod has no other address of this family.
    fn has_one_address(&self) -> bool {
        let Source::Own(address) = self.source else { return false };
        let is_only = |workload: &Arc<Workload>| {
            let mut of_family =
                workload.addresses.iter().filter(|other| other.is_ipv4() == address.is_ipv4());
            of_family.next() == Some(&address) && of_family.next().is_none()
        };
        let pod = &self.seat.pod;
        let caller = self.seat.caller(self.snapshot, self.source);
        issued(pod).is_some() && caller.is_some_and(|caller| pod.proves(caller) && is_only(caller))
    }

    /// Connects to the application of the pod of `to`, which must prove one of `peers`.
    pub(super) async fn deliver(
        &self,
        to: Arc<Seat>,
        hop: SocketAddr,
        peers: &Arc<[SpiffeId]>,
        target: Target,
        facts: &Facts,
    ) -> Result<Box<Delivery>, ProxyError> {
        let (seat, client) = (self.seat, self.connection.client);
        let no_identity = || ProxyError::NoIdentity(hop);
        let own = issued(&seat.pod).ok_or_else(no_identity)?;
        let its = issued(&to.pod).ok_or_else(no_identity)?;
        let trust = seat.neighbours.trust(own, &to.pod, its, peers);
        let trust = trust.map_err(|untrusted| {
            if untrusted.is_new {
                record_distrust(&to, client, hop, untrusted.distrust.server);
            }
            ProxyError::Tunnel(untrusted.distrust.client)
        })?;
        let headers = headers::request(facts, &seat.context().own);
        metrics::direct_connection();
        let request = DeliveryRequest { target, headers, client, here: hop, trust };
        let delivered = deliver(to, request).await;
        delivered.map_err(|status| ProxyError::Tunnel(HboneError::Refused { status }))
    }
}
