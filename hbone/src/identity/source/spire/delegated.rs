//! A source that follows a SPIRE agent's Delegated Identity API: the certificate of one workload of
//! the node, and the bundles of the trust domains that it federates with.
//!
//! The agent selects registration entries by the selectors that its Kubernetes attestor gives to a
//! pod: `k8s:ns:NAMESPACE` and `k8s:sa:SERVICE ACCOUNT`. The source uses only a certificate with
//! the workload's own identity.

mod messages;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;

use http::uri::PathAndQuery;
use prost::Message;
use rustls_pki_types::CertificateDer;
use spiffe::transport::{self, Endpoint};
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;
use underpass_config::{Quoted, SpiffeError, SpiffeId, SpireSettings, TrustDomain};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use self::messages::{BundleRequest, Bundles, Selector, SvidRequest, Svids};
use super::{ANSWER_TIMEOUT, agent_problem};
use crate::error::{CredentialProblem, HboneError, IssuerProblem};
use crate::identity::identity_pem::IdentityPem;
use crate::identity::renewal::Schedule;
use crate::identity::source::{IdentitySource, NextIdentity, NextPem, PemSource};
use crate::identity::svid::workload_id;
use crate::identity::{Identity, pem};

const SUBSCRIBE_TO_SVIDS: &str =
    "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs";
const SUBSCRIBE_TO_BUNDLES: &str =
    "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles";
/// Maximum size of an update: certificates of one workload, or the bundles of all trust domains.
const MAX_UPDATE: usize = 4 << 20;

/// Follows the identity that a SPIRE agent has for one workload of its node.
pub struct DelegatedIdentitySource {
    settings: SpireSettings,
    workload: SpiffeId,
    subscription: Option<Subscription>,
    /// The time of the next connect.
    schedule: Schedule,
    /// The last update that was used, which the agent repeats after each connect.
    last: Option<Update>,
}

/// The streams of one connection, and their last messages.
struct Subscription {
    svids: Streaming<Svids>,
    bundles: Streaming<Bundles>,
    update: Update,
}

/// The last message of each stream.
#[derive(Debug, Clone, Default, PartialEq)]
struct Update {
    svids: Option<Svids>,
    bundles: Option<Bundles>,
}

impl DelegatedIdentitySource {
    /// A source of the certificates of `workload`, from the agent's admin socket.
    pub fn new(settings: SpireSettings, workload: SpiffeId) -> Self {
        Self { settings, workload, subscription: None, schedule: Schedule::new(), last: None }
    }

    async fn next_update(&mut self) -> Result<(IdentityPem, Identity), HboneError> {
        loop {
            let update = match self.update().await {
                Ok(update) if self.last.as_ref() == Some(&update) => continue,
                Ok(update) => update,
                Err(error) => {
                    self.subscription = None;
                    self.schedule.failed();
                    return Err(error);
                }
            };
            // The streams stay open after an unusable update: the agent sends the next one when
            // the registration entries change.
            let identity = self.identity(&update);
            self.last = Some(update);
            return identity;
        }
    }

    /// The next update that has both parts. Cancel-safe.
    async fn update(&mut self) -> Result<Update, HboneError> {
        if self.subscription.is_none() {
            self.schedule.due().await;
            let opened = timeout(ANSWER_TIMEOUT, open(&self.settings.socket, &self.workload)).await;
            let opened =
                opened.map_err(|_| self.problem(IssuerProblem::AgentTimeout(ANSWER_TIMEOUT)))?;
            self.subscription = Some(opened.map_err(|error| self.open_problem(error))?);
        }
        let Some(subscription) = &mut self.subscription else {
            return Err(self.problem(IssuerProblem::AgentClosed));
        };
        let received = match subscription.update.is_complete() {
            true => Ok(subscription.next().await),
            false => timeout(ANSWER_TIMEOUT, subscription.next()).await,
        };
        match received {
            Ok(Ok(Some(update))) => {
                self.schedule = Schedule::new();
                Ok(update)
            }
            Ok(Ok(None)) => Err(self.problem(IssuerProblem::AgentClosed)),
            Ok(Err(status)) => Err(self.refusal(&status)),
            Err(_) => Err(self.problem(IssuerProblem::AgentTimeout(ANSWER_TIMEOUT))),
        }
    }

