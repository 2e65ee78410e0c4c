//! Answers a request for a certificate: authenticates the client, verifies the key, and authorizes
//! the identity.

use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use hyper::body::Incoming;
use prost_types::{Struct, value::Kind};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use underpass_config::{Quoted, SpiffeId};

use crate::ca::clients::Clients;
use crate::ca::{
    CREATE_CERTIFICATE, CertificateAuthority, CertificateRequest, IMPERSONATED,
    IstioCertificateRequest, IstioCertificateResponse, Serial,
};
use crate::error::HboneError;
use crate::limits::ConnectionSlot;
use crate::limits::log_limit::LogLimit;

/// The maximum size of a request in bytes. A certificate request has a few hundred.
const MAX_REQUEST: usize = 64 << 10;
/// The validity of a certificate if the request contains none.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Answers requests of Istio's CA protocol.
#[derive(Debug)]
pub(super) struct Service {
    dir: PathBuf,
    max_ttl: Duration,
    clients: watch::Sender<Clients>,
}

/// The fields of a request that the log contains.
#[derive(Debug, Default)]
struct ParsedRequest {
    client: Option<String>,
    spiffe_id: Option<SpiffeId>,
}

impl Service {
    pub(super) fn new(dir: PathBuf, max_ttl: Duration, clients: Clients) -> Self {
        Self { dir, max_ttl, clients: watch::Sender::new(clients) }
    }

    pub(super) fn set_clients(&self, clients: Clients) {
        self.clients.send_replace(clients);
    }

    pub(super) async fn answer(
        self: Arc<Self>,
        peer: SocketAddr,
        slot: &Arc<ConnectionSlot>,
        request: http::Request<Incoming>,
    ) -> http::Response<Body> {
        if request.method() != Method::POST || request.uri().path() != CREATE_CERTIFICATE {
            return Status::unimplemented(format!(
                "unknown method; only {CREATE_CERTIFICATE} is supported"
            ))
            .into_http();
        }
        let mut grpc = Grpc::new(ProstCodec::default()).max_decoding_message_size(MAX_REQUEST);
        let slot = slot.clone();
        grpc.unary(CreateCertificate { service: self, peer, slot }, request).await
    }

    /// Answers a request and logs the result.
    fn create(
        &self,
        peer: SocketAddr,
        slot: &ConnectionSlot,
        request: &Request<IstioCertificateRequest>,
    ) -> Result<IstioCertificateResponse, Status> {
        let mut parsed = ParsedRequest::default();
        let answer = self.decide(request, &mut parsed);
        let ParsedRequest { client, spiffe_id } = parsed;
        if client.is_some() {
            slot.mark_authenticated();
        }
        let client = client.as_deref().unwrap_or("unknown");
        let spiffe_id = spiffe_id.map(Quoted::new);
        let spiffe_id = spiffe_id.as_ref().map(Quoted::as_str).unwrap_or_default();
        match answer {
            Ok((answer, ttl)) => {
                // The operator needs the serial number to revoke the certificate.
                let leaf = answer.cert_chain.first().and_then(|leaf| Serial::of(leaf).ok());
                let serial = leaf.map(|serial| serial.to_string());
                tracing::info!(%peer, client, spiffe_id, ?ttl, serial, "certificate issued");
                Ok(answer)
            }
            Err(status) => {
                static LIMIT: LogLimit = LogLimit::new("refused certificates");
                if LIMIT.admit(status.code().description()) {
                    let reason = Quoted::bounded(status.message(), Quoted::MAX_CHAIN_BYTES);
                    let reason = reason.as_str();
                    tracing::warn!(%peer, client, spiffe_id, reason, "certificate refused");
                }
                Err(status)
            }
        }
    }

