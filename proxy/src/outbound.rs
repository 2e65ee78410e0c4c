//! Caught outbound connections: route, permit, then a tunnel to the peer or a plain connection, then copy.
//!
//! Of a service's endpoints another is tried if one cannot be connected to: the application has sent nothing by then.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;
use underpass_config::{NetworkMode, Quoted, SpiffeId};
use underpass_hbone::{ConnectRequest, Connector, HboneError, TunnelKey, TunnelStream};

use crate::accept::{Registered, Source};
use crate::copy::{Flow, broken};
use crate::descriptors::Held;
use crate::dial::dial;
use crate::endpoint_health::OpenConnection;
use crate::error::ProxyError;
use crate::limits::Place;
use crate::live::Revocation;
use crate::node::{Assignment, Seat};
use crate::policy::{Outbound, Permit, Subject};
use crate::record::{ConnectionRecord, Direction, Party};
use crate::route::{self, Caller, EndpointKey, EndpointSelector, ForwardVia, Route, Target};
use crate::{headers, metrics};

/// How many endpoints of a service are tried for one connection.
const ATTEMPTS: usize = 3;
/// How long an endpoint may take while there is another to try. In it the kernel sends a SYN twice (after 1 s), so that one lost
/// packet ejects no endpoint.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves one caught connection from its first to its last byte.
pub(crate) fn serve(seat: Arc<Seat>, assignment: Assignment) -> impl Future<Output = ()> + Send {
    // Boxed, and no `async fn`: what connecting needs is a multiple of what the connection needs after it.
    let opening = Box::pin(open(seat.clone(), assignment));
    async move {
        // In this order, so that what is held is let go of when the connections are closed.
        let Some((mut record, Opened { _held, mut revocation, client, onward })) = opening.await
        else {
            return;
        };
        record.established(&seat.worker.series);
        let flow = Flow::new(seat.node(), &record, &mut revocation);
        let outcome = match onward {
            Onward::Tunnel(tunnel) => flow.into_tunnel(&client, tunnel).await,
            Onward::Plain(upstream) => flow.through_tcp(&client, &upstream).await,
        };
        record.close(outcome);
    }
}

/// Opens the way that a connection takes, and its record, which is closed if that fails.
async fn open(
    seat: Arc<Seat>,
    Assignment { accepted, place, .. }: Assignment,
) -> Option<(ConnectionRecord, Opened)> {
    let checked = accepted.check_source(&seat);
    let source = Party {
        address: Some(accepted.client),
        workload: seat
            .caller(&seat.node().mesh.borrow(), *checked.as_ref().unwrap_or(&Source::Other))
            .cloned(),
        identity: None,
    };
    let destination =
        Party { address: accepted.destination.as_ref().ok().copied(), ..Party::default() };
    let mut record = ConnectionRecord::new(Direction::Outbound, source, destination);
    let opened = match accepted.register(seat.context().ports) {
        Ok(connection) => match checked {
            Ok(source) => forward(&seat, connection, source, place, &mut record).await,
            Err(error) => {
                metrics::foreign_source();
                Err(error)
            }
        },
        Err(error) => Err(error),
    };
    record.or_close(opened)
}

async fn forward(
    seat: &Arc<Seat>,
    Registered { stream, client, destination, mut descriptors }: Registered,
    source: Source,
    place: Place,
    record: &mut ConnectionRecord,
) -> Result<Opened, ProxyError> {
    let call = Call { seat, client: client.ip(), source, asked: destination };
    let connecting = pin!(call.connect(record));
    let connected = tokio::select! {
        connected = seat.node().drain.or_abort(connecting) => connected?,
        // A FIN is no reason: what was sent before it is still to be delivered.
        error = broken(&stream) => return Err(ProxyError::Client(error)),
    };
    let Connected { onward, revocation, permit, load } = connected;
    if let Onward::Tunnel(_) = &onward {
        // The tunnel has its own.
        descriptors.release_one();
    }
    let held = (permit, load, place, descriptors);
    Ok(Opened { client: stream, onward, revocation, _held: held })
}

/// Both sides of a connection that was caught, and what must be held as long as it is open.
struct Opened {
    client: TcpStream,
    onward: Onward,
    revocation: Revocation,
    _held: (Permit, Vec<OpenConnection>, Place, Held),
}

/// What carries the bytes on.
enum Onward {
    Tunnel(TunnelStream),
    Plain(TcpStream),
}

/// A connection that is ready to carry bytes, and what must be held as long as it does.
struct Connected {
    onward: Onward,
    revocation: Revocation,
    permit: Permit,
    load: Vec<OpenConnection>,
}

