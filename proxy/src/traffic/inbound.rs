//! Serves inbound connections: streams of peers' tunnels, and caught plaintext. Every step that can
//! fail precedes the response 200. The application sees the client's address if the profile
//! supports it.

mod application;
mod client_hello;
mod delivery;
mod retirement;

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use http::HeaderMap;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use underpass_hbone::{
    Acceptor, Authority, HboneError, Incoming, PeerIdentity, ServerTunnel, TraceParent,
    TunnelStream, log_panic,
};
use underpass_interception::reset_on_close;

use self::application::{Connected, connect};
use self::client_hello::client_hello;
pub(super) use self::delivery::{Delivery, DeliveryRequest, deliver, record_distrust};
use self::retirement::Retirement;
use crate::decide::connection_registry::Registration;
use crate::decide::route;
use crate::decide::route::{InboundTarget, Target};
use crate::decide::subject::Decision;
use crate::error::ProxyError;
use crate::limits::{Refusal, Ticket};
use crate::mesh::on_demand::LookupLease;
use crate::node::assignment::Assignment;
use crate::node::worker::seat::Seat;
use crate::node::worker::turns::InTurn;
use crate::observe::metrics;
use crate::observe::party::{Direction, Party};
use crate::observe::record::{ConnectionRecord, Facts};
use crate::observe::trace::Spans;
use crate::traffic::accepted::{Accepted, Registered};
use crate::traffic::copy::Flow;
use crate::traffic::headers;
use crate::traffic::listeners::Kind;

/// Serves one caught plaintext connection.
pub(crate) fn serve_plaintext(
    seat: Arc<Seat>,
    assignment: Assignment,
) -> impl Future<Output = ()> + Send {
    // Boxed, and no `async fn`: the future of connecting is several times larger than that of
    // relaying, and is freed before it.
    let opening = Box::pin(open_plaintext(seat.clone(), assignment));
    async move {
        // The order of fields and drops matters: close the sockets before releasing their permits
        // and counts.
        let Some(Opened { record, held, client, app }) = opening.await else {
            return;
        };
        let buffers = seat.pod.limits.buffers();
        let termination = held.registration.termination();
        let flow = Flow::new(buffers, &seat.node().deadlines, &record, termination);
        let outcome = flow.through_tcp(&client, &app).await;
        record.close(outcome);
    }
}

/// An open connection: its record, both sides, and its resources.
struct Opened<C> {
    record: ConnectionRecord,
    held: HeldResources,
    client: C,
    app: TcpStream,
}

/// The resources that a connection holds until it is closed.
struct HeldResources {
    registration: Registration<Decision>,
    _lookups: LookupLease,
    _ticket: Ticket,
}

/// Connects a plaintext connection to the application, and creates its record.
async fn open_plaintext(
    seat: Arc<Seat>,
    Assignment { accepted, registration, ticket, .. }: Assignment,
) -> Option<Opened<TcpStream>> {
    let accepted_at = Instant::now();
    let (client, destination) = (accepted.client, accepted.destination.address());
    // A connection that is not the pod's takes no lookups.
    let registered = accepted.check_local(&seat).and_then(Accepted::register);
    let is_own = registered.is_ok();
    let known = match registered {
        Ok(connection) => {
            let mesh = pin!(seat.inbound_mesh(destination, None));
            let known = connection.unless_interrupted(&registration, mesh).await;
            known.map(|(_, lookups)| (connection, lookups))
        }
        Err(error) => Err(error),
    };
    let facts = plaintext_facts(&seat, client, destination, is_own);
    let connected = async {
        let (connection, lookups) = known?;
        let spans = &facts.spans;
        let connecting = connect_plaintext(&seat, &connection, &registration, spans);
        let (app, policy) = connecting.await?;
        Ok::<_, ProxyError>((connection.stream, app, policy, lookups))
    };
    match connected.await {
        Ok((client, app, policy, lookups)) => {
            let facts = Facts { policy, ..facts };
            let record = ConnectionRecord::opened(accepted_at, facts, seat.records());
            registration.amend(|decision| decision.list(&record));
            let held = HeldResources { registration, _lookups: lookups, _ticket: ticket };
            Some(Opened { record, held, client, app })
        }
        Err(error) => {
            ConnectionRecord::failed(accepted_at, facts.failed(error), seat.records());
            None
        }
    }
}

