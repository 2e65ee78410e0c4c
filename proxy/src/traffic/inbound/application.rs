//! Connects an inbound connection to its application, if a permit allows it.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use underpass_config::{Policy, SpiffeId};
use underpass_hbone::PeerIdentity;

use crate::decide::connection_registry::Registration;
use crate::decide::policy::Permit;
use crate::decide::route::InboundTarget;
use crate::decide::subject::{Decision, Principal, Subject};
use crate::error::ProxyError;
use crate::node::worker::seat::Seat;
use crate::observe::trace::{Spans, StepKind};
use crate::traffic::dial::{dial_loopback, dial_workload};
use crate::traffic::proxy_protocol;

/// A connection to the application, and the ALLOW policy that matches, if there are any.
pub(super) type Connected = (TcpStream, Option<Arc<Policy>>);

/// Connects to the application, from the client's address if the profile supports it.
pub(super) async fn connect(
    seat: &Seat,
    registration: &Registration<Decision>,
    client: SocketAddr,
    target: &InboundTarget,
    peer: Option<&PeerIdentity>,
    spans: &Spans,
) -> Result<Connected, ProxyError> {
    let identity = peer.map(|peer| peer.spiffe_id());
    let subject = Subject::inbound(client, target.address, peer.map(Principal::from));
    let began = spans.begin();
    let permit = seat.permit(subject, registration);
    spans.end(StepKind::Policy, began, &permit);
    let (permit, began) = (permit?, spans.begin());
    let dialled = dial_app(seat, client, target, &permit, identity).await;
    spans.end(StepKind::Connect, began, &dialled);
    Ok((dialled?, permit.policy().cloned()))
}

/// Dials the application, and sends a PROXY header if the route has one.
async fn dial_app(
    seat: &Seat,
    client: SocketAddr,
    target: &InboundTarget,
    permit: &Permit<'_>,
    identity: Option<&SpiffeId>,
) -> Result<TcpStream, ProxyError> {
    let deadline = seat.node().timeouts.connect;
    let Some(destination) = target.header else {
        return dial_workload(permit, client.ip(), deadline).await;
    };
    let mut app = dial_loopback(permit, deadline).await?;
    let header = proxy_protocol::header(client, destination, identity);
    app.write_all(&header).await.map_err(ProxyError::Upstream)?;
    Ok(app)
}
