//! The server of a tunnel: mutual TLS, then CONNECT requests to accept or refuse.
//!
//! The caller listens and authorizes.

mod drain;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream, ext};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use underpass_config::Quoted;

use self::drain::{Drain, Refusals};
use crate::error::HboneError;
use crate::identity::credentials::Credentials;
use crate::limits::log_limit::LogLimit;
use crate::tls::{PeerIdentity, TlsStream};
use crate::trust::revocation::RevocationMonitor;
use crate::tunnel::authority::Authority;
use crate::tunnel::inspect::{Inspector, PeerRole, TunnelLimit};
use crate::tunnel::io::{Io, transport};
use crate::tunnel::keepalive::Keepalive;
use crate::tunnel::overdue::Overdue;
use crate::tunnel::settings::{MAX_FRAME_SIZE, SMALL_FRAME_BUDGET, ServerSettings};
use crate::tunnel::stream::{TunnelReader, TunnelStream};
use crate::tunnel::tunnel_state::{Monitored, TunnelState, Windows};

/// Accepts tunnels with the current [`Credentials`]. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Acceptor {
    credentials: watch::Receiver<Credentials>,
    settings: ServerSettings,
}

/// A connection from an authenticated client. Dropping it aborts its streams.
#[derive(Debug)]
pub struct ServerTunnel {
    /// `None` once the connection has ended.
    connection: Option<Connection<Monitored<TlsStream<Io>>, Bytes>>,
    keepalive: Option<Keepalive>,
    revocation_monitor: RevocationMonitor,
    windows: Windows,
    overdue: Overdue,
    drain: Option<Drain>,
    refusals: Refusals,
    tunnel_state: Arc<TunnelState>,
    resumed: bool,
}

/// A CONNECT request that is not answered yet. Dropping it resets the stream.
#[derive(Debug)]
pub struct Incoming {
    authority: Authority,
    headers: HeaderMap,
    reader: TunnelReader,
    respond: SendResponse<Bytes>,
}

impl Acceptor {
    /// Creates an acceptor. Each tunnel uses the `credentials` that are current when it is
    /// accepted.
    pub fn new(credentials: watch::Receiver<Credentials>, settings: ServerSettings) -> Self {
        Self { credentials, settings }
    }

    /// Performs a handshake over `io`. The client's trust domain must have known roots. The tunnel
    /// ends when later credentials no longer trust the client.
    ///
    /// # Errors
    /// [`HboneError::HandshakeTimeout`] after `deadline`; otherwise the error of TLS or of the
    /// peer's identity.
    pub async fn accept<T>(&self, io: T, deadline: Duration) -> Result<ServerTunnel, HboneError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
    {
        timeout(deadline, self.handshake(transport(io)))
            .await
            .unwrap_or(Err(HboneError::HandshakeTimeout { after: deadline }))
    }

    async fn handshake(&self, io: Io) -> Result<ServerTunnel, HboneError> {
        // Subscribe before the handshake, so that the monitor observes all later changes.
        let mut credentials = self.credentials.clone();
        let current = credentials.borrow_and_update().clone();
        let began = Instant::now();
        let (stream, peer) = current.server().accept(io).await?;
        let usable_until = peer.expires.min(current.identity().expires());
        let tunnel_state = TunnelState::new(peer.identity.clone(), began, usable_until);
        let resumed = peer.resumed;
        let revocation_monitor =
            RevocationMonitor::new(credentials, current.authorities().clone(), peer, None);
        let http2 = &self.settings.http2;
        let inspector = Inspector::new(PeerRole::Client, http2.max_header_list);
        let mut connection = h2::server::Builder::new()
            .initial_window_size(http2.stream_window)
            .initial_connection_window_size(http2.connection_window)
            .max_frame_size(MAX_FRAME_SIZE)
            .max_header_list_size(http2.max_header_list)
            .max_send_buffer_size(http2.send_buffer)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .max_concurrent_streams(self.settings.max_streams)
            .handshake(Monitored::new(stream, tunnel_state.clone(), inspector))
            .await
            .map_err(|error| tunnel_state.stream_error(error))?;
        let keepalive = Keepalive::new(
            self.settings.keepalive.clone(),
            tunnel_state.clone(),
            connection.ping_pong(),
        );
        Ok(ServerTunnel {
            connection: Some(connection),
            keepalive,
            revocation_monitor,
            windows: Windows::new(http2),
            overdue: Overdue::new(tunnel_state.clone(), self.settings.frame_timeout),
            drain: None,
            refusals: Refusals::default(),
            tunnel_state,
            resumed,
        })
    }
}

impl ServerTunnel {
    /// The identity of the client.
    pub fn peer(&self) -> &PeerIdentity {
        self.tunnel_state.peer()
    }

    /// The start and the end of the TLS handshake.
    pub fn handshake(&self) -> [Instant; 2] {
        self.tunnel_state.handshake()
    }

    /// The earlier expiry of both certificates.
    pub fn usable_until(&self) -> SystemTime {
        self.tunnel_state.usable_until()
    }

