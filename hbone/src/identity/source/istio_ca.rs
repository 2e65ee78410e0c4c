//! A client of Istio's CA protocol: `CreateCertificate` of istiod or `underpass ca serve`.
//!
//! Each request opens a connection: requests are rare, and an idle connection would need keepalive.
//! `ca::server` is the server.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::uri::PathAndQuery;
use prost_types::{Struct, Value, value::Kind};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use underpass_config::{IstioCaSettings, Quoted, SpiffeId};

use super::{IdentitySource, NextIdentity, Priority};
use crate::ca::{
    CREATE_CERTIFICATE, IMPERSONATED, IstioCertificateRequest, IstioCertificateResponse, read_token,
};
use crate::clock;
use crate::control_plane::endpoint::{Connection, Endpoint, read_roots};
use crate::error::{CredentialProblem, HboneError, IssuerProblem};
use crate::identity::Identity;
use crate::identity::renewal::Schedule;
use crate::identity::svid::workload_id;
use crate::limits::{Budget, Queue};
use crate::pool::Dial;
use crate::trust::bundle::Bundle;

/// The maximum number of concurrent requests: a node may start many workloads, and a CA may serve
/// many nodes.
const MAX_CONCURRENT_REQUESTS: usize = 8;
/// The timeout of connecting, including TLS and HTTP/2.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The timeout of the CA's answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum size of an answer in bytes: a certificate chain and roots.
const MAX_ANSWER: usize = 1 << 20;

/// A client of a CA with Istio's protocol. All workloads of a process share it.
pub struct IstioCa<D> {
    settings: IstioCaSettings,
    endpoint: Endpoint,
    cluster_id: MetadataValue<Ascii>,
    dial: D,
    requests: Arc<Budget>,
    queue: Queue<Priority>,
}

impl<D: Dial> IstioCa<D> {
    /// Creates a client that connects with `dial`, and sends nothing yet.
    ///
    /// # Errors
    /// [`HboneError::Issuer`] for an invalid setting. [`HboneError::Credential`] for an unreadable
    /// token or roots file; each request reads both again.
    pub fn new(settings: IstioCaSettings, dial: D) -> Result<Self, HboneError> {
        let issuer = &settings.address;
        let problem = |what| HboneError::Issuer { issuer: issuer.clone(), what, source: None };
        let endpoint = Endpoint::new(issuer, settings.server_name.as_deref()).map_err(problem)?;
        let cluster_id = settings.cluster_id.parse();
        let cluster_id = cluster_id.map_err(|_| problem(IssuerProblem::ClusterId))?;
        let (requests, queue) = (Arc::new(Budget::new(MAX_CONCURRENT_REQUESTS)), Queue::default());
        let ca = Self { settings, endpoint, cluster_id, dial, requests, queue };
        // Report an unreadable token or unreadable roots now, not at the first request.
        token(&ca.settings)?;
        read_roots(&ca.settings.roots)?;
        Ok(ca)
    }

    /// Requests a certificate for `id` and a new key.
    async fn issue(&self, id: &SpiffeId, priority: Priority) -> Result<Identity, HboneError> {
        let _permit = self.queue.turn(&self.requests, priority, || ()).await;
        let token = token(&self.settings)?;
        let (key, csr) = signing_request(id)
            .map_err(|error| HboneError::credential(id.to_string(), issue_problem(&error)))?;
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.settings.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: self.settings.impersonate.then(|| impersonating(id)),
        });
        request.metadata_mut().insert("authorization", token);
        request.metadata_mut().insert("clusterid", self.cluster_id.clone());
        let roots = read_roots(&self.settings.roots)?;
        let connection = timeout(CONNECT_TIMEOUT, self.endpoint.connect(&self.dial, roots, None))
            .await
            .map_err(|_| self.problem(IssuerProblem::ConnectTimeout(CONNECT_TIMEOUT)))??;
        let answer = timeout(REPLY_TIMEOUT, self.ask(connection, request))
            .await
            .map_err(|_| self.problem(IssuerProblem::ReplyTimeout(REPLY_TIMEOUT)))?;
        let answer = answer.map_err(|status| self.refusal(id, &status))?;
        identity(Path::new(&self.settings.address), &answer, &key, id)
            .map_err(|what| self.problem(what))
    }

    async fn ask(
        &self,
        connection: Connection,
        request: Request<IstioCertificateRequest>,
    ) -> Result<IstioCertificateResponse, Status> {
        let mut grpc = Grpc::with_origin(connection, self.endpoint.origin().clone())
            .max_decoding_message_size(MAX_ANSWER);
        let path = PathAndQuery::from_static(CREATE_CERTIFICATE);
        Ok(grpc.unary(request, path, ProstCodec::default()).await?.into_inner())
    }

    fn refusal(&self, id: &SpiffeId, status: &Status) -> HboneError {
        let message = Quoted::new(status.message());
        let broken = status.source();
        let what = match status.code() {
            // tonic made this status from a broken connection; the CA sent none.
            _ if broken.is_some() => IssuerProblem::Lost,
            Code::Unauthenticated => IssuerProblem::Unauthenticated(message),
            Code::PermissionDenied => IssuerProblem::Denied { id: id.clone(), message },
            Code::Unavailable => IssuerProblem::Unavailable(message),
            code => IssuerProblem::Refused { status: code.description(), message },
        };
        let source = broken.map(|error| Arc::new(io::Error::other(Quoted::new(error).to_string())));
        HboneError::Issuer { issuer: self.settings.address.clone(), what, source }
    }

    fn problem(&self, what: IssuerProblem) -> HboneError {
        HboneError::Issuer { issuer: self.settings.address.clone(), what, source: None }
    }
}

