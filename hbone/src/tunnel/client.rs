//! The client of a tunnel: one TLS and HTTP/2 connection, and CONNECT requests on it.
//!
//! `pool` dials and selects tunnels; `probe` checks a peer without a stream.

mod probe;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt as _;
use h2::client::{Connection, SendRequest};
use http::uri::{self, Uri};
use http::{HeaderMap, Method, Request, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use underpass_config::{Cipher, Quoted, SpiffeId};

use crate::crypto::provider;
use crate::error::HboneError;
use crate::identity::credentials::Credentials;
use crate::task::log_panic;
use crate::tls::{ClientTls, Peer, PeerIdentity, TlsStream};
use crate::trust::revocation::RevocationMonitor;
use crate::tunnel::inspect::{Inspector, PeerRole};
use crate::tunnel::io::{Io, transport};
use crate::tunnel::keepalive::Keepalive;
use crate::tunnel::overdue::Overdue;
use crate::tunnel::settings::{ClientSettings, MAX_FRAME_SIZE, SMALL_FRAME_BUDGET};
use crate::tunnel::stream::{TunnelReader, TunnelStream};
use crate::tunnel::tunnel_state::{Monitored, OpenStream, TunnelState, Windows};

/// Opens tunnels with the current [`Credentials`]. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Connector {
    credentials: watch::Receiver<Credentials>,
    is_anonymous: bool,
    settings: ClientSettings,
}

/// A connection to an authenticated server. Clones share it. It closes when its last clone and its
/// last stream are dropped, or when the connection is lost.
#[derive(Debug, Clone)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    tunnel_state: Arc<TunnelState>,
    resumed: bool,
    /// True if a certificate had expired before the handshake. The server then refuses ours, and
    /// its alert is more specific than our own check.
    was_expired: bool,
}

/// The contents of a CONNECT request.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// The destination: `ADDRESS:PORT` or `NAME:PORT`.
    pub authority: String,
    /// Additional headers.
    pub headers: HeaderMap,
}

impl Connector {
    /// Creates a connector. Each tunnel uses the `credentials` that are current when it is opened.
    pub fn new(credentials: watch::Receiver<Credentials>, settings: ClientSettings) -> Self {
        Self { credentials, is_anonymous: false, settings }
    }

    /// Creates a connector that presents no certificate, to test that servers refuse it. It
    /// verifies servers by the trust of `credentials`.
    pub fn anonymous(credentials: watch::Receiver<Credentials>, settings: ClientSettings) -> Self {
        Self { credentials, is_anonymous: true, settings }
    }

    /// Performs a handshake over `io` with the server at `address`, which must have one of the
    /// `expected` identities. Spawns a task that drives the connection, and ends it when later
    /// credentials no longer trust the server.
    ///
    /// TLS resumes a session only for the same `address` and `expected`, so pass the same values
    /// for the same server.
    ///
    /// In TLS 1.3 the client's handshake ends first: if the server refuses our certificate, the
    /// first request returns the error.
    ///
    /// # Errors
    /// [`HboneError::HandshakeTimeout`] after `deadline`; otherwise the error of TLS or of the
    /// peer's identity.
    pub async fn open<T>(
        &self,
        io: T,
        address: SocketAddr,
        expected: &[SpiffeId],
        deadline: Duration,
    ) -> Result<Tunnel, HboneError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
    {
        let handshake = self.handshake(transport(io), address, expected, None);
        within(deadline, handshake).await
    }

    /// Like [`open`](Self::open), for an inner tunnel with one stream. It also ends when the outer
    /// tunnel's peer is no longer trusted.
    pub(crate) async fn open_inside(
        &self,
        carrier: TunnelStream,
        address: SocketAddr,
        expected: &[SpiffeId],
        deadline: Duration,
    ) -> Result<Tunnel, HboneError> {
        let (io, open) = carrier.into_carrier();
        let handshake = self.handshake(transport(io), address, expected, Some(open));
        let tunnel = within(deadline, handshake).await?;
        // Release the tunnel, so that it closes with its stream. Keepalive also monitors a closing
        // tunnel.
        tunnel.tunnel_state.release();
        Ok(tunnel)
    }