    fn decide(
        &self,
        request: &Request<IstioCertificateRequest>,
        parsed: &mut ParsedRequest,
    ) -> Result<(IstioCertificateResponse, Duration), Status> {
        let clients = self.clients.borrow();
        let clients_with_token = clients.clients_with_token(token(request.metadata())?);
        let clients_with_token = clients_with_token.ok_or_else(|| {
            Status::unauthenticated("the token is not in the clients file of this CA")
        })?;
        parsed.client = Some(clients_with_token.to_string());
        let message = request.get_ref();
        let csr = CertificateRequest::from_pem(&message.csr)
            .map_err(|problem| Status::invalid_argument(format!("invalid CSR: {problem}")))?;
        let id = requested_id(&csr, message.metadata.as_ref())?;
        parsed.spiffe_id = Some(id.clone());
        if !clients_with_token.is_allowed(&id) {
            return Err(Status::permission_denied(format!(
                "the clients file of this CA does not list {id} for this token"
            )));
        }
        let authority =
            CertificateAuthority::open(&self.dir).map_err(|error| internal_error(&error))?;
        if id.trust_domain() != authority.trust_domain() {
            let trust_domain = authority.trust_domain();
            return Err(Status::permission_denied(format!(
                "this CA issues for trust domain {trust_domain}, not for {id}"
            )));
        }
        let ttl = self.ttl(message.validity_duration);
        let leaf = authority.sign(&csr, &id, ttl).map_err(|error| internal_error(&error))?;
        let cert_chain = vec![leaf, authority.roots_pem().to_owned()];
        Ok((IstioCertificateResponse { cert_chain }, ttl))
    }

    fn ttl(&self, seconds: i64) -> Duration {
        let requested = match u64::try_from(seconds) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds),
            _ => DEFAULT_TTL,
        };
        requested.min(self.max_ttl)
    }
}

/// Reads the bearer token (RFC 6750 section 2.1).
fn token(metadata: &MetadataMap) -> Result<&str, Status> {
    let header = metadata.get("authorization").and_then(|header| header.to_str().ok());
    let token = header.and_then(|header| {
        let (scheme, token) = header.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    token.ok_or_else(|| Status::unauthenticated("missing header: authorization: Bearer TOKEN"))
}

/// The requested identity, from the metadata (where a node names its workload) or from the signing
/// request. If both name one, they must be equal.
fn requested_id(csr: &CertificateRequest, metadata: Option<&Struct>) -> Result<SpiffeId, Status> {
    let named = metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED));
    let named = named.map(|value| match &value.kind {
        Some(Kind::StringValue(id)) => id.parse::<SpiffeId>().map_err(|error| {
            Status::invalid_argument(format!("{IMPERSONATED} is not a SPIFFE identity: {error}"))
        }),
        _ => Err(Status::invalid_argument(format!("{IMPERSONATED} is not a string"))),
    });
    match (named.transpose()?, csr.spiffe_id()) {
        (Some(named), Some(own)) if named != *own => Err(Status::invalid_argument(format!(
            "the CSR is for {own}, but {IMPERSONATED} is {named}"
        ))),
        (Some(id), _) => Ok(id),
        (None, Some(id)) => Ok(id.clone()),
        (None, None) => Err(Status::invalid_argument(
            "neither the CSR nor the metadata contains a SPIFFE identity",
        )),
    }
}

/// Replaces an error of the server's own files by a general one, which discloses nothing to
/// clients.
fn internal_error(error: &HboneError) -> Status {
    tracing::error!(error = error as &dyn std::error::Error, "cannot use the authority");
    Status::internal("the CA cannot use its own files; see its log")
}

/// The gRPC method `CreateCertificate`, as tonic's service trait requires it.
struct CreateCertificate {
    service: Arc<Service>,
    peer: SocketAddr,
    slot: Arc<ConnectionSlot>,
}

impl UnaryService<IstioCertificateRequest> for CreateCertificate {
    type Response = IstioCertificateResponse;
    type Future = Ready<Result<Response<IstioCertificateResponse>, Status>>;

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        ready(self.service.create(self.peer, &self.slot, &request).map(Response::new))
    }
}