    fn identity(&self, update: &Update) -> Result<(IdentityPem, Identity), HboneError> {
        let unusable = |error: HboneError| match error {
            HboneError::Credential { what, .. } => self.problem(IssuerProblem::Answer(what)),
            other => other,
        };
        let Update { svids: Some(svids), bundles: Some(bundles) } = update else {
            return Err(self.problem(IssuerProblem::AgentClosed));
        };
        let (chain, key) = self.own_svid(svids)?;
        let socket = &self.settings.socket;
        let bundles = self.bundles(bundles, &svids.federates_with).map_err(unusable)?;
        let pem = IdentityPem { chain, key, bundles };
        let identity = pem.identity(socket).map_err(unusable)?;
        Ok((pem, identity))
    }

    /// The chain and the key of the certificate that has the workload's identity, in PEM.
    fn own_svid(&self, svids: &Svids) -> Result<(String, String), HboneError> {
        let mut others = Vec::new();
        for svid in &svids.x509_svids {
            let chain = svid.x509_svid.as_ref().map_or(&[][..], |svid| &svid.cert_chain);
            let leaf = chain.first().map(Vec::as_slice).unwrap_or_default();
            let id = workload_id(leaf).map_err(|problem| {
                self.problem(IssuerProblem::Answer(CredentialProblem::Svid(problem)))
            })?;
            if id == self.workload {
                let chain: Vec<_> =
                    chain.iter().map(|der| CertificateDer::from_slice(der)).collect();
                return Ok((pem::of_certificates(&chain), pem::of_key(&svid.x509_svid_key)));
            }
            others.push(id.to_string());
        }
        if others.is_empty() {
            return Err(self.problem(IssuerProblem::NotRegistered));
        }
        let (requested, got) = (self.workload.clone(), Quoted::new(others.join(" ")));
        Err(self.problem(IssuerProblem::WrongIdentity { requested, got }))
    }

    /// The roots of the workload's trust domain and of those that it federates with, in PEM.
    fn bundles(
        &self,
        bundles: &Bundles,
        federates_with: &[String],
    ) -> Result<BTreeMap<TrustDomain, String>, HboneError> {
        let own = self.workload.trust_domain();
        let mut trusted = BTreeMap::new();
        for (name, roots) in &bundles.ca_certificates {
            let is_federated = federates_with.iter().any(|other| domain(other) == domain(name));
            // A trust domain without roots is not trusted.
            if roots.is_empty() || domain(name) != own.as_str() && !is_federated {
                continue;
            }
            let trust_domain = domain(name)
                .parse()
                .map_err(|error: SpiffeError| self.certificate_problem(error.to_string()))?;
            trusted.insert(trust_domain, pem::of_certificates(&self.split(roots)?));
        }
        Ok(trusted)
    }