    async fn handshake(
        &self,
        io: Io,
        address: SocketAddr,
        expected: &[SpiffeId],
        carrier: Option<Arc<OpenStream>>,
    ) -> Result<Tunnel, HboneError> {
        // Subscribe before the handshake, so that the monitor observes all later changes.
        let mut credentials = self.credentials.clone();
        let current = credentials.borrow_and_update().clone();
        let began = Instant::now();
        let (stream, peer) = self.tls(&current, io, address, expected).await?;
        let usable_until = peer.expires.min(current.identity().expires());
        let tunnel_state = TunnelState::new(peer.identity.clone(), began, usable_until);
        let resumed = peer.resumed;
        let revocation_monitor =
            RevocationMonitor::new(credentials, current.authorities().clone(), peer, carrier);
        let http2 = &self.settings.http2;
        let inspector = Inspector::new(PeerRole::Server, http2.max_header_list);
        let (send, mut connection) = h2::client::Builder::new()
            .initial_window_size(http2.stream_window)
            .initial_connection_window_size(http2.connection_window)
            .max_frame_size(MAX_FRAME_SIZE)
            .max_header_list_size(http2.max_header_list)
            .max_send_buffer_size(http2.send_buffer)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .enable_push(false)
            .handshake(Monitored::new(stream, tunnel_state.clone(), inspector))
            .await
            .map_err(|error| tunnel_state.stream_error(error))?;
        let keepalive = Keepalive::new(
            self.settings.keepalive.clone(),
            tunnel_state.clone(),
            connection.ping_pong(),
        );
        let windows = Windows::new(http2);
        let overdue = Overdue::new(tunnel_state.clone(), self.settings.frame_timeout);
        let monitors = Monitors { keepalive, revocation_monitor, windows, overdue };
        let driving = log_panic("tunnel", drive(connection, monitors, tunnel_state.clone()));
        let driven = tunnel_state.clone();
        tokio::spawn(driving.map(move |()| driven.close()));
        let was_expired = tunnel_state.is_expired();
        Ok(Tunnel { send, tunnel_state, resumed, was_expired })
    }

    async fn tls(
        &self,
        credentials: &Credentials,
        io: Io,
        address: SocketAddr,
        expected: &[SpiffeId],
    ) -> Result<(TlsStream<Io>, Peer), HboneError> {
        if self.is_anonymous {
            let authorities = credentials.authorities().clone();
            let provider = provider(&Cipher::ALL);
            let tls = ClientTls::anonymous(credentials.identity(), authorities, provider)?;
            return tls.connect(io, address, expected).await;
        }
        credentials.client().connect(io, address, expected).await
    }
}

impl Tunnel {
    /// Requests a stream to `request.authority` from the peer.
    ///
    /// # Errors
    /// [`HboneError::Refused`] for any status but 200, [`HboneError::ReplyTimeout`] after `reply`,
    /// or the error that ended the stream or connection.
    pub async fn connect(
        &self,
        request: ConnectRequest,
        reply: Duration,
    ) -> Result<TunnelStream, HboneError> {
        self.connect_reserved(|| request, reply, self.tunnel_state.open_stream()).await
    }

    /// Returns true if no new stream can be opened: the connection ended, or the peer sent GOAWAY.
    pub fn is_closed(&self) -> bool {
        let ready = self.send.clone().poll_ready(&mut Context::from_waker(Waker::noop()));
        self.tunnel_state.is_closed() || matches!(ready, Poll::Ready(Err(_)))
    }

    /// The number of streams that are open or being opened.
    pub fn open_streams(&self) -> usize {
        self.tunnel_state.open_streams()
    }

    /// The identity of the server.
    pub fn peer(&self) -> &PeerIdentity {
        self.tunnel_state.peer()
    }

    /// The earlier expiry of both certificates. Open streams may continue after it, new ones may
    /// not start.
    pub fn usable_until(&self) -> SystemTime {
        self.tunnel_state.usable_until()
    }

