//! Delivers a connection from another pod of this process to the application, as if through a
//! tunnel: the same decision, records and counts.
//!
//! `traffic/outbound/same_node.rs` selects such connections, and relays their bytes.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use futures_util::FutureExt as _;
use http::{HeaderMap, StatusCode};
use tokio::net::TcpStream;
use tokio::time::Instant;
use underpass_config::Policy;
use underpass_hbone::{HboneError, MutualTrust};

use super::application::connect;
use super::{
    RequestOrigin, admitted_mesh, inbound_target, record_failed_handshake, refused_stream,
    request_facts,
};
use crate::decide::connection_registry::{Registration, Termination};
use crate::decide::route::Target;
use crate::decide::subject::Decision;
use crate::error::ProxyError;
use crate::limits::Ticket;
use crate::mesh::on_demand::LookupLease;
use crate::node::worker::seat::Seat;
use crate::observe::party::{Direction, Party};
use crate::observe::record::{ConnectionRecord, Facts};
use crate::traffic::copy::Neighbour;

/// A request for a connection to the application of a pod, from another pod of this process.
pub(in crate::traffic) struct DeliveryRequest {
    pub(in crate::traffic) target: Target,
    /// The headers that a CONNECT request would have.
    pub(in crate::traffic) headers: HeaderMap,
    pub(in crate::traffic) client: SocketAddr,
    /// The HBONE listener of the destination pod.
    pub(in crate::traffic) here: SocketAddr,
    pub(in crate::traffic) trust: Arc<MutualTrust>,
}

/// The destination pod's part of an open connection.
// Fields are dropped in this order: the socket is closed before its counts are released.
pub(in crate::traffic) struct Delivery {
    app: TcpStream,
    record: ConnectionRecord,
    registration: Registration<Decision>,
    _lookups: LookupLease,
    _ticket: Ticket,
    seat: Arc<Seat>,
    trust: Arc<MutualTrust>,
}

/// Records that one pod has rejected the other's certificate.
pub(in crate::traffic) fn record_distrust(
    seat: &Seat,
    client: SocketAddr,
    here: SocketAddr,
    reason: HboneError,
) {
    record_failed_handshake(seat, Instant::now(), client, here, ProxyError::Tunnel(reason));
}

/// Connects to the application of the pod of `seat`, and creates the pod's record.
///
/// # Errors
/// The status of the response to a CONNECT request that fails in the same way.
pub(in crate::traffic) async fn deliver(
    seat: Arc<Seat>,
    DeliveryRequest { target, headers, client, here, trust }: DeliveryRequest,
) -> Result<Box<Delivery>, StatusCode> {
    let accepted_at = Instant::now();
    let registration = seat.register_stream();
    let origin = RequestOrigin { client, here, peer: trust.client().clone() };
    let known = {
        let admitted = seat.pod.limits.admit_delivery(client.ip(), seat.worker.index);
        let admitted = admitted.map_err(refused_stream);
        let mesh = pin!(admitted_mesh(&seat, admitted, here, &target));
        registration.termination().or_terminate(mesh).await
    };
    let target = inbound_target(&seat, &target, here);
    let facts = request_facts(&seat, &origin, &headers, target.as_ref().ok());
    let unopened = Unopened { seat: &seat, accepted_at, facts, is_recorded: false };
    let connected = async {
        let (ticket, lookups) = known?;
        let target = target?;
        let (peer, spans) = (Some(&origin.peer), &unopened.facts.spans);
        let connecting = pin!(connect(&seat, &registration, client, &target, peer, spans));
        let (app, policy) = registration.termination().or_terminate(connecting).await?;
        Ok((app, policy, ticket, lookups))
    };
    match connected.await {
        Ok((app, policy, ticket, lookups)) => {
            let record = unopened.opened(policy);
            registration.amend(|decision| decision.list(&record));
            let (_lookups, _ticket) = (lookups, ticket);
            Ok(Box::new(Delivery { app, record, registration, _lookups, _ticket, seat, trust }))
        }
        Err(error) => Err(unopened.failed(error)),
    }
}

/// A connection that is not open yet. Dropping it records an abort by its client.
struct Unopened<'a> {
    seat: &'a Seat,
    accepted_at: Instant,
    facts: Facts,
    is_recorded: bool,
}

impl Unopened<'_> {
    fn opened(mut self, policy: Option<Arc<Policy>>) -> ConnectionRecord {
        let facts = Facts { policy, ..self.take_facts() };
        ConnectionRecord::opened(self.accepted_at, facts, self.seat.records())
    }

    fn failed(mut self, error: ProxyError) -> StatusCode {
        let status = error.reason().status;
        self.record_failure(error);
        status
    }

    fn record_failure(&mut self, error: ProxyError) {
        let failure = self.take_facts().failed(error);
        ConnectionRecord::failed(self.accepted_at, failure, self.seat.records());
    }

    fn take_facts(&mut self) -> Facts {
        self.is_recorded = true;
        let nothing = Facts::new(Direction::Inbound, Party::default(), Party::default());
        std::mem::replace(&mut self.facts, nothing)
    }
}

impl Drop for Unopened<'_> {
    fn drop(&mut self) {
        if !self.is_recorded {
            self.record_failure(ProxyError::Tunnel(HboneError::aborted_by_peer()));
        }
    }
}

impl Delivery {
    pub(in crate::traffic) fn trust(&self) -> &MutualTrust {
        &self.trust
    }

