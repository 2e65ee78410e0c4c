//! The gRPC channel to a control plane, and the stream of its mesh (delta xDS).
//!
//! The CA client ([`crate::IstioCa`]) uses the same channel. The config crate has the protocol of
//! the stream.

pub(crate) mod endpoint;

use std::borrow::Cow;
use std::error::Error as _;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use http::uri::PathAndQuery;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;
use underpass_config::{DeltaRequest, DeltaResponse, Hint, Quoted, XdsSettings};

use self::endpoint::{Endpoint, check_client, read_roots};
use crate::ca::read_token;
use crate::error::{HboneError, IssuerProblem};
use crate::pool::Dial;

const DELTA_AGGREGATED_RESOURCES: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Timeout of connecting, TLS and HTTP/2, and of the stream's response headers.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of answers that wait to be sent.
const MAX_QUEUED: usize = 64;
/// Timeout for a control plane that reads no answers.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of a response, as in ztunnel: the first state of a large mesh is one response.
const MAX_RESPONSE: usize = 200 << 20;

/// Opens streams to one control plane.
pub struct ControlPlaneClient<D> {
    settings: XdsSettings,
    endpoint: Endpoint,
    headers: MetadataMap,
    dial: D,
}

/// An open stream. Dropping it closes the connection.
#[derive(Debug)]
pub struct ControlPlaneStream {
    requests: mpsc::Sender<DeltaRequest>,
    responses: Streaming<DeltaResponse>,
}

/// Why there is no stream to the control plane.
#[derive(Debug, Clone, Error)]
pub enum ControlPlaneError {
    /// No connection, or unreadable credentials.
    #[error(transparent)]
    Connect(HboneError),
    /// A setting that cannot be sent as a header.
    #[error("the header {0:?} cannot be sent")]
    Header(String),
    /// gRPC status 16 or 7.
    #[error("it refused this client ({0:?})")]
    Unauthenticated(Quoted),
    /// gRPC status 8 or 14: the control plane limits its clients, or restarts.
    #[error("it is not available ({0:?})")]
    Unavailable(Quoted),
    /// Any other gRPC status.
    #[error("it closed the stream with status {status} ({message:?})")]
    Refused {
        /// The name of the gRPC status.
        status: &'static str,
        /// The control plane's message.
        message: Quoted,
    },
    /// The control plane closed the stream without an error.
    #[error("it closed the stream")]
    Closed,
    /// The connection was lost.
    #[error("the connection was lost")]
    Lost(#[source] Arc<io::Error>),
    /// No response headers.
    #[error("no answer after {0:?}")]
    Timeout(Duration),
    /// The answers of the client fill the queue.
    #[error("it has read no answer for {0:?}")]
    Stalled(Duration),
}

impl<D: Dial> ControlPlaneClient<D> {
    /// A client that connects with `dial`. Sends nothing yet.
    ///
    /// # Errors
    /// An invalid setting, an unreadable token or unreadable roots. The files are read again for
    /// each stream.
    pub fn new(settings: XdsSettings, dial: D) -> Result<Self, ControlPlaneError> {
        let endpoint = Endpoint::new(&settings.address, settings.server_name.as_deref());
        let endpoint = endpoint.map_err(|what| {
            let issuer = settings.address.clone();
            ControlPlaneError::Connect(HboneError::Issuer { issuer, what, source: None })
        })?;
        let headers = headers(&settings)?;
        let client = Self { settings, endpoint, headers, dial };
        token(&client.settings).map_err(ControlPlaneError::Connect)?;
        read_roots(&client.settings.roots).map_err(ControlPlaneError::Connect)?;
        Ok(client)
    }

    /// Opens a stream that sends `first` at once.
    ///
    /// # Errors
    /// There is no connection, or the control plane refuses the stream.
    pub async fn open(
        &self,
        first: Vec<DeltaRequest>,
    ) -> Result<ControlPlaneStream, ControlPlaneError> {
        let token = token(&self.settings).map_err(ControlPlaneError::Connect)?;
        let mut grpc = self.connect().await.map_err(ControlPlaneError::Connect)?;
        let (requests, queued) = mpsc::channel(MAX_QUEUED.max(first.len()));
        for request in first {
            // The channel has room, and its receiver exists.
            requests.try_send(request).ok();
        }
        let sent =
            stream::unfold(queued, |mut queued| async { Some((queued.recv().await?, queued)) });
        let mut request = Request::new(sent);
        *request.metadata_mut() = self.headers.clone();
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", token);
        }
        let path = PathAndQuery::from_static(DELTA_AGGREGATED_RESOURCES);
        let opened = timeout(CONNECT_TIMEOUT, grpc.streaming(request, path, ProstCodec::default()));
        let opened = opened.await.map_err(|_| ControlPlaneError::Timeout(CONNECT_TIMEOUT))?;
        let responses = opened.map_err(|status| refusal(&status))?.into_inner();
        Ok(ControlPlaneStream { requests, responses })
    }

