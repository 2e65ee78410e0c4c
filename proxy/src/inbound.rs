//! Inbound connections: through a peer's tunnel, or caught in plain. Everything that can fail does so before the peer is
//! told 200; the application sees the client's own address where the profile's rules support it.

mod retirement;

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use underpass_config::SpiffeId;
use underpass_hbone::{
    Acceptor, Authority, HboneError, Incoming, PeerIdentity, ServerTunnel, TunnelStream,
};
use underpass_interception::reset_on_close;

use self::retirement::Retirement;
use crate::accept::{Kind, Registered};
use crate::copy::{Flow, broken};
use crate::descriptors::Held;
use crate::dial::{dial_loopback, dial_workload};
use crate::error::ProxyError;
use crate::limits::Place;
use crate::live::Revocation;
use crate::node::{Assignment, Seat};
use crate::policy::{Permit, Principal, Subject};
use crate::record::{ConnectionRecord, Direction, Party};
use crate::route::{self, InboundTarget, Target};
use crate::{headers, metrics, proxy_protocol};

/// Serves one connection that was caught in plain.
pub(crate) fn serve_plaintext(
    seat: Arc<Seat>,
    assignment: Assignment,
) -> impl Future<Output = ()> + Send {
    // Boxed, and no `async fn`: what connecting needs is a multiple of what the connection needs after it.
    let opening = Box::pin(open_plaintext(seat.clone(), assignment));
    async move {
        // In this order, so that what is held is let go of when the connections are closed.
        let Some((mut record, Opened { _held, mut revocation, client, app })) = opening.await
        else {
            return;
        };
        record.established(&seat.worker.series);
        let flow = Flow::new(seat.node(), &record, &mut revocation);
        let outcome = flow.through_tcp(&client, &app).await;
        record.close(outcome);
    }
}

/// Both sides of a connection, the client's and the application's, and what must be held as long as it is open.
struct Opened<C> {
    client: C,
    app: TcpStream,
    revocation: Revocation,
    _held: (Permit, Place, Held),
}

/// Connects to the application, and opens the record of that, which is closed if it fails.
async fn open_plaintext(
    seat: Arc<Seat>,
    Assignment { accepted, place, .. }: Assignment,
) -> Option<(ConnectionRecord, Opened<TcpStream>)> {
    let destination = accepted.destination.as_ref().ok().copied();
    let mut record = open_record(&seat, accepted.client, destination, None);
    let checked = accepted.check_local(&seat);
    if checked.is_err() {
        // The destination is no address of the pod, so that its workload is not there.
        record.destination.workload = None;
    }
    let opened = match checked.and_then(|accepted| accepted.register(seat.context().ports)) {
        Ok(connection) => forward_plaintext(&seat, connection, place).await,
        Err(error) => Err(error),
    };
    record.or_close(opened)
}

async fn forward_plaintext(
    seat: &Seat,
    Registered { stream, client, destination, descriptors }: Registered,
    place: Place,
) -> Result<Opened<TcpStream>, ProxyError> {
    let way = InboundTarget { address: destination, header: None, service: None };
    let connecting = pin!(connect(seat, client, &way, None));
    let connected = tokio::select! {
        connected = seat.node().drain.or_abort(connecting) => connected?,
        // A FIN is no reason: what was sent before it is still to be delivered.
        error = broken(&stream) => return Err(ProxyError::Client(error)),
    };
    let Connected { app, permit, revocation } = connected;
    Ok(Opened { client: stream, app, revocation, _held: (permit, place, descriptors) })
}

/// Serves one peer's connection: the handshakes, then every CONNECT request that comes through it.
pub(crate) async fn serve_tunnel(
    seat: Arc<Seat>,
    Assignment { accepted, place: _place, tunnel: _tunnel, .. }: Assignment,
) {
    let client = accepted.client;
    let destination = accepted.destination.as_ref().ok().copied();
    let checked = accepted.check_local(&seat);
    let outcome = match checked.and_then(|accepted| accepted.register(seat.context().ports)) {
        Err(error) => Err(error),
        Ok(connection) => {
            let serving = pin!(accept_tunnel(&seat, connection));
            seat.node().drain.or_abort(serving).await
        }
    };
    if let Err(error) = outcome {
        let mut record = open_record(&seat, client, None, None);
        record.hbone = destination;
        match error {
            // The tunnel may have stood.
            ProxyError::Drained => record.close(Err(error)),
            error => record.close_unproven(error),
        }
    }
}

