//! The client's end of a tunnel: one TLS and HTTP/2 connection, and CONNECT requests in it.
//!
//! Not here: dialling, and which tunnel to use. See `pool`.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::uri::{self, Uri};
use http::{HeaderMap, Method, Request, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use underpass_config::SpiffeId;

use crate::keepalive::Keepalive;
use crate::link::{Link, Monitored, OpenStream};
use crate::settings::{MAX_FRAME_SIZE, SMALL_FRAME_BUDGET};
use crate::tls::ClientTls;
use crate::{ClientSettings, HboneError, Identity, PeerIdentity, TunnelStream};

/// Opens tunnels in the name of one [`Identity`]. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Connector {
    tls: Arc<ClientTls>,
    settings: ClientSettings,
}

/// A connection to a server that has proven who it is. Clones share it; it ends when neither a clone nor a stream is
/// left, or when it is lost.
#[derive(Debug, Clone)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    link: Arc<Link>,
}

/// What a CONNECT request says.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// Where the tunnel shall lead: `ADDRESS:PORT` or `NAME:PORT`.
    pub authority: String,
    /// Further headers.
    pub headers: HeaderMap,
}

impl Connector {
    /// # Errors
    /// [`HboneError::Tls`] if rustls refuses the identity.
    pub fn new(identity: &Identity, settings: ClientSettings) -> Result<Self, HboneError> {
        Ok(Self { tls: Arc::new(ClientTls::new(identity)?), settings })
    }

    /// A connector that trusts as `identity` does and presents no certificate: to see a server refuse it.
    ///
    /// # Errors
    /// As [`Connector::new`].
    pub fn anonymous(identity: &Identity, settings: ClientSettings) -> Result<Self, HboneError> {
        Ok(Self { tls: Arc::new(ClientTls::anonymous(identity)?), settings })
    }

    /// Handshakes over `io` with a server that must be one of `expected`. Spawns a task that drives the connection.
    ///
    /// In TLS 1.3 the client is done first: that the server refuses our certificate is known at the first request.
    ///
    /// # Errors
    /// [`HboneError::HandshakeTimeout`] after `deadline`; otherwise what is wrong with TLS or the peer.
    pub async fn open<T>(
        &self,
        io: T,
        expected: &[SpiffeId],
        deadline: Duration,
    ) -> Result<Tunnel, HboneError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        timeout(deadline, self.handshake(io, expected))
            .await
            .unwrap_or(Err(HboneError::HandshakeTimeout { after: deadline }))
    }

    async fn handshake<T>(&self, io: T, expected: &[SpiffeId]) -> Result<Tunnel, HboneError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (stream, peer) = self.tls.connect(io, expected).await?;
        let link = Link::new(peer);
        let http2 = &self.settings.http2;
        let (send, mut connection) = h2::client::Builder::new()
            .initial_window_size(http2.stream_window)
            .initial_connection_window_size(http2.connection_window)
            .max_frame_size(MAX_FRAME_SIZE)
            .max_header_list_size(http2.max_header_list)
            .max_send_buffer_size(http2.send_buffer)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .enable_push(false)
            .handshake(Monitored::new(stream, link.clone()))
            .await
            .map_err(|error| link.stream_error(error))?;
        let keepalive =
            Keepalive::new(self.settings.keepalive.clone(), link.clone(), connection.ping_pong());
        tokio::spawn(drive(connection, keepalive, link.clone()));
        Ok(Tunnel { send, link })
    }
}

impl Tunnel {
    /// Asks the peer for a stream to `request.authority`.
    ///
    /// # Errors
    /// [`HboneError::Refused`] for any answer but 200, [`HboneError::ReplyTimeout`] after `reply`, or how the
    /// stream or connection ended before the answer.
    pub async fn connect(
        &self,
        request: ConnectRequest,
        reply: Duration,
    ) -> Result<TunnelStream, HboneError> {
        self.connect_reserved(request, reply, self.link.open_stream()).await
    }

    /// Whether no new stream can be opened: the connection ended, or the peer sent GOAWAY.
    pub fn is_closed(&self) -> bool {
        let ready = self.send.clone().poll_ready(&mut Context::from_waker(Waker::noop()));
        self.link.is_closed() || matches!(ready, Poll::Ready(Err(_)))
    }

    /// How many streams are open or being opened.
    pub fn open_streams(&self) -> usize {
        self.link.open_streams()
    }

    /// Who the server is.
    pub fn peer(&self) -> &PeerIdentity {
        self.link.peer()
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// A place for one more stream, within `limit` and what the peer allows. One is always allowed, so that a peer
    /// that allows none costs a reply timeout and not a dial for ever.
    pub(crate) fn reserve(&self, limit: usize) -> Option<OpenStream> {
        let allowed = limit.min(self.send.current_max_send_streams()).max(1);
        self.link.reserve_stream(allowed)
    }

    pub(crate) async fn connect_reserved(
        &self,
        request: ConnectRequest,
        reply: Duration,
        open: OpenStream,
    ) -> Result<TunnelStream, HboneError> {
        let request = head(request)?;
        timeout(reply, self.exchange(request, open))
            .await
            .unwrap_or(Err(HboneError::ReplyTimeout { after: reply }))
    }

    async fn exchange(
        &self,
        request: Request<()>,
        open: OpenStream,
    ) -> Result<TunnelStream, HboneError> {
        let failed = |error| self.link.stream_error(error);
        let mut ready = self.send.clone().ready().await.map_err(failed)?;
        let (response, send) = ready.send_request(request, false).map_err(failed)?;
        let response = response.await.map_err(failed)?;
        match response.status() {
            StatusCode::OK => Ok(TunnelStream::new(send, response.into_body(), open)),
            status => Err(HboneError::Refused { status }),
        }
    }
}

/// RFC 9113 section 8.5: `:method` and `:authority`, neither `:scheme` nor `:path`.
fn head(connect: ConnectRequest) -> Result<Request<()>, HboneError> {
    let ConnectRequest { authority, headers } = connect;
    let invalid = |authority: String| HboneError::InvalidAuthority { authority };
    let mut parts = uri::Parts::default();
    parts.authority = Some(authority.parse().map_err(|_| invalid(authority.clone()))?);
    let uri = Uri::from_parts(parts).map_err(|_| invalid(authority))?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    Ok(request)
}

async fn drive<T>(
    mut connection: Connection<Monitored<T>>,
    mut keepalive: Option<Keepalive>,
    link: Arc<Link>,
) where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let ended = poll_fn(|cx| {
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(ended.map_err(|error| link.stream_error(error)));
        }
        let streams_open = link.open_streams() > 0;
        match keepalive.as_mut().map(|keepalive| keepalive.poll_dead(cx, streams_open)) {
            Some(Poll::Ready(dead)) => Poll::Ready(Err(dead)),
            _ => Poll::Pending,
        }
    })
    .await;
    if let Err(reason) = ended {
        let peer = link.peer().spiffe_id();
        tracing::debug!(%peer, error = &reason as &dyn std::error::Error, "tunnel ended");
        // Before the connection is dropped, for that is when its streams learn of it.
        link.fail(reason);
    }
    link.close();
}

#[cfg(test)]
mod tests;
