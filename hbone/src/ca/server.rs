//! `underpass ca serve`: Istio's CA protocol over TLS, backed by the authority in a directory.
//!
//! The server proves its name, clients prove themselves by a token. Not here: who may be what (`clients`), and what is
//! answered to whom (`service`).

mod places;
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
use underpass_config::{Cipher, Quoted};

use self::places::{Place, Places};
use self::service::Service;
use super::CertificateAuthority;
use super::clients::{Clients, ClientsFile};
use crate::source::Schedule;
use crate::{CredentialProblem, HboneError, LogLimit, clock, tls};

const HANDSHAKE: Duration = Duration::from_secs(5);
/// After the handshake, for a first request with a listed token to be answered.
const FIRST_REQUEST: Duration = Duration::from_secs(5);
/// For a request to come in whole and be answered.
const REQUEST: Duration = Duration::from_secs(10);
/// After this a connection takes no more requests: who holds one without asking holds none for long, and clients connect anew.
const CONNECTION_AGE: Duration = Duration::from_secs(60);
/// For what is under way when a connection or the server ends.
const FAREWELL: Duration = Duration::from_secs(10);
/// The same for a connection whose place another one has taken, and for one without a listed token
/// when the server ends.
const SHORT_FAREWELL: Duration = Duration::from_secs(1);
/// After accepting failed, as it does when there are no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const STREAMS: u32 = 32;
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;
const MAX_HEADER_LIST: u32 = 16 << 10;
/// Of the server's own certificate, which is renewed in process.
const OWN_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// What a [`CaServer`] serves.
#[derive(Debug, Clone)]
pub struct CaServerSettings {
    /// The authority's directory, as [`CertificateAuthority::init`] makes it; read anew for every certificate.
    pub dir: PathBuf,
    /// Who may ask for which identity (`underpass_config::CaClients`). Followed as it changes.
    pub clients: PathBuf,
    /// The host names and addresses by which clients know the server, beside the address that it listens on.
    pub names: Vec<String>,
    /// The longest that a certificate is valid. A client that does not say gets one for a day, if that is not longer.
    pub max_ttl: Duration,
}

/// A server of certificates.
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
    /// Checks everything and issues the server's own certificate. Serves on `listener`, which the caller has bound.
    ///
    /// # Errors
    /// [`HboneError::Credential`] for the authority or a token's file, [`HboneError::Clients`] for the clients file.
    pub fn new(mut settings: CaServerSettings, listener: TcpListener) -> Result<Self, HboneError> {
        let address = listener.local_addr();
        let address = address.map_err(|error| HboneError::file("the listener", error))?;
        settings.names.extend(own_addresses(address));
        let (clients, granted) = ClientsFile::open(settings.clients.clone())?;
        warn_if_nobody(&settings, &granted);
        let service = Arc::new(Service::new(settings.dir.clone(), settings.max_ttl, granted));
        let tls = own_tls(&settings)?;
        let mut renewal = Schedule::new();
        renewal.succeeded(clock::now() + OWN_TTL);
        Ok(Self { settings, clients, service, tls, renewal, listener })
    }

    /// Serves until `shutdown`, and then lets the requests that are under way end.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let places = Places::default();
        let mut connections = JoinSet::new();
        let stop = watch::Sender::new(());
        tokio::pin!(shutdown);
        loop {
            select! {
                () = &mut shutdown => break,
                () = self.renewal.due() => self.renew(),
                clients = self.clients.next() => self.set_clients(clients),
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                (stream, peer) = accept(&self.listener) => match places.take(peer.ip()) {
                    Some(place) => {
                        let (tls, service) = (self.tls.clone(), self.service.clone());
                        let stopped = stop.subscribe();
                        connections.spawn(serve(stream, peer, tls, service, place, stopped));
                    }
                    None => log_refused(peer),
                }
            }
        }
        drop((self.listener, stop));
        let ended = timeout(FAREWELL, async { while connections.join_next().await.is_some() {} });
        if ended.await.is_err() {
            tracing::warn!(connections = connections.len(), "connections to the CA did not end");
        }
    }

    fn renew(&mut self) {
        match own_tls(&self.settings) {
            Ok(tls) => {
                self.tls = tls;
                self.renewal.succeeded(clock::now() + OWN_TTL);
            }
            Err(error) => {
                self.renewal.failed();
                tracing::warn!(
                    error = &error as &dyn Error,
                    "the server's own certificate is not renewed"
                );
            }
        }
    }

    fn set_clients(&self, clients: Result<Clients, HboneError>) {
        match clients {
            Ok(clients) => {
                warn_if_nobody(&self.settings, &clients);
                tracing::info!(clients = clients.len(), "the clients file is read again");
                self.service.set_clients(clients);
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn Error,
                "the clients file is not used: what it said before stays"
            ),
        }
    }
}

