//! The server of `underpass ca serve`: Istio's CA protocol over TLS, with the certificate authority
//! in a directory.
//!
//! The server authenticates by its certificate, clients by a token. `clients` maps tokens to
//! identities, and `service` answers requests.

mod service;

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::select;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tonic::Status;
use underpass_config::{Cipher, FileWatcher, Quoted};

use self::service::Service;
use super::CertificateAuthority;
use super::clients::{Clients, ClientsFile};
use crate::crypto::provider;
use crate::error::{CredentialProblem, HboneError};
use crate::identity::renewal::Schedule;
use crate::limits::log_limit::LogLimit;
use crate::limits::{ConnectionSlot, ConnectionSlots};
use crate::task::log_panic;
use crate::{clock, tls};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum time from the TLS handshake to the response to the first authenticated request.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The timeout of receiving and answering one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The age at which a connection accepts no more requests. It limits idle connections; clients
/// reconnect.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(60);
/// The time that requests in progress have to finish when a connection or the server closes.
const GRACE_PERIOD: Duration = Duration::from_secs(10);
/// The grace period of a displaced connection, and of an unauthenticated one at shutdown.
const SHORT_GRACE_PERIOD: Duration = Duration::from_secs(1);
/// The pause after a failed accept, for example if the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const MAX_CONNECTIONS: usize = 256;
/// The maximum number of connections from one source address.
const MAX_PER_SOURCE: usize = 32;
const MAX_STREAMS: u32 = 32;
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;
const MAX_HEADER_LIST: u32 = 16 << 10;
/// The validity of the server's own TLS certificate, which the server renews while it runs.
const SERVER_CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// The settings of a [`CaServer`].
#[derive(Debug, Clone)]
pub struct CaServerSettings {
    /// The directory that [`CertificateAuthority::init`] created. The server reads it again for
    /// every certificate.
    pub dir: PathBuf,
    /// The clients file (`underpass_config::CaClients`). The server applies changes while it runs.
    pub clients: PathBuf,
    /// Host names and addresses in the server's certificate, besides the listener's address.
    pub names: Vec<String>,
    /// The maximum validity of an issued certificate. A request without a validity gets one day, or
    /// this maximum if it is shorter.
    pub max_ttl: Duration,
}

/// A server that issues certificates.
#[derive(Debug)]
pub struct CaServer {
    settings: CaServerSettings,
    clients: ClientsFile,
    service: Arc<Service>,
    tls: Arc<ServerConfig>,
    renewal: Schedule,
    listener: TcpListener,
}

impl CaServer {
    /// Checks the settings and issues the server's TLS certificate.
    ///
    /// # Errors
    /// [`HboneError::Credential`] for an unusable authority or token file, [`HboneError::Clients`]
    /// for an invalid clients file.
    pub fn new(
        mut settings: CaServerSettings,
        listener: TcpListener,
        watcher: &FileWatcher,
    ) -> Result<Self, HboneError> {
        let address = listener.local_addr();
        let address = address.map_err(|error| HboneError::file("the listener", error))?;
        settings.names.extend(own_addresses(address));
        let (clients, granted) = ClientsFile::open(settings.clients.clone(), watcher)?;
        warn_if_empty(&settings, &granted);
        let service = Arc::new(Service::new(settings.dir.clone(), settings.max_ttl, granted));
        let tls = own_tls(&settings)?;
        let mut renewal = Schedule::new();
        renewal.succeeded(clock::now() + SERVER_CERTIFICATE_TTL);
        Ok(Self { settings, clients, service, tls, renewal, listener })
    }

    /// Serves until `shutdown` completes, then waits for requests in progress.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let slots = ConnectionSlots::new(MAX_CONNECTIONS, MAX_PER_SOURCE);
        let mut connections = JoinSet::new();
        let stop = watch::Sender::new(());
        tokio::pin!(shutdown);
        loop {
            select! {
                () = &mut shutdown => break,
                () = self.renewal.due() => self.renew(),
                clients = self.clients.next() => self.set_clients(clients),
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                (stream, peer) = accept(&self.listener) => match slots.take(peer.ip()) {
                    Some(slot) => {
                        let (tls, service) = (self.tls.clone(), self.service.clone());
                        let stopped = stop.subscribe();
                        let serving = serve(stream, peer, tls, service, slot, stopped);
                        connections.spawn(log_panic("connection of a client of the CA", serving));
                    }
                    None => log_refused(peer),
                }
            }
        }
        drop((self.listener, stop));
        let ended =
            timeout(GRACE_PERIOD, async { while connections.join_next().await.is_some() {} });
        if ended.await.is_err() {
            tracing::warn!(
                connections = connections.len(),
                "aborting connections to the CA at the shutdown deadline"
            );
        }
    }

    fn renew(&mut self) {
        match own_tls(&self.settings) {
            Ok(tls) => {
                self.tls = tls;
                self.renewal.succeeded(clock::now() + SERVER_CERTIFICATE_TTL);
            }
            Err(error) => {
                self.renewal.failed();
                tracing::warn!(
                    error = &error as &dyn Error,
                    "cannot renew the server's own certificate"
                );
            }
        }
    }

    fn set_clients(&self, clients: Result<Clients, HboneError>) {
        match clients {
            Ok(clients) => {
                warn_if_empty(&self.settings, &clients);
                tracing::info!(clients = clients.len(), "clients file reloaded");
                self.service.set_clients(clients);
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn Error,
                "invalid clients file: keeping the previous clients"
            ),
        }
    }
}