    /// Returns true if the handshake resumed a session.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    pub(crate) fn tunnel_state(&self) -> &Arc<TunnelState> {
        &self.tunnel_state
    }

    /// The maximum number of concurrent streams that the peer allows. `None` until the peer sets
    /// one.
    pub(crate) fn allowed_streams(&self) -> Option<usize> {
        // h2 returns this value before the peer's SETTINGS arrive, or if they contain no limit.
        Some(self.send.current_max_send_streams()).filter(|allowed| *allowed != usize::MAX)
    }

    pub(crate) async fn connect_reserved(
        &self,
        request: impl FnOnce() -> ConnectRequest,
        reply: Duration,
        open: OpenStream,
    ) -> Result<TunnelStream, HboneError> {
        timeout(reply, self.exchange(request, open))
            .await
            .unwrap_or(Err(HboneError::ReplyTimeout { after: reply }))
    }

    async fn exchange(
        &self,
        request: impl FnOnce() -> ConnectRequest,
        open: OpenStream,
    ) -> Result<TunnelStream, HboneError> {
        let failed = |error| self.tunnel_state.stream_error(error);
        let mut ready = self.send.clone().ready().await.map_err(failed)?;
        // Check after waiting for the peer's stream limit: the wait may have been long.
        if self.tunnel_state.is_expired() && !self.was_expired {
            return Err(HboneError::TunnelExpired { expired: self.tunnel_state.usable_until() });
        }
        // Create the request after the wait, so that waiting streams hold no request.
        let (response, send) = ready.send_request(head(request())?, false).map_err(failed)?;
        drop(ready);
        self.tunnel_state.activity().count_useful(0);
        let response = response.await.map_err(failed)?;
        match response.status() {
            StatusCode::OK => {
                Ok(TunnelStream::new(send, TunnelReader::new(response.into_body(), open)))
            }
            status => Err(HboneError::Refused { status }),
        }
    }
}

async fn within<T>(
    deadline: Duration,
    handshake: impl Future<Output = Result<T, HboneError>>,
) -> Result<T, HboneError> {
    timeout(deadline, handshake)
        .await
        .unwrap_or(Err(HboneError::HandshakeTimeout { after: deadline }))
}

/// RFC 9113 section 8.5: CONNECT has `:method` and `:authority`, but neither `:scheme` nor `:path`.
fn head(connect: ConnectRequest) -> Result<Request<()>, HboneError> {
    let ConnectRequest { authority, headers } = connect;
    let invalid = |authority: String| HboneError::InvalidAuthority { authority: authority.into() };
    let mut parts = uri::Parts::default();
    parts.authority = Some(authority.parse().map_err(|_| invalid(authority.clone()))?);
    let uri = Uri::from_parts(parts).map_err(|_| invalid(authority))?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    Ok(request)
}

/// The monitors of a connection: keepalive, revocation, flow-control windows, unfinished frames.
struct Monitors {
    keepalive: Option<Keepalive>,
    revocation_monitor: RevocationMonitor,
    windows: Windows,
    overdue: Overdue,
}

async fn drive(
    mut connection: Connection<Monitored<TlsStream<Io>>>,
    Monitors { mut keepalive, mut revocation_monitor, mut windows, mut overdue }: Monitors,
    tunnel_state: Arc<TunnelState>,
) {
    let ended = poll_fn(|cx| {
        // Poll this first: if the outer tunnel is revoked, the connection fails too, and would hide
        // the reason.
        if let Poll::Ready(reason) = revocation_monitor.poll_distrusted(cx) {
            tunnel_state.revoke(reason.clone());
            return Poll::Ready(Err(reason));
        }
        loop {
            if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(ended.map_err(|error| tunnel_state.stream_error(error)));
            }
            let set = |window| connection.set_initial_window_size(window);
            if !windows.adjust(&tunnel_state, set) {
                break;
            }
        }
        let needed = tunnel_state.is_needed();
        if let Poll::Ready(exceeded) = overdue.poll_exceeded(cx, tunnel_state.open_streams() > 0) {
            return Poll::Ready(Err(HboneError::PeerLimit { limit: exceeded }));
        }
        match keepalive.as_mut().map(|keepalive| keepalive.poll_dead(cx, needed)) {
            Some(Poll::Ready(dead)) => Poll::Ready(Err(dead)),
            _ => Poll::Pending,
        }
    })
    .await;
    if let Err(reason) = ended {
        let peer = tunnel_state.peer().spiffe_id();
        tracing::debug!(%peer, error = %Quoted::chain(&reason), "tunnel ended");
        // Set the reason before dropping the connection, which wakes its streams.
        tunnel_state.fail(reason);
    }
}

#[cfg(test)]
mod tests;