async fn accept_tunnel(
    seat: &Arc<Seat>,
    Registered { stream, client, destination, descriptors: _descriptors }: Registered,
) -> Result<(), ProxyError> {
    let acceptor = seat.acceptor.as_ref().ok_or(ProxyError::NoIdentity(destination))?;
    // Boxed: what a handshake needs is a multiple of what the tunnel needs after it.
    let mut tunnel = Box::pin(handshake(seat, acceptor, stream, client.ip())).await?;
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
    let resumed = tunnel.resumed();
    tracing::debug!(%client, peer = %peer.spiffe_id(), resumed, "tunnel accepted");
    let mut retirement = Retirement::new(seat.node(), &tunnel);
    while let Some(request) = retirement.next_request(seat.node(), &mut tunnel).await {
        let admitted = seat.admit_stream(client.ip(), Kind::Hbone.name());
        let asked = Asked { request, client, here: destination, peer: peer.clone() };
        tokio::spawn(seat.node().drain.track(serve_request(seat.clone(), asked, admitted)));
    }
    if let Some(limit) = tunnel.exceeded() {
        metrics::tunnel_closed(limit.code());
        tracing::info!(%client, peer = %peer.spiffe_id(), %limit, "tunnel closed: the peer exceeded a limit");
    }
    Ok(())
}

/// Handshakes with a client when it is its turn; the wait for that is part of the deadline.
async fn handshake(
    seat: &Seat,
    acceptor: &Acceptor,
    stream: TcpStream,
    client: IpAddr,
) -> Result<ServerTunnel, ProxyError> {
    let after = seat.node().timeouts.handshake;
    let deadline = Instant::now() + after;
    let turn = seat.node().limits.handshakes.admit(client, metrics::handshake_waits);
    let (limit, error) = match timeout_at(deadline, turn).await {
        Ok(Some(_under_way)) => {
            let _counted = metrics::handshake_under_way();
            let handshake = timeout_at(deadline, acceptor.accept(stream, after)).await;
            return handshake
                .unwrap_or(Err(HboneError::HandshakeTimeout { after }))
                .map_err(ProxyError::Tunnel);
        }
        Ok(None) => ("handshakes_per_source", ProxyError::TooManyHandshakes(client)),
        Err(_) => ("handshakes", ProxyError::HandshakeNotBegun { after }),
    };
    metrics::handshake_refused(limit);
    reset_on_close(&stream);
    Err(error)
}

/// A CONNECT request of `client`, who is `peer`, in a tunnel that ends at `here`.
struct Asked {
    request: Incoming,
    client: SocketAddr,
    here: SocketAddr,
    peer: PeerIdentity,
}

/// Serves one CONNECT request.
fn serve_request(
    seat: Arc<Seat>,
    asked: Asked,
    admitted: Result<(Place, Held), ProxyError>,
) -> impl Future<Output = ()> + Send {
    // Boxed, and no `async fn`: what connecting needs is a multiple of what the connection needs after it.
    let opening = Box::pin(open_request(seat.clone(), asked, admitted));
    async move {
        let Some((record, Opened { _held, mut revocation, client, app })) = opening.await else {
            return;
        };
        let flow = Flow::new(seat.node(), &record, &mut revocation);
        let outcome = flow.out_of_tunnel(client, &app).await;
        record.close(outcome);
    }
}

/// Connects to the application, answers, and opens the record of that, which is closed if it fails.
async fn open_request(
    seat: Arc<Seat>,
    asked: Asked,
    admitted: Result<(Place, Held), ProxyError>,
) -> Option<(ConnectionRecord, Opened<TunnelStream>)> {
    let Asked { request, client, here, peer } = &asked;
    let way = way(&seat, request.authority(), *here);
    let destination = way.as_ref().ok().map(|way| way.address);
    let mut record = open_record(&seat, *client, destination, Some(peer));
    record.service = way.as_ref().ok().and_then(|way| way.service.clone());
    record.hbone = Some(*here);
    record.claimed(request.headers());
    let admitted = admitted.and_then(|admitted| Ok((admitted, way?)));
    let opened = forward_request(&seat, asked, admitted, &mut record).await;
    record.or_close(opened)
}