/// The facts of a plaintext connection before it is connected.
fn plaintext_facts(
    seat: &Seat,
    client: SocketAddr,
    destination: SocketAddr,
    is_own: bool,
) -> Facts {
    let snapshot = seat.node().mesh.borrow();
    let destination = match is_own {
        true => seat.own_party(&snapshot, destination),
        // The address is not the pod's, so the destination is not its workload.
        false => Party::at_address(destination),
    };
    let (trace, spans) = seat.node().tracer.follow(None);
    let source = Party::plaintext_client(client, &snapshot);
    Facts { trace, spans, ..Facts::new(Direction::Inbound, source, destination) }
}

async fn connect_plaintext(
    seat: &Seat,
    connection: &Registered,
    registration: &Registration<Decision>,
    spans: &Spans,
) -> Result<Connected, ProxyError> {
    let address = connection.destination.address();
    let target = InboundTarget { address, header: None, service: None };
    let connecting = pin!(connect(seat, registration, connection.client, &target, None, spans));
    connection.unless_interrupted(registration, connecting).await
}

/// Serves one peer's connection: the TLS and HTTP/2 handshakes, then every CONNECT request.
pub(crate) async fn serve_tunnel(
    seat: Arc<Seat>,
    Assignment { accepted, registration, ticket, .. }: Assignment,
) {
    let accepted_at = Instant::now();
    let (client, destination) = (accepted.client, accepted.destination.address());
    let checked = accepted.check_local(&seat);
    let outcome = match checked.and_then(Accepted::register) {
        Err(error) => Err(error),
        Ok(connection) => {
            let serving = pin!(accept_tunnel(&seat, connection, &registration, &ticket));
            registration.termination().or_terminate(serving).await
        }
    };
    if let Err(error) = outcome {
        record_failed_handshake(&seat, accepted_at, client, destination, error);
    }
}

fn record_failed_handshake(
    seat: &Seat,
    accepted_at: Instant,
    client: SocketAddr,
    here: SocketAddr,
    error: ProxyError,
) {
    let source = Party::plaintext_client(client, &seat.node().mesh.borrow());
    let facts = Facts::new(Direction::Inbound, source, Party::default());
    let facts = Facts { hbone: Some(here), ..facts };
    match error {
        // The tunnel may have been established before the drain.
        ProxyError::Drained | ProxyError::DrainedByRequest => {
            ConnectionRecord::failed(accepted_at, facts.failed(error), seat.records());
        }
        error => {
            ConnectionRecord::handshake_failed(accepted_at, facts.failed(error), seat.records());
        }
    }
}

async fn accept_tunnel(
    seat: &Arc<Seat>,
    Registered { stream, client, destination }: Registered,
    registration: &Registration<Decision>,
    ticket: &Ticket,
) -> Result<(), ProxyError> {
    // A drain that begins during the handshake concerns the tunnel.
    let closing = seat.pod.inbound_drain.closing_of_tunnel();
    let endpoints = seat.tunnel_endpoints(destination.address()).await?;
    let handshake = handshake(seat, &endpoints.acceptor, stream, ticket);
    let turns = seat.worker.turns.as_ref();
    let mut tunnel = InTurn::new(turns, seat.pod.id, handshake).await?;
    let peer = tunnel.peer().clone();
    let _counted = match seat.node().limits.admit_identity(peer.spiffe_id()) {
        Ok(counted) => counted,
        Err(refusal) => {
            seat.node().limits.refused(refusal, Kind::Hbone.name());
            tunnel.refuse().await;
            return Ok(());
        }
    };
    let _open = metrics::tunnel_open("inbound");
    registration.amend(|decision| decision.list_tunnel(client, peer.spiffe_id()));
    let resumed = tunnel.resumed();
    tracing::debug!(%client, peer = %peer.spiffe_id(), resumed, "tunnel accepted");
    let mut retirement = Retirement::new(seat.node(), &tunnel);
    // The handshake is a part of the first connection.
    let mut handshake = Some(tunnel.handshake());
    while let Some(request) = retirement.next_request(&closing, &mut tunnel).await {
        let admitted = admit_stream(ticket);
        let (registration, peer) = (seat.register_stream(), peer.clone());
        let origin = RequestOrigin { client, here: destination.address(), peer };
        let tunnel_request = TunnelRequest { request, origin, handshake: handshake.take() };
        let serving = serve_request(seat.clone(), tunnel_request, registration, admitted);
        let serving = InTurn::new(seat.worker.turns.as_ref(), seat.pod.id, serving);
        tokio::spawn(log_panic("stream of a tunnel", serving));
    }
    if let Some(limit) = tunnel.exceeded() {
        metrics::tunnel_closed(limit.code());
        ticket.penalize();
        tracing::info!(%client, peer = %peer.spiffe_id(), %limit, "tunnel closed: the peer exceeded a limit");
    }
    Ok(())
}