    /// The application as one side of a relay.
    pub(in crate::traffic) fn side(&self) -> Neighbour<'_> {
        Neighbour {
            app: &self.app,
            buffers: self.seat.pod.limits.buffers(),
            record: &self.record,
            termination: self.registration.termination(),
            revocations: [self.trust.server_revocation(), self.trust.client_revocation()],
        }
    }

    /// Closes the destination pod's record with the outcome that it would have for a tunnel.
    /// Returns the outcome of the source pod. `source` is the source's termination signal.
    pub(in crate::traffic) fn close(
        self,
        outcome: Result<(), ProxyError>,
        source: &Termination,
    ) -> Result<(), ProxyError> {
        let own = self.registration.termination();
        let (at_source, here) = match outcome {
            Ok(()) => (Ok(()), Ok(())),
            Err(error) => {
                // If both pods revoke each other, the source's revocation has ended the relay.
                let by_destination = self.trust.server_revocation().now_or_never().is_none();
                let (at_source, here) = split(error, source, own, by_destination);
                (Err(at_source), Err(here))
            }
        };
        self.record.close(here);
        at_source
    }
}

/// Derives the errors of both pods from the `error` that ended the connection. One pod sees the
/// cause, the other one a stream or tunnel aborted by its peer.
fn split(
    error: ProxyError,
    source: &Termination,
    destination: &Termination,
    by_destination: bool,
) -> (ProxyError, ProxyError) {
    let aborted = || ProxyError::Tunnel(HboneError::aborted_by_peer());
    let lost = || ProxyError::Tunnel(HboneError::Lost { source: None });
    match error {
        ProxyError::IdleTimeout { after } => (error, ProxyError::IdleTimeout { after }),
        ProxyError::HalfCloseTimeout { after } => (error, ProxyError::HalfCloseTimeout { after }),
        ProxyError::Client(_) => (error, aborted()),
        ProxyError::Upstream(_) => (aborted(), error),
        ProxyError::Tunnel(_) if by_destination => (lost(), error),
        ProxyError::Tunnel(_) => (error, lost()),
        // One or both registries have terminated the connection. The relay has already taken the
        // reason.
        _ => {
            let (of_source, of_destination) = (source.take_reason(), destination.take_reason());
            let is_of_source = match (&of_source, &of_destination) {
                (Some(_), None) => false,
                (None, Some(_)) => true,
                _ => source.is_terminated(),
            };
            if is_of_source {
                (error, of_destination.unwrap_or_else(aborted))
            } else {
                (of_source.unwrap_or_else(aborted), error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::decide::connection_registry::{Registries, Terminated};

    const AFTER: std::time::Duration = std::time::Duration::from_secs(1);

    fn reset() -> io::Error {
        io::ErrorKind::ConnectionReset.into()
    }

    /// The reason codes of both records.
    fn codes((source, destination): (ProxyError, ProxyError)) -> [&'static str; 2] {
        [source.reason().code, destination.reason().code]
    }

    #[tokio::test]
    async fn delivery_records_have_the_errors_of_tunnel_ends() {
        let registry = Registries::<()>::new(1);
        let (source, destination) =
            (registry.for_worker(0).register(()), registry.for_worker(0).register(()));
        let of = |error, by_destination| {
            let (source, destination) = (source.termination(), destination.termination());
            codes(split(error, source, destination, by_destination))
        };
        let client = ProxyError::Client(reset());
        assert_eq!(of(client, false), ["client_reset", "reset"]);
        let upstream = ProxyError::Upstream(reset());
        assert_eq!(of(upstream, false), ["reset", "upstream_reset"]);
        let revoked = || ProxyError::Tunnel(HboneError::Revoked);
        assert_eq!(of(revoked(), false), ["revoked", "lost"]);
        assert_eq!(of(revoked(), true), ["lost", "revoked"]);
        let idle = ProxyError::IdleTimeout { after: AFTER };
        assert_eq!(of(idle, false), ["idle_timeout"; 2]);
        let half_closed = ProxyError::HalfCloseTimeout { after: AFTER };
        assert_eq!(of(half_closed, false), ["half_close_timeout"; 2]);
    }

    #[tokio::test]
    async fn termination_reason_is_recorded_for_the_terminating_pod() {
        let denied = || ProxyError::NoLongerAllowed(Box::new(ProxyError::Dropped));
        for (at_source, at_destination, expected) in [
            (true, false, ["no_longer_allowed", "reset"]),
            (false, true, ["reset", "no_longer_allowed"]),
            (true, true, ["no_longer_allowed"; 2]),
        ] {
            let (source, destination) = (Registries::new(1), Registries::new(1));
            let ends = [&source, &destination].map(|end| end.for_worker(0).register(()));
            let mut terminated = Terminated::default();
            for (registry, is_terminated) in [(&source, at_source), (&destination, at_destination)]
            {
                if is_terminated {
                    registry.for_worker(0).terminate(&mut terminated, |()| Err(denied())).await;
                }
            }
            let [source, destination] = ends.each_ref().map(|end| end.termination());
            // The relay takes the reason that ends it, the source's first.
            let error = source.take_reason().or_else(|| destination.take_reason());
            let error = error.expect("one is terminated");
            assert_eq!(codes(split(error, source, destination, false)), expected);
            drop(ends);
            terminated.end().await;
        }
    }
}
