//! Inbound connections: through a peer's tunnel, or caught in plain. Everything that can fail does so before the peer is
//! told 200; the application sees the client's own address where the profile's rules support it.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
use underpass_hbone::{Authority, Incoming, PeerIdentity, RequestHeaders, ServerTunnel};
use underpass_interception::reset_on_close;

use crate::accept::{Accepted, Registered};
use crate::copy::Flow;
use crate::dial::dial_workload;
use crate::error::ProxyError;
use crate::policy;
use crate::record::{ConnectionRecord, Direction, Party};
use crate::worker::Worker;
use crate::{headers, metrics};

/// Serves one connection that was caught in plain.
pub(crate) async fn serve_plaintext(worker: Arc<Worker>, accepted: Accepted) {
    let destination = accepted.destination.as_ref().ok().copied();
    let mut record = open_record(&worker, accepted.client, destination, None);
    let outcome = match accepted.register() {
        Ok(connection) => forward_plaintext(&worker, connection, &mut record).await,
        Err(error) => Err(error),
    };
    record.close(outcome);
}

async fn forward_plaintext(
    worker: &Worker,
    Registered { stream, client, destination }: Registered,
    record: &mut ConnectionRecord,
) -> Result<(), ProxyError> {
    let drain = &worker.shared.drain;
    match drain.or_abort(connect(worker, client, destination)).await {
        Ok(app) => {
            record.established();
            Flow { record, drain }.through_tcp(stream, app).await
        }
        Err(error) => {
            reset_on_close(&stream);
            Err(error)
        }
    }
}

/// Serves one peer's connection: the handshakes, then every CONNECT request that comes through it.
pub(crate) async fn serve_tunnel(worker: Arc<Worker>, accepted: Accepted) {
    let client = accepted.client;
    let destination = accepted.destination.as_ref().ok().copied();
    let outcome = match accepted.register() {
        Err(error) => Err(error),
        Ok(connection) => worker.shared.drain.or_abort(accept_tunnel(&worker, connection)).await,
    };
    if let Err(error) = outcome {
        let mut record = open_record(&worker, client, None, None);
        record.hbone = destination;
        record.close(Err(error));
    }
}

async fn accept_tunnel(
    worker: &Arc<Worker>,
    Registered { stream, client, destination }: Registered,
) -> Result<(), ProxyError> {
    let acceptor = worker.acceptor.as_ref().ok_or(ProxyError::NoIdentity(destination))?;
    let deadline = worker.shared.timeouts.handshake;
    let Some(admitted) = worker.shared.handshakes.admit(client.ip()) else {
        metrics::handshake_refused();
        reset_on_close(&stream);
        return Err(ProxyError::TooManyHandshakes(client.ip()));
    };
    // Boxed: what a handshake needs is a multiple of what the tunnel needs after it.
    let handshake = Box::pin(acceptor.accept(stream, deadline));
    let mut tunnel = handshake.await.map_err(ProxyError::Tunnel)?;
    drop(admitted);
    let _open = metrics::tunnel_open("inbound");
    let peer = tunnel.peer().clone();
    let resumed = tunnel.resumed();
    tracing::debug!(%client, peer = %peer.spiffe_id(), resumed, "tunnel accepted");
    let mut retirement = Retirement::new(worker, &tunnel);
    while let Some(request) = next_request(worker, &mut tunnel, &mut retirement).await {
        let load = worker.balance.load(worker.index);
        let (own, peer) = (worker.clone(), peer.clone());
        let stream = async move {
            let _load = load;
            serve_request(&own, request, client, destination, &peer).await;
        };
        tokio::spawn(worker.shared.drain.track(stream));
    }
    Ok(())
}

/// The next CONNECT request; once the proxy closes or the tunnel is too old, the peer is told to send no more (GOAWAY).
async fn next_request(
    worker: &Worker,
    tunnel: &mut ServerTunnel<TcpStream>,
    retirement: &mut Retirement,
) -> Option<Incoming> {
    loop {
        tokio::select! {
            request = tunnel.next() => return request,
            () = worker.shared.drain.closing() => break,
            () = &mut retirement.timer => if retirement.is_due(tunnel.open_streams()) { break },
        }
    }
    tunnel.drain();
    tunnel.next().await
}

/// When a tunnel takes no new streams any longer: once the first of both certificates has expired, or at the maximum age, at
/// which a peer like ours has let it go by itself.
///
/// A stock ztunnel fails a request that it opens while GOAWAY is on its way. So it is sent when no stream is open, when a new one
/// is least likely; only a tunnel that is never without one gets it in the middle of them, after another tenth of the age.
struct Retirement {
    timer: Pin<Box<Sleep>>,
    at_the_latest: Instant,
}

