//! Serves caught outbound connections: routes them, gets a permit, connects by a tunnel or plain
//! TCP, and copies.
//!
//! ```text
//! serve ─ open ─ OutboundConnect::connect          the ranked alternatives, one after the other
//!                └ connect_in_time                 one of them, with a deadline if others remain
//!                  └ connect_via                   its next hop: resolve, permit, dial
//!                    ├ dial                        a plain connection
//!                    ├ deliver                     a pod of this process (`same_node.rs`)
//!                    ├ open_stream                 a stream of a pooled tunnel
//!                    └ open_stream_behind_gateway  a tunnel through such a stream
//! ```
//!
//! Another endpoint of a service is tried if one cannot be connected to: the application has sent
//! nothing by then. Connecting returns the [`Facts`] for the record, also when it fails.

mod same_node;

use std::iter::Peekable;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use underpass_config::{Hint as _, NetworkMode, Quoted, SpiffeId};
use underpass_hbone::{ConnectRequest, Connector, HboneError, TunnelKey, TunnelStream};

use crate::decide::connection_registry::Registration;
use crate::decide::endpoint_health::{EndpointKey, OpenConnection};
use crate::decide::lookups;
use crate::decide::policy::Permit;
use crate::decide::route;
use crate::decide::route::{
    Alternatives, Caller, EndpointSelector, ForwardVia, NextHop, Route, Target,
};
use crate::decide::snapshot::Snapshot;
use crate::decide::subject::{Decision, Outbound, Subject};
use crate::error::ProxyError;
use crate::limits::Ticket;
use crate::mesh::on_demand::LookupLease;
use crate::node::assignment::Assignment;
use crate::node::worker::seat::Seat;
use crate::observe::metrics;
use crate::observe::party::{Direction, Party};
use crate::observe::record::{ConnectFailure, ConnectionRecord, Facts};
use crate::observe::trace::{Spans, StepKind};
use crate::traffic::accepted::{Accepted, Registered, Source};
use crate::traffic::copy::Flow;
use crate::traffic::dial::dial;
use crate::traffic::headers;
use crate::traffic::inbound::Delivery;

/// The maximum number of endpoints to try for one connection.
const MAX_ATTEMPTS: usize = 3;
/// Timeout for one endpoint while there is an alternative. The kernel repeats the SYN after 1 s, so
/// one lost packet ejects no endpoint.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves one caught connection until it ends.
pub(crate) fn serve(seat: Arc<Seat>, assignment: Assignment) -> impl Future<Output = ()> + Send {
    // Boxed, and no `async fn`: the future of connecting is several times larger than that of
    // relaying, and is freed before it.
    let opening = Box::pin(open(seat.clone(), assignment));
    async move {
        // The order of fields and drops matters: close the sockets before releasing their permits
        // and counts.
        let Some(Opened { record, held, client, upstream }) = opening.await else {
            return;
        };
        let buffers = seat.pod.limits.buffers();
        let termination = held.registration.termination();
        let flow = Flow::new(buffers, &seat.node().deadlines, &record, termination);
        let outcome = match upstream {
            Upstream::Tunnel(tunnel) => flow.into_tunnel(&client, tunnel).await,
            Upstream::Plain(upstream) => flow.through_tcp(&client, &upstream).await,
            Upstream::SameNode(delivery) => {
                // Boxed: it is larger, and would enlarge the task of every other connection.
                let outcome = Box::pin(flow.into_neighbour(&client, delivery.side())).await;
                delivery.close(outcome, termination)
            }
        };
        record.close(outcome);
    }
}

/// An open connection: its record, its sockets, and its resources.
struct Opened {
    record: ConnectionRecord,
    held: HeldResources,
    client: TcpStream,
    upstream: Upstream,
}

/// The resources that a connection holds until it is closed.
struct HeldResources {
    registration: Registration<Decision>,
    _load: Vec<OpenConnection>,
    _lookups: [LookupLease; 2],
    _ticket: Ticket,
}