/// A connection that wants to get somewhere.
struct Call<'a> {
    seat: &'a Arc<Seat>,
    client: IpAddr,
    source: Source,
    asked: SocketAddr,
}

impl Call<'_> {
    /// Connects, to another endpoint if one cannot be connected to and there is another.
    async fn connect(&self, record: &mut ConnectionRecord) -> Result<Connected, ProxyError> {
        let mut tried = Vec::new();
        let mut route = self.route(&tried)?;
        loop {
            let failed = match self.attempt(&route, &tried, record).await {
                Ok(connected) => return Ok(connected),
                Err(error) => error,
            };
            let Some(endpoint) = route.dialled().filter(|_| failed.is_of_endpoint()) else {
                return Err(failed);
            };
            self.eject(endpoint, &failed);
            tried.push(endpoint.clone());
            match self.route(&tried) {
                Ok(another) if tried.len() < ATTEMPTS => route = another,
                // Why there is nobody left is what went wrong with the last one.
                _ => return Err(failed),
            }
        }
    }

    /// The way there, past the endpoints that were tried.
    fn route(&self, tried: &[EndpointKey]) -> Result<Route, ProxyError> {
        let seat = self.seat;
        let (own, identity) = (&seat.context().own, seat.pod.identity());
        let snapshot = seat.node().mesh.borrow();
        let caller = Caller {
            network: &own.network,
            namespace: &own.namespace,
            workload: seat.caller(&snapshot, self.source).map(|workload| &**workload),
            address: self.client,
            identity: identity.as_ref(),
            hbone_port: seat.context().ports.hbone,
        };
        let mut choose = EndpointSelector { health: &seat.pod.endpoints, tried };
        route::outbound(self.asked, &snapshot.mesh, &caller, &mut choose).map_err(ProxyError::Route)
    }

    fn eject(&self, endpoint: &EndpointKey, failed: &ProxyError) {
        let seat = self.seat;
        let pause = seat.node().timeouts.ejection;
        metrics::endpoint_ejected();
        tracing::warn!(
            endpoint = %endpoint.uid, port = endpoint.port, error = %Quoted::chain(failed),
            "an endpoint is ejected for {} s", pause.as_secs_f32()
        );
        seat.pod.endpoints.eject(endpoint.clone(), pause);
    }

    /// Goes one way. As long as there is another one, this one may not take long.
    async fn attempt(
        &self,
        route: &Route,
        tried: &[EndpointKey],
        record: &mut ConnectionRecord,
    ) -> Result<Connected, ProxyError> {
        let seat = self.seat;
        let open = |endpoint: &EndpointKey| seat.pod.endpoints.open(endpoint.clone());
        let load: Vec<_> = route.endpoints().map(open).collect();
        // What an attempt before this one noted is no longer so.
        record.destination =
            Party { address: Some(self.asked), workload: route.workload.clone(), identity: None };
        record.service = route.service.clone();
        record.hbone = None;
        let mut going = pin!(self.go(route, record));
        let went = match route.dialled() {
            None => going.await,
            Some(endpoint) => match timeout(ATTEMPT_TIMEOUT, &mut going).await {
                Ok(went) => went,
                Err(_) if self.is_another(endpoint, tried) => Err(ProxyError::ConnectTimeout {
                    destination: self.asked,
                    after: ATTEMPT_TIMEOUT,
                }),
                Err(_) => going.await,
            },
        };
        let (onward, permit, revocation) = went?;
        route.endpoints().for_each(|endpoint| seat.pod.endpoints.restore(endpoint));
        Ok(Connected { onward, revocation, permit, load })
    }

    fn is_another(&self, endpoint: &EndpointKey, tried: &[EndpointKey]) -> bool {
        let tried = [tried, std::slice::from_ref(endpoint)].concat();
        tried.len() < ATTEMPTS && self.route(&tried).is_ok()
    }

    async fn go(
        &self,
        route: &Route,
        record: &mut ConnectionRecord,
    ) -> Result<(Onward, Permit, Revocation), ProxyError> {
        let (to, peers) = match &route.via {
            ForwardVia::Plain { to } => (to, None),
            ForwardVia::Tunnel { to, peers, .. } => (to, Some(peers.clone())),
            ForwardVia::DoubleTunnel { gateway, gateway_peers, .. } => {
                (gateway, Some(gateway_peers.clone()))
            }
        };
        let (resolver, deadline) = (&self.seat.node().resolver, self.seat.node().timeouts.connect);
        let hop = resolver.resolve(to, deadline).await.map_err(ProxyError::Resolve)?;
        let own_network = &*self.seat.context().own.network;
        let by_address = route.workload.as_ref().is_none_or(|workload| {
            &*workload.network == own_network && workload.network_mode == NetworkMode::Standard
        });
        let subject = Subject::Outbound(Outbound { asked: self.asked, hop, peers, by_address });
        let (permit, mut revocation) = self.seat.permit(subject)?;
        let onward = revocation.or_end(pin!(self.dial(route, &permit, record))).await?;
        Ok((onward, permit, revocation))
    }

    async fn dial(
        &self,
        route: &Route,
        permit: &Permit,
        record: &mut ConnectionRecord,
    ) -> Result<Onward, ProxyError> {
        let seat = self.seat;
        let hop = permit.destination();
        match &route.via {
            ForwardVia::Plain { .. } => {
                record.destination.address = Some(hop);
                dial(permit, seat.node().timeouts.connect).await.map(Onward::Plain)
            }
            ForwardVia::Tunnel { peers, authority, .. } => {
                let target = authority.at(hop.ip());
                self.tell_tunnel(hop, &target, record);
                let tunnel = self.tunnel(permit, peers, &target, record).await?;
                Ok(Onward::Tunnel(told(tunnel, record)))
            }
            ForwardVia::DoubleTunnel { gateway_peers, peers, authority, .. } => {
                self.tell_tunnel(hop, authority, record);
                // Boxed: it has a handshake of its own, and every other connection would have to bear what that needs.
                let through = self.through(permit, gateway_peers, peers, authority, record);
                Ok(Onward::Tunnel(told(Box::pin(through).await?, record)))
            }
        }
    }

    /// Notes what is known of a tunnel before it is there.
    fn tell_tunnel(&self, hop: SocketAddr, target: &Target, record: &mut ConnectionRecord) {
        record.hbone = Some(hop);
        record.source.identity = self.seat.pod.identity();
        let demanded = record.destination.workload.as_ref();
        record.destination.identity = demanded.map(|workload| workload.identity.clone());
        if let Target::Address(address) = target {
            record.destination.address = Some(*address);
        }
    }

    /// A stream of a pooled tunnel to where `permit` says.
    async fn tunnel(
        &self,
        permit: &Permit,
        peers: &Arc<[SpiffeId]>,
        authority: &Target,
        record: &ConnectionRecord,
    ) -> Result<TunnelStream, ProxyError> {
        let (key, connector) = self.key(permit, peers, record)?;
        let own = &self.seat.context().own;
        let request = || ConnectRequest {
            authority: authority.to_string(),
            headers: headers::request(record, own),
        };
        let connected = self.seat.pool.connect(&key, connector, request).await;
        connected.map_err(|error| self.tunnel_failed(error))
    }

    /// A tunnel to one of `peers`, through a stream to the gateway that is where `permit` says.
    async fn through(
        &self,
        permit: &Permit,
        gateway_peers: &Arc<[SpiffeId]>,
        peers: &[SpiffeId],
        authority: &Target,
        record: &ConnectionRecord,
    ) -> Result<TunnelStream, ProxyError> {
        let (key, connector) = self.key(permit, gateway_peers, record)?;
        let own = &self.seat.context().own;
        let request = |headers| ConnectRequest { authority: authority.to_string(), headers };
        let outer = || request(headers::request(record, own));
        let inner = || request(headers::request_from_network(record, own));
        let connecting = self.seat.pool.connect_through(&key, connector, outer, peers, inner);
        connecting.await.map_err(|error| self.tunnel_failed(error))
    }

    fn tunnel_failed(&self, error: HboneError) -> ProxyError {
        self.seat.keep_after_failure();
        ProxyError::tunnel(error)
    }

    /// Which pooled tunnel, and what opens it if there is none.
    fn key(
        &self,
        permit: &Permit,
        peers: &Arc<[SpiffeId]>,
        record: &ConnectionRecord,
    ) -> Result<(TunnelKey, &Connector), ProxyError> {
        let address = permit.destination();
        let identity = record.source.identity.clone().zip(self.seat.connector.as_ref());
        let (source, connector) = identity.ok_or(ProxyError::NoIdentity(address))?;
        Ok((TunnelKey { source, address, peers: peers.clone() }, connector))
    }
}

/// Notes who is at the end of the tunnel, which may be one of several.
fn told(tunnel: TunnelStream, record: &mut ConnectionRecord) -> TunnelStream {
    record.destination.identity = Some(tunnel.peer().spiffe_id().clone());
    tunnel
}