impl Retirement {
    /// How often a tunnel that is due is looked at.
    const LOOK: Duration = Duration::from_secs(1);

    fn new(worker: &Worker, tunnel: &ServerTunnel<TcpStream>) -> Self {
        let max_age = worker.shared.tunnels.max_age;
        let valid = tunnel.usable_until().duration_since(SystemTime::now()).unwrap_or_default();
        let due = Instant::now() + valid.min(max_age);
        Self { timer: Box::pin(sleep_until(due)), at_the_latest: due + max_age / 10 }
    }

    /// Asked when the timer has run out, which is set anew.
    fn is_due(&mut self, open_streams: usize) -> bool {
        let now = Instant::now();
        self.timer.as_mut().reset(now + Self::LOOK);
        open_streams == 0 || now >= self.at_the_latest
    }
}

/// Serves one CONNECT request of a tunnel that ends at `here`.
async fn serve_request(
    worker: &Worker,
    request: Incoming,
    client: SocketAddr,
    here: SocketAddr,
    peer: &PeerIdentity,
) {
    let target = target(request.authority(), here);
    let mut record = open_record(worker, client, target.as_ref().ok().copied(), Some(peer));
    record.hbone = Some(here);
    record.claimed(RequestHeaders::read(request.headers()));
    let outcome = forward_request(worker, request, client, target, &mut record).await;
    record.close(outcome);
}

async fn forward_request(
    worker: &Worker,
    request: Incoming,
    client: SocketAddr,
    target: Result<SocketAddr, ProxyError>,
    record: &mut ConnectionRecord,
) -> Result<(), ProxyError> {
    let drain = &worker.shared.drain;
    let connected = match target {
        Ok(target) => drain.or_abort(connect(worker, client, target)).await,
        Err(error) => Err(error),
    };
    let app = match connected {
        Ok(app) => app,
        Err(error) => {
            request.refuse(error.reason().status);
            return Err(error);
        }
    };
    record.established();
    match request.accept(headers::response(record, &worker.shared.workload)) {
        Ok(tunnel) => Flow { record, drain }.out_of_tunnel(tunnel, app).await,
        Err(error) => {
            reset_on_close(&app);
            Err(ProxyError::Tunnel(error))
        }
    }
}

/// What a request may reach: only this workload, at the address where its tunnel ends.
fn target(authority: &Authority, here: SocketAddr) -> Result<SocketAddr, ProxyError> {
    match authority {
        Authority::Address(target) if target.ip().to_canonical() == here.ip() => Ok(*target),
        other => Err(ProxyError::NotHere { asked: other.to_string(), here }),
    }
}

/// Connects to the application at `target`, as `client` where that can be kept.
async fn connect(
    worker: &Worker,
    client: SocketAddr,
    target: SocketAddr,
) -> Result<TcpStream, ProxyError> {
    let permit = policy::inbound(target, worker.shared.ports)?;
    let deadline = worker.shared.timeouts.connect;
    dial_workload(&worker.shared.sockets, &permit, client.ip(), deadline).await
}

fn open_record(
    worker: &Worker,
    client: SocketAddr,
    destination: Option<SocketAddr>,
    peer: Option<&PeerIdentity>,
) -> ConnectionRecord {
    let mesh = worker.shared.mesh.borrow();
    let workload = |address: SocketAddr| mesh.workload(address.ip()).cloned();
    let source = Party {
        address: Some(client),
        workload: workload(client),
        identity: peer.map(|peer| peer.spiffe_id().clone()),
    };
    let destination = Party {
        address: destination,
        workload: destination.and_then(workload),
        identity: peer.and_then(|_| worker.shared.identity()),
    };
    ConnectionRecord::new(Direction::Inbound, source, destination)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_reaches_nothing_but_the_address_where_it_ends() {
        let here: SocketAddr = "10.0.0.1:15008".parse().unwrap();
        let to = |authority: &str| target(&authority.parse().unwrap(), here);
        assert_eq!(to("10.0.0.1:8080").unwrap(), "10.0.0.1:8080".parse().unwrap());
        for elsewhere in ["10.0.0.2:8080", "127.0.0.1:8080", "[::1]:8080", "example.com:80"] {
            assert!(matches!(to(elsewhere), Err(ProxyError::NotHere { .. })), "{elsewhere}");
        }
    }
}
