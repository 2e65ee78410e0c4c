//! Accepts connections, and serves HTTP/1 on them within bounds.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;
use underpass_hbone::{ConnectionSlot, ConnectionSlots, log_panic};
use underpass_interception::{BoundListener, Listener, Peer};

use crate::admin::routes::Routes;
use crate::admin::stall::StallTimeout;
use crate::process::pause_gate::PauseGate;

/// The maximum number of connections. A new one evicts the oldest idle one, so that a flood does
/// not lock out probes and scrapers.
const MAX_CONNECTIONS: usize = 64;
/// The maximum number of connections from one source address.
const MAX_CONNECTIONS_PER_SOURCE: usize = 16;
/// Timeout for the request headers, and for the next request of an idle connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// The delay after a failed accept, for example without file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

const UNTRUSTED: &str = "only root and the user of the proxy may connect";

/// Serves the paths of one listener.
#[derive(Clone)]
pub(crate) struct Server {
    routes: Routes,
}

impl Server {
    pub(crate) fn new(routes: Routes) -> Self {
        Self { routes }
    }

    /// Serves an address while the gate is open. Never returns, except with an error.
    ///
    /// # Errors
    ///
    /// The listener cannot be registered.
    pub(crate) async fn serve(
        self,
        listener: BoundListener,
        gate: PauseGate,
    ) -> std::io::Result<()> {
        let listener = listener.register()?;
        let slots = ConnectionSlots::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE);
        loop {
            let Some(Some((stream, client))) = gate.pass(self.accept(&listener)).await else {
                continue;
            };
            // Every connection may be evicted, also during a long answer.
            if let Some(slot) = slots.take(client) {
                let serving = self.clone().serve_connection(stream, slot);
                tokio::spawn(log_panic("connection to an endpoint", serving));
            }
        }
    }

    async fn accept(&self, listener: &Listener) -> Option<(TcpStream, IpAddr)> {
        match listener.accept().await {
            Ok((stream, client)) => Some((TcpStream::from_std(stream).ok()?, client.ip())),
            Err(error) => self.accept_failed(&error).await,
        }
    }

    async fn accept_failed<T>(&self, error: &std::io::Error) -> Option<T> {
        tracing::debug!(%error, endpoint = self.routes.name(), "cannot accept a connection");
        tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
        None
    }

    /// Serves a Unix socket to root and the user of this process while the gate is open. Never
    /// returns.
    pub(crate) async fn serve_socket(self, listener: Arc<UnixListener>, gate: PauseGate) {
        // All clients are this host.
        const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let slots = ConnectionSlots::new(MAX_CONNECTIONS, MAX_CONNECTIONS);
        loop {
            let accept = async {
                match listener.accept().await {
                    Ok((stream, _)) => Some(stream),
                    Err(error) => self.accept_failed(&error).await,
                }
            };
            let Some(Some(stream)) = gate.pass(accept).await else { continue };
            let Some(slot) = slots.take(SOURCE) else { continue };
            let serving = self.clone().serve_process(stream, slot);
            tokio::spawn(log_panic("connection to the admin socket", serving));
        }
    }

    /// Serves a local process. Others do not evict it until the answer to its request begins.
    async fn serve_process(self, stream: UnixStream, slot: ConnectionSlot) {
        if !Peer::of(&stream).is_ok_and(Peer::is_trusted) {
            let refusing = Self { routes: Routes::Refused(UNTRUSTED) };
            return refusing.serve_connection(stream, slot).await;
        }
        slot.mark_authenticated();
        self.serve_connection(stream, slot).await;
    }

    /// Serves one connection until it ends, its deadline passes, or it is evicted.
    pub(super) async fn serve_connection(
        self,
        stream: impl AsyncRead + AsyncWrite + Send,
        slot: ConnectionSlot,
    ) {
        let (routes, slot) = (&self.routes, &slot);
        let answer = service_fn(move |request: Request<Incoming>| async move {
            let _busy = slot.request();
            let (head, _) = request.into_parts();
            Ok::<_, Infallible>(routes.answer(&head).await)
        });
        let stream = std::pin::pin!(StallTimeout::new(stream));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), answer);
        let within = async {
            match routes.lifetime() {
                Some(lifetime) => timeout(lifetime, connection).await.ok(),
                None => Some(connection.await),
            }
        };
        let endpoint = routes.name();
        tokio::select! {
            ended = within => match ended {
                Some(Ok(())) => {}
                Some(Err(error)) => tracing::debug!(endpoint, %error, "connection failed"),
                None => tracing::debug!(endpoint, "connection timed out"),
            },
            () = slot.displaced() => {
                tracing::debug!(endpoint, "connection evicted by a newer one");
            }
        }
    }
}

#[cfg(test)]
mod tests;