/// Performs the handshake with a client. It is counted and queued only after the client has sent a
/// ClientHello. The timeout includes both waits.
async fn handshake(
    seat: &Seat,
    acceptor: &Acceptor,
    stream: TcpStream,
    ticket: &Ticket,
) -> Result<ServerTunnel, ProxyError> {
    let after = seat.node().timeouts.handshake;
    let deadline = Instant::now() + after;
    let late = || ProxyError::Tunnel(HboneError::HandshakeTimeout { after });
    let hello = timeout_at(deadline, client_hello(&stream)).await;
    hello.map_err(|_| late())?.map_err(ProxyError::Client)?;
    let turn = timeout_at(deadline, ticket.handshake(metrics::handshake_waits)).await;
    let (limit, error) = match turn {
        Ok(Some(_ticket)) => {
            let _counted = metrics::handshake_in_progress();
            let pacing = seat.pod.sockets.settings().undecided_pacing(&stream);
            // The duplicated socket counts too. Without a spare descriptor the connection is not
            // paced.
            let descriptors = &seat.node().limits.descriptors;
            let pacing = pacing.and_then(|pacing| Some((pacing, descriptors.spare(1)?)));
            let began = Instant::now();
            // Boxed: the future of a handshake is several times larger than that of a tunnel.
            let handshake = Box::pin(acceptor.accept(stream, after));
            let handshake = timeout_at(deadline, handshake).await;
            if let Some((pacing, _descriptor)) = pacing {
                // The client's part of the handshake takes one round trip and its CPU time.
                pacing.decide(began.elapsed());
            }
            let tunnel = handshake.map_err(|_| late())?.map_err(ProxyError::Tunnel)?;
            seat.worker.records.timings().handshake(Direction::Inbound, began.elapsed());
            return Ok(tunnel);
        }
        Ok(None) => ("handshakes_per_source", ProxyError::TooManyHandshakes(ticket.source())),
        Err(_) => ("handshakes", ProxyError::HandshakeNotBegun { after }),
    };
    metrics::handshake_refused(limit);
    reset_on_close(&stream);
    Err(error)
}

/// Admits a stream of the tunnel of `ticket`.
fn admit_stream(ticket: &Ticket) -> Result<Ticket, ProxyError> {
    ticket.stream().map_err(refused_stream)
}

fn refused_stream(refusal: Refusal) -> ProxyError {
    metrics::connection_refused(refusal.limit(), Kind::Hbone.name());
    ProxyError::TooManyConnections(refusal)
}

/// A CONNECT request.
struct TunnelRequest {
    request: Incoming,
    origin: RequestOrigin,
    /// The start and the end of the TLS handshake, for the first request of a tunnel.
    handshake: Option<[Instant; 2]>,
}

/// The client of a tunnel: its identity `peer`, and the address `here` at which the tunnel ends.
struct RequestOrigin {
    client: SocketAddr,
    here: SocketAddr,
    peer: PeerIdentity,
}

/// Serves one CONNECT request.
fn serve_request(
    seat: Arc<Seat>,
    tunnel_request: TunnelRequest,
    registration: Registration<Decision>,
    admitted: Result<Ticket, ProxyError>,
) -> impl Future<Output = ()> + Send {
    // Boxed, and no `async fn`: the future of connecting is several times larger than that of
    // relaying, and is freed before it.
    let opening = Box::pin(open_request(seat.clone(), tunnel_request, registration, admitted));
    async move {
        let Some(Opened { record, held, client, app }) = opening.await else {
            return;
        };
        let buffers = seat.pod.limits.buffers();
        let termination = held.registration.termination();
        let flow = Flow::new(buffers, &seat.node().deadlines, &record, termination);
        let outcome = flow.out_of_tunnel(client, &app).await;
        record.close(outcome);
    }
}