    /// Returns true if the handshake resumed a session.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// The number of open streams.
    pub fn open_streams(&self) -> usize {
        self.tunnel_state.open_streams()
    }

    /// The time since the last stream ended. `None` while a stream is open. A refused request does
    /// not count as a stream.
    pub fn idle(&self) -> Option<Duration> {
        self.tunnel_state.idle_since().map(|since| since.elapsed())
    }

    /// The limit that the client exceeded, if that ended the tunnel.
    pub fn exceeded(&self) -> Option<TunnelLimit> {
        self.tunnel_state.exceeded()
    }

    /// Waits for the next request. `None` when the connection ends. Cancel-safe.
    ///
    /// Also drives the accepted streams: call it while any of them is open. Answers a request other
    /// than CONNECT, or without a valid authority, with 400. Resets a request with REFUSED_STREAM
    /// if a certificate has expired, or if it arrives long after [`ServerTunnel::drain`].
    pub async fn next(&mut self) -> Option<Incoming> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Sends GOAWAY: the client opens no more streams. Open streams continue, then
    /// [`ServerTunnel::next`] returns `None`. If the client does not acknowledge GOAWAY in time,
    /// its new streams are refused, and the tunnel ends with its last stream.
    pub fn drain(&mut self) {
        if let Some(connection) = &mut self.connection {
            self.drain.get_or_insert_with(Drain::new);
            connection.graceful_shutdown();
        }
    }

    /// Ends the tunnel before its first request. Sends GOAWAY(ENHANCE_YOUR_CALM) without waiting
    /// for the client to read.
    pub async fn refuse(mut self) {
        poll_fn(|cx| {
            self.shut_down(cx, Reason::ENHANCE_YOUR_CALM);
            Poll::Ready(())
        })
        .await;
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Incoming>> {
        // Poll this first: a peer that sends requests without pause must be terminated too.
        if let Poll::Ready(reason) = self.revocation_monitor.poll_distrusted(cx) {
            self.tunnel_state.revoke(reason.clone());
            return self.end(Some(reason));
        }
        if let Poll::Ready(next) = self.poll_connection(cx) {
            return Poll::Ready(next);
        }
        let has_streams = self.connection.as_ref().is_some_and(Connection::has_streams);
        if let Poll::Ready(limit) = self.overdue.poll_exceeded(cx, has_streams) {
            let exceeded = HboneError::PeerLimit { limit };
            // Set the reason before GOAWAY, which wakes the streams.
            self.tunnel_state.fail(exceeded.clone());
            self.shut_down(cx, limit.reason());
            return self.end(Some(exceeded));
        }
        if self.drain.as_mut().is_some_and(|drain| drain.poll_over(cx, has_streams).is_ready()) {
            self.shut_down(cx, Reason::NO_ERROR);
            return self.end(None);
        }
        let needed = self.drain.is_some() || has_streams;
        match self.keepalive.as_mut().map(|keepalive| keepalive.poll_dead(cx, needed)) {
            Some(Poll::Ready(dead)) => self.end(Some(dead)),
            _ => Poll::Pending,
        }
    }

    /// Drives the connection. Ready with a request, or with `None` at the end of the connection.
    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<Option<Incoming>> {
        loop {
            let Some(connection) = &mut self.connection else {
                return Poll::Ready(None);
            };
            let accepted = pin!(connection.accept()).poll(cx);
            let Poll::Ready(accepted) = accepted else {
                let set = |window| connection.set_initial_window_size(window);
                if self.windows.adjust(&self.tunnel_state, set) || self.check_refusals() {
                    continue;
                }
                return Poll::Pending;
            };
            match accepted {
                Some(Ok((_, mut respond))) if self.refuses_streams() => {
                    respond.send_reset(Reason::REFUSED_STREAM);
                    self.tunnel_state.activity().count_refused();
                }
                Some(Ok((request, respond))) => {
                    if let Some(incoming) = Incoming::new(request, respond, &self.tunnel_state) {
                        return Poll::Ready(Some(incoming));
                    }
                }
                Some(Err(error)) => {
                    let reason = self.tunnel_state.stream_error(error);
                    return self.end(Some(reason));
                }
                None => return self.end(None),
            }
        }
    }

    fn refuses_streams(&self) -> bool {
        self.tunnel_state.is_expired() || self.drain.as_ref().is_some_and(|drain| drain.is_overdue)
    }

    /// Drains a tunnel with too many refused requests, and closes it if they continue. Returns true
    /// if the drain starts: the caller must send GOAWAY.
    fn check_refusals(&mut self) -> bool {
        if self.refusals.are_within_limit(&self.tunnel_state) {
            return false;
        }
        if self.drain.is_some() {
            self.tunnel_state.exceed(TunnelLimit::RefusedRequests);
            return false;
        }
        let peer = self.tunnel_state.peer().spiffe_id();
        tracing::debug!(%peer, "the tunnel is drained: too many of its requests were refused");
        self.refusals.restart(&self.tunnel_state);
        self.drain();
        true
    }

    /// Sends GOAWAY without waiting for the client to read.
    fn shut_down(&mut self, cx: &mut Context<'_>, code: Reason) {
        if let Some(connection) = &mut self.connection {
            connection.abrupt_shutdown(code);
            let _flushed = connection.poll_closed(cx);
        }
    }

    fn end(&mut self, reason: Option<HboneError>) -> Poll<Option<Incoming>> {
        if let Some(reason) = reason {
            log_end(&reason, &self.tunnel_state);
            // Set the reason before dropping the connection, which wakes its streams.
            self.tunnel_state.fail(reason);
        }
        self.connection = None;
        Poll::Ready(None)
    }
}

impl Incoming {
    /// Returns `None` if the request is invalid; it was answered with 400.
    fn new(
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        tunnel_state: &Arc<TunnelState>,
    ) -> Option<Self> {
        let authority = match destination(&request) {
            Ok(authority) => authority,
            Err(reason) => {
                tunnel_state.activity().count_refused();
                log_malformed(&request, reason, tunnel_state);
                answer_and_end(&mut respond, StatusCode::BAD_REQUEST);
                return None;
            }
        };
        let (head, recv) = request.into_parts();
        let reader = TunnelReader::new(recv, tunnel_state.unopened_stream());
        Some(Self { authority, headers: head.headers, reader, respond })
    }