/// The connection to the upstream.
enum Upstream {
    Tunnel(TunnelStream),
    Plain(TcpStream),
    /// A connection without a tunnel to a pod of this process.
    SameNode(Box<Delivery>),
}

impl Upstream {
    /// The peer's proven identity.
    fn identity(&self) -> Option<&SpiffeId> {
        match self {
            Self::Tunnel(tunnel) => Some(tunnel.peer().spiffe_id()),
            Self::SameNode(delivery) => Some(delivery.trust().server().spiffe_id()),
            Self::Plain(_) => None,
        }
    }
}

/// Connects an accepted connection to its upstream, and creates its record.
async fn open(
    seat: Arc<Seat>,
    Assignment { accepted, registration, mut ticket, .. }: Assignment,
) -> Option<Opened> {
    let accepted_at = Instant::now();
    match connect(&seat, accepted, &registration).await {
        Ok((Registered { stream: client, .. }, connected, lookups)) => {
            let Connected { facts, upstream, load, of_hop } = connected;
            if let Upstream::Tunnel(_) | Upstream::SameNode(_) = &upstream {
                // The tunnel, or the destination pod, holds the descriptor of its own connection.
                ticket.release_descriptor();
            }
            let held = HeldResources {
                registration,
                _load: load,
                _lookups: [lookups, of_hop],
                _ticket: ticket,
            };
            let record = ConnectionRecord::opened(accepted_at, facts, seat.records());
            held.registration.amend(|decision| decision.list(&record));
            Some(Opened { record, held, client, upstream })
        }
        Err(failure) => {
            ConnectionRecord::failed(accepted_at, failure, seat.records());
            None
        }
    }
}

/// Connects an accepted connection to its upstream.
async fn connect(
    seat: &Arc<Seat>,
    accepted: Accepted,
    registration: &Registration<Decision>,
) -> Result<(Registered, Connected, LookupLease), Box<ConnectFailure>> {
    let (client, destination) = (accepted.client, accepted.destination.address());
    let facts = |source| {
        let (trace, spans) = seat.node().tracer.start();
        let facts = Facts::new(Direction::Outbound, source, Party::at_address(destination));
        Facts { trace: Some(trace), spans, ..facts }
    };
    // A connection of a foreign source takes no lookups.
    let found = async {
        let source = accepted.check_source(seat).inspect_err(|_| metrics::foreign_source())?;
        let connection = accepted.register()?;
        let mesh = pin!(seat.outbound_mesh(client, destination));
        let (snapshot, lookups) = connection.unless_interrupted(registration, mesh).await?;
        Ok((source, connection, snapshot, lookups))
    };
    let (source, connection, snapshot, lookups) = match found.await {
        Ok(found) => found,
        Err(error) => {
            let source = seat.party_behind(&seat.node().mesh.borrow(), client);
            return Err(facts(source).failed(error));
        }
    };
    let known = facts(match source {
        Source::Own(_) => seat.own_party(&snapshot, client),
        Source::Other => seat.party_behind(&snapshot, client),
    });
    let identity = seat.pod.identity();
    let snapshot = &*snapshot;
    let connect = OutboundConnect {
        seat,
        registration,
        snapshot,
        connection: &connection,
        source,
        identity,
        known,
    };
    let connected = connect.connect().await?;
    Ok((connection, connected, lookups))
}

/// An open connection to the upstream, with the facts for the record.
struct Connected {
    facts: Facts,
    upstream: Upstream,
    load: Vec<OpenConnection>,
    /// Of the address of the next hop, if a resolver has found it.
    of_hop: LookupLease,
}

/// Connects one caught connection.
struct OutboundConnect<'a> {
    seat: &'a Arc<Seat>,
    registration: &'a Registration<Decision>,
    /// The snapshot of the mesh that routes the connection.
    snapshot: &'a Snapshot,
    connection: &'a Registered,
    source: Source,
    /// The identity of the pod's certificate.
    identity: Option<SpiffeId>,
    /// The facts that are known before routing.
    known: Facts,
}