/// Connects to the application for a CONNECT request, creates its record, and responds.
async fn open_request(
    seat: Arc<Seat>,
    mut tunnel_request: TunnelRequest,
    registration: Registration<Decision>,
    admitted: Result<Ticket, ProxyError>,
) -> Option<Opened<TunnelStream>> {
    let accepted_at = Instant::now();
    let (requested, here) =
        (requested(tunnel_request.request.authority()), tunnel_request.origin.here);
    let known = {
        let mesh = pin!(admitted_mesh(&seat, admitted, here, &requested));
        unless_reset(&mut tunnel_request.request, &registration, mesh).await
    };
    let target = inbound_target(&seat, &requested, here);
    let headers = tunnel_request.request.headers();
    let facts = request_facts(&seat, &tunnel_request.origin, headers, target.as_ref().ok());
    if let Some(handshake) = tunnel_request.handshake {
        facts.spans.handshake(None, handshake);
    }
    let connected = async {
        let (ticket, lookups) = known?;
        let (request, target) = (&mut tunnel_request, target?);
        let connecting = connect_request(&seat, request, &registration, &target, &facts.spans);
        let (app, policy) = connecting.await?;
        Ok::<_, ProxyError>((app, policy, ticket, lookups))
    };
    let (app, policy, ticket, lookups) = match connected.await {
        Ok(connected) => connected,
        Err(error) => {
            // A disconnected client gets no response.
            tunnel_request.request.refuse(error.reason().status);
            ConnectionRecord::failed(accepted_at, facts.failed(error), seat.records());
            return None;
        }
    };
    let facts = Facts { policy, ..facts };
    let record = ConnectionRecord::opened(accepted_at, facts, seat.records());
    registration.amend(|decision| decision.list(&record));
    let answer = headers::response(record.facts(), &seat.context().own);
    match tunnel_request.request.accept(answer) {
        Ok(client) => {
            let held = HeldResources { registration, _lookups: lookups, _ticket: ticket };
            Some(Opened { record, held, client, app })
        }
        Err(error) => {
            record.close(Err(ProxyError::Tunnel(error)));
            None
        }
    }
}

async fn connect_request(
    seat: &Seat,
    tunnel_request: &mut TunnelRequest,
    registration: &Registration<Decision>,
    target: &InboundTarget,
    spans: &Spans,
) -> Result<Connected, ProxyError> {
    let TunnelRequest { request, origin, .. } = tunnel_request;
    let (client, peer) = (origin.client, Some(&origin.peer));
    let connecting = pin!(connect(seat, registration, client, target, peer, spans));
    unless_reset(request, registration, connecting).await
}

/// Runs `work` until the connection is terminated or the client resets the request. The caller pins
/// `work`: moving it into this future would double its size.
async fn unless_reset<T>(
    request: &mut Incoming,
    registration: &Registration<Decision>,
    work: impl Future<Output = Result<T, ProxyError>> + Unpin,
) -> Result<T, ProxyError> {
    tokio::select! {
        outcome = registration.termination().or_terminate(work) => outcome,
        error = request.closed() => Err(ProxyError::Tunnel(error)),
    }
}

/// Waits for the mesh of an admitted stream. A refused one takes no lookups.
async fn admitted_mesh(
    seat: &Seat,
    admitted: Result<Ticket, ProxyError>,
    here: SocketAddr,
    requested: &Target,
) -> Result<(Ticket, LookupLease), ProxyError> {
    let ticket = admitted?;
    let (_, lookups) = seat.inbound_mesh(here, Some(requested)).await?;
    Ok((ticket, lookups))
}

/// The facts of a CONNECT request before it is connected.
fn request_facts(
    seat: &Seat,
    RequestOrigin { client, here, peer }: &RequestOrigin,
    headers: &HeaderMap,
    target: Option<&InboundTarget>,
) -> Facts {
    let snapshot = seat.node().mesh.borrow();
    let source = Party::tunnel_client(*client, peer.spiffe_id(), headers, &snapshot);
    let own = target.map(|target| seat.own_party(&snapshot, target.address));
    let destination = Party { identity: seat.pod.identity(), ..own.unwrap_or_default() };
    let (trace, spans) = seat.node().tracer.follow(TraceParent::read(headers));
    Facts {
        service: target.and_then(|target| target.service.clone()),
        hbone: Some(*here),
        trace,
        spans,
        ..Facts::new(Direction::Inbound, source, destination)
    }
}

fn requested(authority: &Authority) -> Target {
    match authority {
        Authority::Address(address) => Target::Address(*address),
        Authority::Name { host, port } => Target::Hostname(host.as_str().into(), *port),
    }
}

/// The target of a request for `authority` in a tunnel that ends at `here`.
fn inbound_target(
    seat: &Seat,
    authority: &Target,
    here: SocketAddr,
) -> Result<InboundTarget, ProxyError> {
    let snapshot = seat.node().mesh.borrow();
    let own = &seat.context().own;
    let local = snapshot.local(own, here.ip()).map(|workload| &**workload);
    let namespace = local.map_or(&*own.namespace, |workload| &*workload.namespace);
    route::inbound(authority, here, &snapshot.mesh, local, &own.network, namespace)
        .map_err(ProxyError::Route)
}

#[cfg(test)]
mod tests;