    /// The requested destination.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The headers of the request, which are unverified claims of the client.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The identity of the client.
    pub fn peer(&self) -> &PeerIdentity {
        self.reader.tunnel_state().peer()
    }

    /// Waits until the client resets the request or the connection ends. Callers that delay the
    /// answer use it. Cancel-safe.
    pub async fn closed(&mut self) -> HboneError {
        poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// Accepts the request with status 200 and `headers`. After that the stream carries raw bytes.
    ///
    /// # Errors
    /// The error that ended the stream or connection.
    pub fn accept(mut self, headers: HeaderMap) -> Result<TunnelStream, HboneError> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let sent = self.respond.send_response(response, false);
        let send = sent.map_err(|error| self.closing_error(error))?;
        Ok(TunnelStream::new(send, self.reader))
    }

    /// Refuses the request with `status`. If a client causes too many 4xx statuses, its tunnel is
    /// drained.
    pub fn refuse(mut self, status: StatusCode) {
        if status.is_client_error() {
            self.reader.tunnel_state().activity().count_refused();
        }
        answer_and_end(&mut self.respond, status);
    }

    /// The reason why the stream is closed. h2 returns only that it is closed.
    fn closing_error(&mut self, error: h2::Error) -> HboneError {
        match self.poll_closed(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(reason) => reason,
            Poll::Pending => self.reader.tunnel_state().stream_error(error),
        }
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<HboneError> {
        self.respond.poll_reset(cx).map(|closed| match closed {
            Ok(reason) => HboneError::Reset { reason },
            Err(error) => self.reader.tunnel_state().stream_error(error),
        })
    }
}

/// Parses the destination of a CONNECT request. The error is the reason for a refusal.
fn destination(request: &Request<RecvStream>) -> Result<Authority, &'static str> {
    if request.method() != Method::CONNECT {
        return Err("the method is not CONNECT");
    }
    if request.extensions().get::<ext::Protocol>().is_some() {
        return Err("extended CONNECT (RFC 8441) is not supported");
    }
    let authority = request.uri().authority().ok_or("there is no authority")?;
    let authority = authority.as_str().parse();
    authority.map_err(|_| "the authority is not ADDRESS:PORT or NAME:PORT")
}

fn log_malformed(request: &Request<RecvStream>, reason: &'static str, tunnel_state: &TunnelState) {
    static LIMIT: LogLimit = LogLimit::new("malformed requests");
    if LIMIT.admit(reason) {
        let peer = tunnel_state.peer().spiffe_id();
        let method = Quoted::new(request.method());
        let authority = Quoted::new(request.uri().authority().map_or("", |text| text.as_str()));
        tracing::warn!(%peer, %method, %authority, reason, "malformed request answered with 400");
    }
}

/// Logs violations of HTTP/2 as warnings, and other ends of connections at debug level.
fn log_end(reason: &HboneError, tunnel_state: &TunnelState) {
    static LIMIT: LogLimit = LogLimit::new("tunnels that failed");
    let peer = tunnel_state.peer().spiffe_id();
    // The peer chooses the debug data of its GOAWAY, so quote it.
    let error = || Quoted::chain(reason);
    if !is_violation(reason) {
        tracing::debug!(%peer, error = %error(), "tunnel ended");
    } else if LIMIT.admit(reason.kind()) {
        tracing::warn!(%peer, error = %error(), "tunnel failed: HTTP/2 protocol violation");
    }
}

/// Returns true if one side ended the connection because the other violated HTTP/2.
fn is_violation(reason: &HboneError) -> bool {
    match reason {
        HboneError::H2 { .. } => true,
        HboneError::Lost { source: Some(error) } => {
            error.is_go_away() && error.reason() != Some(Reason::NO_ERROR)
        }
        _ => false,
    }
}

fn answer_and_end(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // Fails only for a closed stream, which needs no answer.
    let _sent = respond.send_response(response, true);
}

#[cfg(test)]
mod tests;