    async fn connect(&self) -> Result<Grpc<endpoint::Connection>, HboneError> {
        let roots = read_roots(&self.settings.roots)?;
        let client = self.settings.client.as_ref();
        let client = client.map(|(certificate, key)| (certificate.as_path(), key.as_path()));
        let connection = timeout(CONNECT_TIMEOUT, self.endpoint.connect(&self.dial, roots, client));
        let connection = connection.await.unwrap_or_else(|_| {
            let (issuer, what) =
                (self.settings.address.clone(), IssuerProblem::ConnectTimeout(CONNECT_TIMEOUT));
            Err(HboneError::Issuer { issuer, what, source: None })
        })?;
        let grpc = Grpc::with_origin(connection, self.endpoint.origin().clone());
        Ok(grpc.max_decoding_message_size(MAX_RESPONSE))
    }
}

impl ControlPlaneStream {
    /// The next response. Cancel-safe.
    ///
    /// # Errors
    /// The stream has ended.
    pub async fn next(&mut self) -> Result<DeltaResponse, ControlPlaneError> {
        match self.responses.message().await {
            Ok(Some(response)) => Ok(response),
            Ok(None) => Err(ControlPlaneError::Closed),
            Err(status) => Err(refusal(&status)),
        }
    }

    /// Sends an answer. Waits while the control plane reads none, so that it cannot make the client
    /// keep answers without limit.
    ///
    /// # Errors
    /// The control plane has read no answer for a long time.
    pub async fn send(&self, answer: DeltaRequest) -> Result<(), ControlPlaneError> {
        let sent = timeout(READ_TIMEOUT, self.requests.send(answer)).await;
        // If the stream has ended, `next` reports it.
        sent.map(drop).map_err(|_| ControlPlaneError::Stalled(READ_TIMEOUT))
    }
}

/// All problems of the settings and of the files that they name. Connects to nothing.
#[must_use]
pub fn control_plane_problems(settings: &XdsSettings) -> Vec<ControlPlaneError> {
    let issuer = settings.address.clone();
    let endpoint = Endpoint::new(&settings.address, settings.server_name.as_deref());
    let client = settings.client.as_ref();
    let found = [
        endpoint.map(drop).map_err(|what| HboneError::Issuer { issuer, what, source: None }),
        read_roots(&settings.roots).map(drop),
        token(settings).map(drop),
        client.map_or(Ok(()), |(chain, key)| check_client((chain.as_path(), key.as_path()))),
    ];
    let found = found.into_iter().filter_map(Result::err).map(ControlPlaneError::Connect);
    headers(settings).err().into_iter().chain(found).collect()
}

/// The `authorization` header, from the current token file.
fn token(settings: &XdsSettings) -> Result<Option<MetadataValue<Ascii>>, HboneError> {
    let Some(file) = &settings.token else { return Ok(None) };
    // A token that was read is visible ASCII, which a header may contain.
    let header = format!("Bearer {}", read_token(file)?).parse::<MetadataValue<Ascii>>().ok();
    Ok(header.map(|mut header| {
        header.set_sensitive(true);
        header
    }))
}

fn headers(settings: &XdsSettings) -> Result<MetadataMap, ControlPlaneError> {
    let mut headers = MetadataMap::new();
    let further = settings.headers.iter().map(|header| (&*header.name, &*header.value));
    for (name, value) in std::iter::once(("clusterid", &*settings.cluster_id)).chain(further) {
        let header = || ControlPlaneError::Header(name.to_owned());
        let key: MetadataKey<Ascii> = name.parse().map_err(|_| header())?;
        headers.insert(key, value.parse().map_err(|_| header())?);
    }
    Ok(headers)
}

fn refusal(status: &Status) -> ControlPlaneError {
    let message = Quoted::new(status.message());
    if let Some(error) = status.source() {
        let error = io::Error::other(Quoted::new(error).to_string());
        return ControlPlaneError::Lost(Arc::new(error));
    }
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => {
            ControlPlaneError::Unauthenticated(message)
        }
        Code::Unavailable | Code::ResourceExhausted => ControlPlaneError::Unavailable(message),
        code => ControlPlaneError::Refused { status: code.description(), message },
    }
}

impl Hint for ControlPlaneError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Connect(HboneError::Issuer { what, .. }) => match what {
                IssuerProblem::Address => "correct mesh.xds.address",
                IssuerProblem::ServerName(_) => "correct mesh.xds.server_name",
                IssuerProblem::Tls => {
                    "check that mesh.xds.roots contains the root of the control plane, and that its certificate names \
                     mesh.xds.server_name"
                }
                IssuerProblem::Connect
                | IssuerProblem::ConnectTimeout(_)
                | IssuerProblem::HandshakeReset => {
                    "check that the control plane runs and that mesh.xds.address is right"
                }
                // The other problems are those of a CA or an agent.
                other => return other.hint(),
            },
            Self::Connect(error) => return error.hint(),
            Self::Header(_) => "correct mesh.xds.headers",
            Self::Unauthenticated(_) => {
                "check that the token in mesh.xds.token is valid and made for this control plane"
            }
            Self::Refused { .. } => "read the control plane's log",
            Self::Unavailable(_)
            | Self::Closed
            | Self::Lost(_)
            | Self::Timeout(_)
            | Self::Stalled(_) => return None,
        };
        Some(fixed.into())
    }
}

impl<D> fmt::Debug for ControlPlaneClient<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlPlaneClient")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
