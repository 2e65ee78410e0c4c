//! Helpers of the unit tests: two workloads with certificates of one CA, and in-memory tunnels
//! between them.

pub(crate) mod frames;
pub(crate) mod pki;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::HeaderMap;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, duplex};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use underpass_config::SpiffeId;

use crate::ca::CertificateAuthority;
use crate::identity::Identity;
use crate::identity::credentials::Credentials;
use crate::trust::Trust;
use crate::tunnel::client::{ConnectRequest, Connector, Tunnel};
use crate::tunnel::server::{Acceptor, Incoming, ServerTunnel};
use crate::tunnel::settings::{ClientSettings, ServerSettings};
use crate::tunnel::stream::TunnelStream;

pub(crate) const CLIENT: &str = "spiffe://td/ns/default/sa/client";
pub(crate) const SERVER: &str = "spiffe://td/ns/default/sa/server";
/// The address of the in-memory server.
pub(crate) const ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15008);
pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub(crate) fn authority(trust_domain: &str) -> CertificateAuthority {
    CertificateAuthority::generate(trust_domain.parse().unwrap()).unwrap()
}

pub(crate) fn identity(authority: &CertificateAuthority, who: &str) -> Identity {
    let issued = authority.issue(&id(who), HOUR).unwrap();
    let roots = authority.roots_pem().as_bytes();
    Identity::from_pem(issued.chain_pem.as_bytes(), issued.key_pem.as_bytes(), roots).unwrap()
}

/// Credentials with no trust besides the identity's own roots. They never change.
pub(crate) fn credentials(identity: &Identity) -> Credentials {
    Credentials::new(identity.clone(), Trust::default()).unwrap()
}

/// A client and a server that trust each other.
pub(crate) struct Mesh {
    pub(crate) connector: Connector,
    pub(crate) acceptor: Acceptor,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        Self::with(ClientSettings::default(), ServerSettings::default())
    }

    pub(crate) fn with(client: ClientSettings, server: ServerSettings) -> Self {
        let authority = authority("td");
        let fixed = |who| credentials(&identity(&authority, who)).fixed();
        Self::of(fixed(CLIENT), client, fixed(SERVER), server)
    }

    pub(crate) fn of(
        client: watch::Receiver<Credentials>,
        client_settings: ClientSettings,
        server: watch::Receiver<Credentials>,
        server_settings: ServerSettings,
    ) -> Self {
        Self {
            connector: Connector::new(client, client_settings),
            acceptor: Acceptor::new(server, server_settings),
        }
    }

    pub(crate) async fn tunnel(&self) -> (Tunnel, ServerTunnel) {
        let (near, far) = duplex(64 << 10);
        self.tunnel_over(near, far).await
    }

    pub(crate) async fn tunnel_over<A, B>(&self, near: A, far: B) -> (Tunnel, ServerTunnel)
    where
        A: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
        B: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static,
    {
        let expected = [id(SERVER)];
        let (client, server) = tokio::join!(
            self.connector.open(near, ADDRESS, &expected, SECOND),
            self.acceptor.accept(far, SECOND)
        );
        (client.unwrap(), server.unwrap())
    }

    /// Opens a stream. Returns its client end, its server end, and both ends of the tunnel.
    pub(crate) async fn stream(&self) -> (TunnelStream, TunnelStream, Tunnel, Served) {
        let (tunnel, server) = self.tunnel().await;
        let mut served = Served::new(server);
        let (near, far) = tokio::join!(tunnel.connect(request(), SECOND), async {
            served.next().await.accept(HeaderMap::new())
        });
        (near.unwrap(), far.unwrap(), tunnel, served)
    }
}

/// A server's end of a tunnel, driven by a task, and its incoming requests.
pub(crate) struct Served {
    requests: mpsc::UnboundedReceiver<Incoming>,
    driver: JoinHandle<()>,
}

impl Served {
    pub(crate) fn new(mut tunnel: ServerTunnel) -> Self {
        let (found, requests) = mpsc::unbounded_channel();
        let driver = tokio::spawn(async move {
            while let Some(incoming) = tunnel.next().await {
                let _unwanted = found.send(incoming);
            }
        });
        Self { requests, driver }
    }

    pub(crate) async fn next(&mut self) -> Incoming {
        self.requests.recv().await.unwrap()
    }

    /// Drops the connection without a shutdown, like a killed process.
    pub(crate) async fn abort(self) {
        self.driver.abort();
        assert!(self.driver.await.unwrap_err().is_cancelled());
    }

    pub(crate) async fn ended(self) {
        self.driver.await.unwrap();
    }
}

pub(crate) fn request() -> ConnectRequest {
    ConnectRequest { authority: "10.0.0.1:80".to_owned(), headers: HeaderMap::new() }
}

/// An I/O wrapper that transfers at most `step` bytes in each call, and receives nothing while
/// `stopped` is set.
pub(crate) struct StepwiseIo<T> {
    pub(crate) io: T,
    pub(crate) step: usize,
    pub(crate) stopped: Arc<AtomicBool>,
}

impl<T> StepwiseIo<T> {
    pub(crate) fn new(io: T, step: usize) -> Self {
        Self { io, step, stopped: Arc::default() }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for StepwiseIo<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.stopped.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        let mut bytes = vec![0; self.step.min(buf.remaining())];
        let mut part = ReadBuf::new(&mut bytes);
        let polled = Pin::new(&mut self.io).poll_read(cx, &mut part);
        buf.put_slice(part.filled());
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for StepwiseIo<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let part = &buf[..self.step.min(buf.len())];
        Pin::new(&mut self.io).poll_write(cx, part)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
