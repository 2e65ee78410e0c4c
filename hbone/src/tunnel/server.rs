//! The server of a tunnel: mutual TLS, then CONNECT requests to accept or refuse.
//!
//! Not here: listening, and authorization.

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
use tokio::time::timeout;
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

/// Accepts tunnels, each with the current [`Credentials`]. Cheap to clone.
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

/// A CONNECT request without an answer yet. Dropping it resets the stream.
#[derive(Debug)]
pub struct Incoming {
    authority: Authority,
    headers: HeaderMap,
    reader: TunnelReader,
    respond: SendResponse<Bytes>,
}

impl Acceptor {
    /// An acceptor that accepts each tunnel with the current `credentials`.
    pub fn new(credentials: watch::Receiver<Credentials>, settings: ServerSettings) -> Self {
        Self { credentials, settings }
    }

    /// Handshakes over `io` with a client that must belong to a trust domain with known roots. The
    /// tunnel ends when later credentials no longer trust the client.
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
        // The monitor observes all changes after this point.
        let mut credentials = self.credentials.clone();
        let current = credentials.borrow_and_update().clone();
        let (stream, peer) = current.server().accept(io).await?;
        let usable_until = peer.expires.min(current.identity().expires());
        let tunnel_state = TunnelState::new(peer.identity.clone(), usable_until);
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

    /// The earliest expiry of both certificates.
    pub fn usable_until(&self) -> SystemTime {
        self.tunnel_state.usable_until()
    }

    /// Whether the handshake resumed an earlier session.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Number of open streams.
    pub fn open_streams(&self) -> usize {
        self.tunnel_state.open_streams()
    }

    /// Time since the last stream ended; `None` while one is open. A request that is not accepted
    /// is no stream.
    pub fn idle(&self) -> Option<Duration> {
        self.tunnel_state.idle_since().map(|since| since.elapsed())
    }

    /// The limit that the client exceeded, if that ended the tunnel.
    pub fn exceeded(&self) -> Option<TunnelLimit> {
        self.tunnel_state.exceeded()
    }

    /// The next request; `None` when the connection ended. Cancel-safe.
    ///
    /// This also drives the accepted streams: call it while any of them is open. A request other
    /// than CONNECT, or without a usable authority, is answered with 400. One after the expiry of a
    /// certificate, or long after [`ServerTunnel::drain`], is reset with REFUSED_STREAM.
    pub async fn next(&mut self) -> Option<Incoming> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Sends GOAWAY: the client opens no more streams. Open ones continue; then
    /// [`ServerTunnel::next`] ends. A client that neither answers nor reads times out. If the
    /// client does not acknowledge in time, its new streams are refused, and the tunnel ends with
    /// its last stream.
    pub fn drain(&mut self) {
        if let Some(connection) = &mut self.connection {
            self.drain.get_or_insert_with(Drain::new);
            connection.graceful_shutdown();
        }
    }

    /// Ends the tunnel before its first request: sends GOAWAY(ENHANCE_YOUR_CALM) without waiting
    /// for the client to read.
    pub async fn refuse(mut self) {
        poll_fn(|cx| {
            self.shut_down(cx, Reason::ENHANCE_YOUR_CALM);
            Poll::Ready(())
        })
        .await;
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Incoming>> {
        // Check this first, so that a peer with endless requests is terminated too.
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

    /// Drives the connection: ready with a request, or `None` at its end.
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

    /// Drains a tunnel with too many refused requests, and closes it if they continue. Returns
    /// whether the drain has just begun, so that GOAWAY must be sent.
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
    /// `None` if the request was answered with 400.
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
                answer_end(&mut respond, StatusCode::BAD_REQUEST);
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

    /// The request's headers, which are unverified claims of the client.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The identity of the client.
    pub fn peer(&self) -> &PeerIdentity {
        self.reader.tunnel_state().peer()
    }

    /// Waits until the client resets the request or the connection ends, for requests with a
    /// delayed answer. Cancel-safe.
    pub async fn closed(&mut self) -> HboneError {
        poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// Answers 200 with `headers`. After that the stream carries raw bytes.
    ///
    /// # Errors
    /// The error that ended the stream or connection before.
    pub fn accept(mut self, headers: HeaderMap) -> Result<TunnelStream, HboneError> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let sent = self.respond.send_response(response, false);
        let send = sent.map_err(|error| self.refusal(error))?;
        Ok(TunnelStream::new(send, self.reader))
    }

    /// Answers `status` without a body. The tunnel of a client with too many 4xx is closed.
    pub fn refuse(mut self, status: StatusCode) {
        if status.is_client_error() {
            self.reader.tunnel_state().activity().count_refused();
        }
        answer_end(&mut self.respond, status);
    }

    /// h2 reports only that the stream is closed; its reason is queried separately.
    fn refusal(&mut self, error: h2::Error) -> HboneError {
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

/// The destination of a CONNECT request, or the reason for a refusal.
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
        tracing::warn!(%peer, error = %error(), "tunnel failed: HTTP/2 was violated");
    }
}

/// Whether one side ended the connection because of a violation by the other.
fn is_violation(reason: &HboneError) -> bool {
    match reason {
        HboneError::H2 { .. } => true,
        HboneError::Lost { source: Some(error) } => {
            error.is_go_away() && error.reason() != Some(Reason::NO_ERROR)
        }
        _ => false,
    }
}

fn answer_end(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // Fails only for a closed stream, which needs no answer.
    let _gone = respond.send_response(response, true);
}

#[cfg(test)]
mod tests;