fn warn_if_empty(settings: &CaServerSettings, clients: &Clients) {
    if clients.len() == 0 {
        let file = settings.clients.display();
        tracing::warn!(%file, "the clients file is empty: all requests are refused");
    }
}

/// The names of the listener for the server's certificate: its address, or those of loopback for a
/// wildcard address. Remote clients then need a name in the setting `names`.
fn own_addresses(listener: SocketAddr) -> Vec<String> {
    match listener.ip() {
        ip if ip.is_unspecified() => {
            vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]
        }
        ip => vec![ip.to_canonical().to_string()],
    }
}

/// Issues a TLS certificate for the server's names, and returns the TLS configuration.
fn own_tls(settings: &CaServerSettings) -> Result<Arc<ServerConfig>, HboneError> {
    let issued = CertificateAuthority::open(&settings.dir)?
        .issue_server(&settings.names, SERVER_CERTIFICATE_TTL)?;
    let problem = |error: String| {
        HboneError::credential(settings.names.join(", "), CredentialProblem::Key(error))
    };
    let leaf = CertificateDer::from_pem_slice(issued.chain_pem.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes());
    let (leaf, key) =
        leaf.and_then(|leaf| Ok((leaf, key?))).map_err(|error| problem(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider(&Cipher::ALL))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|config| config.with_no_client_auth().with_single_cert(vec![leaf], key))
        .map_err(|error| problem(error.to_string()))?;
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// Accepts the next connection. Cancel-safe.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn log_refused(peer: SocketAddr) {
    static LIMIT: LogLimit = LogLimit::new("refused connections");
    let reason = "all connection slots are busy with requests";
    if LIMIT.admit(reason) {
        tracing::warn!(%peer, reason, "refused a client's connection");
    }
}

async fn serve<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: T,
    peer: SocketAddr,
    tls: Arc<ServerConfig>,
    service: Arc<Service>,
    slot: ConnectionSlot,
    stopped: watch::Receiver<()>,
) {
    let handshake = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(tls).accept(stream));
    let stream = select! {
        stream = handshake => stream,
        () = slot.displaced() => {
            tracing::debug!(%peer, "connection displaced by another one");
            return;
        }
    };
    match stream {
        Ok(Ok(stream)) => serve_requests(stream, peer, service, slot, stopped).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
    }
}

async fn serve_requests<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: T,
    peer: SocketAddr,
    service: Arc<Service>,
    slot: ConnectionSlot,
    stopped: watch::Receiver<()>,
) {
    let slot = Arc::new(slot);
    let slot_of_requests = slot.clone();
    let answer = service_fn(move |request| {
        let (service, slot) = (service.clone(), slot_of_requests.clone());
        async move {
            let _busy = slot.request();
            let answer = timeout(REQUEST_TIMEOUT, service.answer(peer, &slot, request)).await;
            let late = |_| Status::deadline_exceeded("request timed out").into_http();
            Ok::<_, Infallible>(answer.unwrap_or_else(late))
        }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST);
    let connection = builder.serve_connection(TokioIo::new(stream), answer);
    tokio::pin!(connection);
    let grace_period = select! {
        ended = &mut connection => {
            if let Err(error) = ended {
                tracing::debug!(%peer, error = %Quoted::chain(&error), "connection failed");
            }
            return;
        }
        grace_period = end_of_service(&slot, stopped) => grace_period,
    };
    connection.as_mut().graceful_shutdown();
    if timeout(grace_period, connection).await.is_err() {
        tracing::debug!(%peer, "aborting a connection at its deadline");
    }
}

/// Waits until the connection must accept no more requests. Returns the grace period of its
/// requests in progress.
async fn end_of_service(slot: &ConnectionSlot, mut stopped: watch::Receiver<()>) -> Duration {
    let old = async {
        sleep(FIRST_REQUEST_TIMEOUT).await;
        if !slot.is_authenticated() {
            return Duration::ZERO;
        }
        sleep(MAX_CONNECTION_AGE.saturating_sub(FIRST_REQUEST_TIMEOUT)).await;
        GRACE_PERIOD
    };
    select! {
        grace_period = old => grace_period,
        () = slot.displaced() => SHORT_GRACE_PERIOD,
        // A closed channel also means that the server stops.
        _ = stopped.changed() => if slot.is_authenticated() { GRACE_PERIOD } else { SHORT_GRACE_PERIOD },
    }
}

#[cfg(test)]
pub(crate) mod tests;