async fn forward_request(
    seat: &Seat,
    Asked { mut request, client, peer, .. }: Asked,
    admitted: Result<((Place, Held), InboundTarget), ProxyError>,
    record: &mut ConnectionRecord,
) -> Result<Opened<TunnelStream>, ProxyError> {
    let connected = async {
        let ((place, descriptor), way) = admitted?;
        let connecting = pin!(connect(seat, client, &way, Some(&peer)));
        let connected = tokio::select! {
            connected = seat.node().drain.or_abort(connecting) => connected?,
            error = request.closed() => return Err(ProxyError::Tunnel(error)),
        };
        Ok((connected, place, descriptor))
    };
    let (Connected { app, permit, revocation }, place, descriptor) = match connected.await {
        Ok(connected) => connected,
        Err(error) => {
            // Nothing is said to a client that has gone.
            request.refuse(error.reason().status);
            return Err(error);
        }
    };
    record.established(&seat.worker.series);
    let accepted = request.accept(headers::response(record, &seat.context().own));
    let client = accepted.map_err(ProxyError::Tunnel)?;
    Ok(Opened { client, app, revocation, _held: (permit, place, descriptor) })
}

/// Where a request goes that came through a tunnel which ends at `here`.
fn way(seat: &Seat, authority: &Authority, here: SocketAddr) -> Result<InboundTarget, ProxyError> {
    let asked = match authority {
        Authority::Address(address) => Target::Address(*address),
        Authority::Name { host, port } => Target::Hostname(host.as_str().into(), *port),
    };
    let snapshot = seat.node().mesh.borrow();
    let own = &seat.context().own;
    let local = snapshot.local(own, here.ip()).map(|workload| &**workload);
    let namespace = local.map_or(&*own.namespace, |workload| &*workload.namespace);
    route::inbound(&asked, here, &snapshot.mesh, local, &own.network, namespace)
        .map_err(ProxyError::Route)
}

/// A connection to the application, and what must be held as long as it is open.
struct Connected {
    app: TcpStream,
    permit: Permit,
    revocation: Revocation,
}

/// Connects to the application, as `client` where that can be kept.
async fn connect(
    seat: &Seat,
    client: SocketAddr,
    way: &InboundTarget,
    peer: Option<&PeerIdentity>,
) -> Result<Connected, ProxyError> {
    let identity = peer.map(|peer| peer.spiffe_id());
    let subject = Subject::inbound(client, way.address, peer.map(Principal::from));
    let (permit, mut revocation) = seat.permit(subject)?;
    let app = revocation.or_end(pin!(reach(seat, client, way, &permit, identity))).await?;
    Ok(Connected { app, permit, revocation })
}

async fn reach(
    seat: &Seat,
    client: SocketAddr,
    way: &InboundTarget,
    permit: &Permit,
    identity: Option<&SpiffeId>,
) -> Result<TcpStream, ProxyError> {
    let deadline = seat.node().timeouts.connect;
    let Some(destination) = way.header else {
        return dial_workload(permit, client.ip(), deadline).await;
    };
    let mut app = dial_loopback(permit, deadline).await?;
    let header = proxy_protocol::header(client, destination, identity);
    app.write_all(&header).await.map_err(ProxyError::Upstream)?;
    Ok(app)
}

fn open_record(
    seat: &Seat,
    client: SocketAddr,
    destination: Option<SocketAddr>,
    peer: Option<&PeerIdentity>,
) -> ConnectionRecord {
    let snapshot = seat.node().mesh.borrow();
    let source = Party {
        address: Some(client),
        workload: snapshot.workload(client.ip()).cloned(),
        identity: peer.map(|peer| peer.spiffe_id().clone()),
    };
    let own = &seat.context().own;
    let local = destination.and_then(|address| snapshot.local(own, address.ip()));
    let destination = Party {
        address: destination,
        workload: local.cloned(),
        identity: peer.and_then(|_| seat.pod.identity()),
    };
    ConnectionRecord::new(Direction::Inbound, source, destination)
}