/// All problems of the settings and of the files that they name. Connects to nothing.
#[must_use]
pub fn istio_ca_problems(settings: &IstioCaSettings) -> Vec<HboneError> {
    let problem =
        |what| HboneError::Issuer { issuer: settings.address.clone(), what, source: None };
    let endpoint = Endpoint::new(&settings.address, settings.server_name.as_deref());
    let cluster_id = settings.cluster_id.parse::<MetadataValue<Ascii>>();
    let found = [
        endpoint.map(drop).map_err(problem),
        cluster_id.map(drop).map_err(|_| problem(IssuerProblem::ClusterId)),
        read_roots(&settings.roots).map(drop),
        token(settings).map(drop),
    ];
    found.into_iter().filter_map(Result::err).collect()
}

/// The `authorization` header, with the token in the file.
fn token(settings: &IstioCaSettings) -> Result<MetadataValue<Ascii>, HboneError> {
    let file = &settings.token;
    let header = format!("Bearer {}", read_token(file)?).parse::<MetadataValue<Ascii>>();
    let mut header = header.map_err(|_| HboneError::credential(file, CredentialProblem::Token))?;
    header.set_sensitive(true);
    Ok(header)
}

impl<D> fmt::Debug for IstioCa<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IstioCa").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// The certificates of one workload, requested from a CA with Istio's protocol.
#[derive(Debug)]
pub struct IstioCaSource<D> {
    ca: Arc<IstioCa<D>>,
    spiffe_id: SpiffeId,
    /// The priority of requests while there is no valid certificate.
    priority: Priority,
    /// The expiry of the current certificate.
    expires: Option<SystemTime>,
    schedule: Schedule,
}

impl<D: Dial> IstioCaSource<D> {
    /// Creates a source of certificates for `spiffe_id`. Requests have `priority` while there is no
    /// valid certificate, otherwise `Background`.
    pub fn new(ca: Arc<IstioCa<D>>, spiffe_id: SpiffeId, priority: Priority) -> Self {
        Self { ca, spiffe_id, priority, expires: None, schedule: Schedule::new() }
    }

    async fn next_identity(&mut self) -> Result<Identity, HboneError> {
        self.schedule.due().await;
        let is_renewal = self.expires.is_some_and(|expires| expires > clock::now());
        let priority = if is_renewal { Priority::Background } else { self.priority };
        let issued = self.ca.issue(&self.spiffe_id, priority).await;
        match &issued {
            Ok(identity) => {
                self.expires = Some(identity.expires());
                self.schedule.succeeded(identity.expires());
            }
            Err(_) => self.schedule.failed(),
        }
        issued
    }
}

impl<D: Dial> IdentitySource for IstioCaSource<D> {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(self.next_identity())
    }
}

/// Generates a key and its certificate signing request, without a subject and with one critical
/// name (RFC 5280 section 4.2.1.6).
fn signing_request(id: &SpiffeId) -> Result<(KeyPair, String), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.to_string())?)];
    let csr = params.serialize_request(&key)?.pem()?;
    Ok((key, csr))
}

fn impersonating(id: &SpiffeId) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(id.to_string())) };
    Struct { fields: BTreeMap::from([(IMPERSONATED.to_owned(), value)]) }
}

/// Reads the identity in the answer, which must be a certificate of `id` for `key`.
fn identity(
    issuer: &Path,
    answer: &IstioCertificateResponse,
    key: &KeyPair,
    id: &SpiffeId,
) -> Result<Identity, IssuerProblem> {
    let Some((roots, chain)) =
        answer.cert_chain.split_last().filter(|(_, chain)| !chain.is_empty())
    else {
        return Err(IssuerProblem::EmptyResponse(answer.cert_chain.len()));
    };
    let unusable = |error: HboneError| match error {
        HboneError::Credential { what, .. } => IssuerProblem::Answer(what),
        other => {
            IssuerProblem::Answer(CredentialProblem::Certificate(Quoted::new(other).to_string()))
        }
    };
    let chain: Vec<_> = chain
        .iter()
        .flat_map(|pem| CertificateDer::pem_slice_iter(pem.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|error| IssuerProblem::Answer(CredentialProblem::Pem(error.to_string())))?;
    let bundle = Bundle::from_pem(issuer, roots.as_bytes()).map_err(unusable)?;
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let bundles = BTreeMap::from([(id.trust_domain().clone(), bundle)]);
    let leaf = chain.first().map(AsRef::as_ref).unwrap_or_default();
    let got = workload_id(leaf)
        .map_err(|problem| IssuerProblem::Answer(CredentialProblem::Svid(problem)))?;
    if got != *id {
        let got = Quoted::new(got);
        return Err(IssuerProblem::WrongIdentity { requested: id.clone(), got });
    }
    let identity = Identity::new(issuer, chain, key, bundles).map_err(unusable)?;
    identity.valid_now(issuer).map_err(unusable)
}

fn issue_problem(error: &rcgen::Error) -> CredentialProblem {
    CredentialProblem::Issue(error.to_string())
}

#[cfg(test)]
mod tests;