impl OutboundConnect<'_> {
    /// Connects by the best route. Tries the next route if an endpoint cannot be reached.
    async fn connect(&self) -> Result<Connected, Box<ConnectFailure>> {
        let seat = self.seat;
        let own = &seat.context().own;
        let caller = Caller {
            network: &own.network,
            namespace: &own.namespace,
            workload: seat.caller(self.snapshot, self.source).map(|workload| &**workload),
            address: self.connection.client.ip(),
            identity: self.identity.as_ref(),
            hbone_port: seat.context().ports.hbone,
        };
        let selector = EndpointSelector::new(&seat.pod.endpoints);
        let mesh = &self.snapshot.mesh;
        let routed = route::outbound(self.connection.destination, mesh, &caller, selector);
        let Alternatives { best: mut route, others } =
            routed.map_err(|error| self.known.clone().failed(ProxyError::Route(error)))?;
        let mut others = others.take(MAX_ATTEMPTS - 1).peekable();
        loop {
            if let Err(error) = self.await_certificate(&route).await {
                return Err(self.facts(&route, None).failed(error));
            }
            let failure = match self.connect_in_time(&route, &mut others).await {
                Ok(connected) => return Ok(connected),
                Err(failure) => failure,
            };
            let Some(endpoint) = route.dialled().filter(|_| failure.error.is_endpoint_failure())
            else {
                return Err(failure);
            };
            self.eject(endpoint, &failure.error);
            match others.next() {
                Some(next) => route = next,
                // Report the failure of the endpoint, not the lack of an alternative.
                None => return Err(failure),
            }
        }
    }

    /// Waits for the pod's first certificate if the route requires it, so that the wait does not
    /// count against the endpoint.
    async fn await_certificate(&self, route: &Route) -> Result<(), ProxyError> {
        let is_needed = !matches!(route.via, ForwardVia::Plain { .. }) && self.identity.is_some();
        if !is_needed || self.seat.has_tunnel_endpoints() {
            return Ok(());
        }
        let asked = self.connection.destination.address();
        let endpoints = pin!(async { self.seat.tunnel_endpoints(asked).await.map(drop) });
        self.unless_interrupted(endpoints).await
    }

    fn eject(&self, endpoint: &EndpointKey, error: &ProxyError) {
        let seat = self.seat;
        let ejection = seat.node().timeouts.ejection;
        metrics::endpoint_ejected();
        tracing::warn!(
            endpoint = %endpoint.uid, port = endpoint.port, error = %Quoted::chain(error),
            hint = error.hint().as_deref(),
            "endpoint ejected for {} s", ejection.as_secs_f32()
        );
        seat.pod.endpoints.eject(endpoint.clone(), ejection);
    }

    /// Connects by `route`, within [`ATTEMPT_TIMEOUT`] if there is an alternative.
    async fn connect_in_time(
        &self,
        route: &Route,
        others: &mut Peekable<impl Iterator<Item = Route>>,
    ) -> Result<Connected, Box<ConnectFailure>> {
        let endpoints = &self.seat.pod.endpoints;
        let load = route.endpoints().map(|endpoint| endpoints.open(endpoint.clone())).collect();
        let mut connecting = pin!(self.connect_via(route, load));
        let connected = match route.dialled() {
            None => connecting.await,
            Some(_) => match timeout(ATTEMPT_TIMEOUT, &mut connecting).await {
                Ok(connected) => connected,
                Err(_) if others.peek().is_some() => {
                    let destination = self.connection.destination.address();
                    let after = ATTEMPT_TIMEOUT;
                    let error = ProxyError::ConnectTimeout { destination, after };
                    Err(self.facts(route, None).failed(error))
                }
                Err(_) => connecting.await,
            },
        }?;
        route.endpoints().for_each(|endpoint| endpoints.restore(endpoint));
        Ok(connected)
    }

    /// Connects by `route` to its next hop.
    async fn connect_via(
        &self,
        route: &Route,
        load: Vec<OpenConnection>,
    ) -> Result<Connected, Box<ConnectFailure>> {
        let resolved = self.unless_interrupted(pin!(self.resolve(route))).await;
        let (hop, of_hop) = resolved.map_err(|error| self.facts(route, None).failed(error))?;
        let mut facts = self.facts(route, Some(hop));
        let dialled = self.unless_interrupted(pin!(self.permit_and_dial(route, hop, &facts))).await;
        match dialled {
            Ok(upstream) => {
                facts.destination.identity = upstream.identity().cloned();
                Ok(Connected { facts, upstream, load, of_hop })
            }
            Err(error) => Err(facts.failed(error)),
        }
    }

    /// As [`Registered::unless_interrupted`].
    async fn unless_interrupted<T>(
        &self,
        work: impl Future<Output = Result<T, ProxyError>> + Unpin,
    ) -> Result<T, ProxyError> {
        self.connection.unless_interrupted(self.registration, work).await
    }

    /// Resolves the address of the next hop.
    ///
    /// The lease is of the lookups of a resolved hostname, so that the workload stays known.
    async fn resolve(&self, route: &Route) -> Result<(SocketAddr, LookupLease), ProxyError> {
        let (resolver, deadline) = (&self.seat.node().resolver, self.seat.node().timeouts.connect);
        let hop = route.via.next_hop();
        if let NextHop::Hostname { hostname, .. } = hop {
            self.seat.node().series.hostname_lookup(&self.known.source, hostname);
        }
        let resolved = resolver.resolve(hop, deadline).await.map_err(ProxyError::Resolve)?;
        if let (ForwardVia::Plain { .. }, NextHop::Hostname { .. }) = (&route.via, hop) {
            // The address may belong to a workload that requires a tunnel.
            let (client, current) =
                (self.connection.client, self.seat.node().mesh.borrow().clone());
            let own = &self.seat.context().own;
            let needed = |mesh: &Snapshot| lookups::outbound(mesh, own, client.ip(), resolved.ip());
            let (_, lookups) = self.seat.look_up(current, needed, self.seat.connect_wait()).await?;
            return Ok((resolved, lookups));
        }
        Ok((resolved, LookupLease::default()))
    }

    /// The facts of a connection by `route`. `hop` is the address of the next hop, if it is
    /// resolved.
    fn facts(&self, route: &Route, hop: Option<SocketAddr>) -> Facts {
        let asked = self.connection.destination.address();
        let (address, hbone) = match (&route.via, hop) {
            (_, None) => (asked, None),
            (ForwardVia::Plain { .. }, Some(hop)) => (hop, None),
            (via, Some(hop)) => (via.target(hop).unwrap_or(asked), Some(hop)),
        };
        let identity = hbone.and_then(|_| self.identity.clone());
        let destination = Party { workload: route.workload.clone(), ..Party::at_address(address) };
        Facts {
            source: Party { identity, ..self.known.source.clone() },
            destination,
            service: route.service.clone(),
            hbone,
            policy: None,
            spans: self.known.spans.clone(),
            ..self.known
        }
    }

    /// Obtains a permit for the next hop at `hop` and connects to it.
    async fn permit_and_dial(
        &self,
        route: &Route,
        hop: SocketAddr,
        facts: &Facts,
    ) -> Result<Upstream, ProxyError> {
        let own_network = &*self.seat.context().own.network;
        let by_address = route.workload.as_ref().is_none_or(|workload| {
            &*workload.network == own_network && workload.network_mode == NetworkMode::Standard
        });
        let asked = self.connection.destination.address();
        let peers = route.via.peers().cloned();
        let subject = Subject::Outbound(Outbound { asked, hop, peers, by_address });
        let permit = self.permit(subject, &facts.spans)?;
        let began = facts.spans.begin();
        let dialled = self.dial(route, &permit, facts).await;
        facts.spans.end(StepKind::Connect, began, &dialled);
        if let (Some(_), Ok(Upstream::Tunnel(tunnel))) = (began, &dialled) {
            facts.spans.handshake(began, tunnel.handshake());
        }
        dialled
    }

    /// Obtains a permit, which is a step of the trace.
    fn permit(&self, subject: Subject, spans: &Spans) -> Result<Permit<'_>, ProxyError> {
        let began = spans.begin();
        let permit = self.seat.permit(subject, self.registration);
        spans.end(StepKind::Policy, began, &permit);
        permit
    }

    /// Connects to the next hop, by plain TCP or by a tunnel.
    async fn dial(
        &self,
        route: &Route,
        permit: &Permit<'_>,
        facts: &Facts,
    ) -> Result<Upstream, ProxyError> {
        match &route.via {
            ForwardVia::Plain { .. } => {
                dial(permit, self.seat.node().timeouts.connect).await.map(Upstream::Plain)
            }
            ForwardVia::Tunnel { peers, authority, .. } => {
                let hop = permit.destination();
                let target = authority.target(hop.ip());
                if let Some(to) = self.neighbour(route, hop, &target) {
                    // Boxed: it would enlarge the future of every other connection.
                    let delivering = Box::pin(self.deliver(to, hop, peers, target, facts));
                    return delivering.await.map(Upstream::SameNode);
                }
                self.open_stream(permit, peers, &target, facts).await.map(Upstream::Tunnel)
            }
            ForwardVia::DoubleTunnel { gateway_peers, peers, authority, .. } => {
                let gateway = (permit, gateway_peers);
                // Boxed: its TLS handshake would enlarge the future of every other connection.
                let opening = self.open_stream_behind_gateway(gateway, peers, authority, facts);
                Box::pin(opening).await.map(Upstream::Tunnel)
            }
        }
    }

    /// Opens a stream of a pooled tunnel to the permitted hop.
    async fn open_stream(
        &self,
        permit: &Permit<'_>,
        peers: &Arc<[SpiffeId]>,
        target: &Target,
        facts: &Facts,
    ) -> Result<TunnelStream, ProxyError> {
        let (key, connector) = self.tunnel_key(permit, peers).await?;
        let own = &self.seat.context().own;
        let request = || ConnectRequest {
            authority: target.authority(),
            headers: headers::request(facts, own),
        };
        let opened = self.seat.pool.connect(&key, connector, request).await;
        opened.map_err(|error| self.tunnel_failed(error))
    }

    /// Opens a tunnel to one of `peers` through a stream to the gateway, which is the permitted
    /// hop.
    async fn open_stream_behind_gateway(
        &self,
        (permit, gateway_peers): (&Permit<'_>, &Arc<[SpiffeId]>),
        peers: &[SpiffeId],
        target: &Target,
        facts: &Facts,
    ) -> Result<TunnelStream, ProxyError> {
        let (key, connector) = self.tunnel_key(permit, gateway_peers).await?;
        let own = &self.seat.context().own;
        let request = |headers| ConnectRequest { authority: target.authority(), headers };
        let outer = || request(headers::request(facts, own));
        let inner = || request(headers::request_from_network(facts, own));
        let opening = self.seat.pool.connect_through(&key, connector, outer, peers, inner);
        opening.await.map_err(|error| self.tunnel_failed(error))
    }

    fn tunnel_failed(&self, error: HboneError) -> ProxyError {
        self.seat.keep_after_failure();
        ProxyError::tunnel(error)
    }

    /// The pool key of the tunnel, and the connector to open it if the pool has none.
    async fn tunnel_key(
        &self,
        permit: &Permit<'_>,
        peers: &Arc<[SpiffeId]>,
    ) -> Result<(TunnelKey, &Connector), ProxyError> {
        let address = permit.destination();
        let endpoints = self.seat.tunnel_endpoints(address).await?;
        let source = self.identity.clone().ok_or(ProxyError::NoIdentity(address))?;
        Ok((TunnelKey { source, address, peers: peers.clone() }, &endpoints.connector))
    }
}

#[cfg(test)]
mod tests;