fn warn_if_nobody(settings: &CaServerSettings, clients: &Clients) {
    if clients.len() == 0 {
        let file = settings.clients.display();
        tracing::warn!(%file, "the clients file lists nobody: every request is refused");
    }
}

/// What a client can dial to come here. Who listens on all addresses is told its names.
fn own_addresses(listener: SocketAddr) -> Vec<String> {
    match listener.ip() {
        ip if ip.is_unspecified() => {
            vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]
        }
        ip => vec![ip.to_canonical().to_string()],
    }
}

/// TLS with a new certificate for the server's names.
fn own_tls(settings: &CaServerSettings) -> Result<Arc<ServerConfig>, HboneError> {
    let issued =
        CertificateAuthority::open(&settings.dir)?.issue_server(&settings.names, OWN_TTL)?;
    let problem = |error: String| {
        HboneError::credential(settings.names.join(", "), CredentialProblem::Key(error))
    };
    let leaf = CertificateDer::from_pem_slice(issued.chain_pem.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes());
    let (leaf, key) =
        leaf.and_then(|leaf| Ok((leaf, key?))).map_err(|error| problem(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(tls::provider(&Cipher::ALL))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|config| config.with_no_client_auth().with_single_cert(vec![leaf], key))
        .map_err(|error| problem(error.to_string()))?;
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The next connection. Cancel-safe.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn log_refused(peer: SocketAddr) {
    static LIMIT: LogLimit = LogLimit::new("refused connections");
    let reason = "every place is taken by a request that is being answered";
    if LIMIT.admit(reason) {
        tracing::warn!(%peer, reason, "connection refused");
    }
}

async fn serve<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: T,
    peer: SocketAddr,
    tls: Arc<ServerConfig>,
    service: Arc<Service>,
    place: Place,
    stopped: watch::Receiver<()>,
) {
    let handshake = timeout(HANDSHAKE, TlsAcceptor::from(tls).accept(stream));
    let stream = select! {
        stream = handshake => stream,
        () = place.evicted() => {
            tracing::debug!(%peer, "another connection takes the place of this one");
            return;
        }
    };
    match stream {
        Ok(Ok(stream)) => serve_requests(stream, peer, service, place, stopped).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "the TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "the TLS handshake took too long"),
    }
}

async fn serve_requests<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: T,
    peer: SocketAddr,
    service: Arc<Service>,
    place: Place,
    stopped: watch::Receiver<()>,
) {
    let place = Arc::new(place);
    let of_requests = place.clone();
    let answer = service_fn(move |request| {
        let (service, place) = (service.clone(), of_requests.clone());
        async move {
            let _busy = place.request();
            let answer = timeout(REQUEST, service.answer(peer, &place, request)).await;
            let late = |_| Status::deadline_exceeded("the request took too long").into_http();
            Ok::<_, Infallible>(answer.unwrap_or_else(late))
        }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST);
    let connection = builder.serve_connection(TokioIo::new(stream), answer);
    tokio::pin!(connection);
    let farewell = select! {
        ended = &mut connection => {
            if let Err(error) = ended {
                tracing::debug!(%peer, error = %Quoted::chain(&error), "the connection broke");
            }
            return;
        }
        farewell = end_of_service(&place, stopped) => farewell,
    };
    connection.as_mut().graceful_shutdown();
    if timeout(farewell, connection).await.is_err() {
        tracing::debug!(%peer, "the connection did not end");
    }
}

/// Waits until a connection is to take no more requests; how long those under way may take then.
async fn end_of_service(place: &Place, mut stopped: watch::Receiver<()>) -> Duration {
    let old = async {
        sleep(FIRST_REQUEST).await;
        if !place.is_proven() {
            return Duration::ZERO;
        }
        sleep(CONNECTION_AGE.saturating_sub(FIRST_REQUEST)).await;
        FAREWELL
    };
    select! {
        farewell = old => farewell,
        () = place.evicted() => SHORT_FAREWELL,
        // An error means the same: the sender is gone, so the server is stopping.
        _ = stopped.changed() => if place.is_proven() { FAREWELL } else { SHORT_FAREWELL },
    }
}

#[cfg(test)]
pub(crate) mod tests;