    /// The certificates of a bundle, which follow each other without a separator.
    fn split<'a>(&self, mut rest: &'a [u8]) -> Result<Vec<CertificateDer<'a>>, HboneError> {
        let mut certificates = Vec::new();
        while !rest.is_empty() {
            let (after, _) = X509Certificate::from_der(rest)
                .map_err(|error| self.certificate_problem(error.to_string()))?;
            let (certificate, _) = rest.split_at(rest.len() - after.len());
            certificates.push(CertificateDer::from_slice(certificate));
            rest = after;
        }
        Ok(certificates)
    }

    fn certificate_problem(&self, reason: String) -> HboneError {
        let reason = Quoted::new(reason).to_string();
        HboneError::credential(&self.settings.socket, CredentialProblem::Certificate(reason))
    }

    fn open_problem(&self, error: OpenError) -> HboneError {
        match error {
            OpenError::Selectors => self.problem(IssuerProblem::NotRegistered),
            OpenError::Connect(error) => {
                let source = io::Error::other(Quoted::new(error).to_string());
                agent_problem(&self.settings.socket, IssuerProblem::Agent, Some(source))
            }
            OpenError::Subscribe(status) => self.refusal(&status),
        }
    }

    fn refusal(&self, status: &Status) -> HboneError {
        let message = Quoted::new(status.message());
        self.problem(match status.code() {
            Code::PermissionDenied => IssuerProblem::NotDelegate(message),
            Code::Unavailable => IssuerProblem::AgentClosed,
            code => IssuerProblem::Refused { status: code.description(), message },
        })
    }

    fn problem(&self, what: IssuerProblem) -> HboneError {
        agent_problem(&self.settings.socket, what, None)
    }
}

impl IdentitySource for DelegatedIdentitySource {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(async { Ok(self.next_update().await?.1) })
    }
}

impl PemSource for DelegatedIdentitySource {
    fn next_pem(&mut self) -> NextPem<'_> {
        Box::pin(async { Ok(self.next_update().await?.0) })
    }
}

impl fmt::Debug for DelegatedIdentitySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DelegatedIdentitySource")
            .field("settings", &self.settings)
            .field("workload", &self.workload)
            .finish_non_exhaustive()
    }
}

impl Update {
    fn is_complete(&self) -> bool {
        self.svids.is_some() && self.bundles.is_some()
    }
}

impl Subscription {
    /// The next update that has both parts; `None` at the end of a stream. Cancel-safe.
    async fn next(&mut self) -> Result<Option<Update>, Status> {
        loop {
            tokio::select! {
                svids = self.svids.message() => match svids? {
                    Some(svids) => self.update.svids = Some(svids),
                    None => return Ok(None),
                },
                bundles = self.bundles.message() => match bundles? {
                    Some(bundles) => self.update.bundles = Some(bundles),
                    None => return Ok(None),
                },
            }
            if self.update.is_complete() {
                return Ok(Some(self.update.clone()));
            }
        }
    }
}

/// Why the agent's streams could not be opened.
enum OpenError {
    /// The identity names no namespace and service account.
    Selectors,
    Connect(transport::TransportError),
    Subscribe(Status),
}

async fn open(socket: &Path, workload: &SpiffeId) -> Result<Subscription, OpenError> {
    let (namespace, account) =
        workload.namespace_and_service_account().ok_or(OpenError::Selectors)?;
    let selector = |value| Selector { r#type: "k8s".to_owned(), value };
    let selectors = vec![selector(format!("ns:{namespace}")), selector(format!("sa:{account}"))];
    let endpoint = Endpoint::Unix(socket.to_owned());
    let channel = transport::connect(&endpoint).await.map_err(OpenError::Connect)?;
    let svids = subscribe(&channel, SUBSCRIBE_TO_SVIDS, SvidRequest { selectors });
    let bundles = subscribe(&channel, SUBSCRIBE_TO_BUNDLES, BundleRequest {});
    let (svids, bundles) = tokio::try_join!(svids, bundles).map_err(OpenError::Subscribe)?;
    Ok(Subscription { svids, bundles, update: Update::default() })
}

async fn subscribe<Q, A>(
    channel: &Channel,
    path: &'static str,
    request: Q,
) -> Result<Streaming<A>, Status>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(MAX_UPDATE);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::from_static(path);
    let codec = ProstCodec::<Q, A>::default();
    Ok(grpc.server_streaming(Request::new(request), path, codec).await?.into_inner())
}

/// The name of a trust domain, which the agent writes as a SPIFFE ID.
fn domain(name: &str) -> &str {
    name.strip_prefix("spiffe://").unwrap_or(name)
}

#[cfg(test)]
mod tests;
