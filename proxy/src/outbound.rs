//! Caught outbound connections: route, permit, then a tunnel to the peer or a plain connection, then copy.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;
use underpass_config::{Mesh, Workload};
use underpass_hbone::{ConnectRequest, TunnelKey, TunnelStream};
use underpass_interception::reset_on_close;

use crate::accept::{Accepted, Registered};
use crate::copy::Flow;
use crate::dial::dial;
use crate::error::ProxyError;
use crate::headers;
use crate::policy::{self, Permit};
use crate::record::{ConnectionRecord, Direction, Party};
use crate::route::{self, Route};
use crate::worker::Worker;

/// Serves one caught connection from its first to its last byte.
pub(crate) async fn serve(worker: Arc<Worker>, accepted: Accepted) {
    let mesh = worker.shared.mesh.borrow().clone();
    let source = Party {
        address: Some(accepted.client),
        workload: mesh.workload(accepted.client.ip()).cloned(),
        identity: None,
    };
    let destination =
        Party { address: accepted.destination.as_ref().ok().copied(), ..Party::default() };
    let mut record = ConnectionRecord::new(Direction::Outbound, source, destination);
    let outcome = match accepted.register() {
        Ok(connection) => forward(&worker, &mesh, connection, &mut record).await,
        Err(error) => Err(error),
    };
    record.close(outcome);
}

async fn forward(
    worker: &Worker,
    mesh: &Mesh,
    Registered { stream, destination, .. }: Registered,
    record: &mut ConnectionRecord,
) -> Result<(), ProxyError> {
    let drain = &worker.shared.drain;
    let route = route::outbound(destination, mesh, worker.shared.ports.hbone);
    record.destination.workload = route.workload().cloned();
    let onward = match drain.or_abort(connect(worker, &route, record)).await {
        Ok(onward) => onward,
        Err(error) => {
            // The application saw its connection open; only a reset tells it that nothing was on the other side.
            reset_on_close(&stream);
            return Err(error);
        }
    };
    record.established();
    let flow = Flow { record, drain };
    match onward {
        Onward::Tunnel(tunnel) => flow.into_tunnel(stream, tunnel).await,
        Onward::Plain(upstream) => flow.through_tcp(stream, upstream).await,
    }
}

/// What carries the bytes on.
enum Onward {
    Tunnel(TunnelStream),
    Plain(TcpStream),
}

async fn connect(
    worker: &Worker,
    route: &Route,
    record: &mut ConnectionRecord,
) -> Result<Onward, ProxyError> {
    let permit = policy::outbound(route, worker.shared.ports)?;
    match route {
        Route::Plain { .. } => {
            let deadline = worker.shared.timeouts.connect;
            dial(&worker.shared.sockets, &permit, deadline).await.map(Onward::Plain)
        }
        Route::Tunnel { workload, peer, .. } => {
            record.hbone = Some(*peer);
            record.source.identity = worker.shared.identity();
            record.destination.identity = Some(workload.identity.clone());
            tunnel(worker, &permit, *peer, workload, record).await.map(Onward::Tunnel)
        }
    }
}

async fn tunnel(
    worker: &Worker,
    permit: &Permit,
    peer: SocketAddr,
    workload: &Workload,
    record: &ConnectionRecord,
) -> Result<TunnelStream, ProxyError> {
    let identity = record.source.identity.clone().zip(worker.connector.as_ref());
    let (source, connector) = identity.ok_or(ProxyError::NoIdentity(peer))?;
    let key = TunnelKey { source, address: peer, peers: [workload.identity.clone()].into() };
    let headers = headers::request(record, &worker.shared.workload);
    let request = ConnectRequest { authority: permit.destination().to_string(), headers };
    worker.pool.connect(&key, connector, request).await.map_err(ProxyError::Tunnel)
}
