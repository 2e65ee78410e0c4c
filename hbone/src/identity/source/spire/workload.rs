//! A source that follows a SPIRE agent's Workload API: our certificate, and the bundles of
//! federated trust domains.
//!
//! Not here: the protocol (the `spiffe` crate).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::transport::Endpoint;
use spiffe::{Certificate, WorkloadApiClient, WorkloadApiError, X509Context, X509Svid};
use tokio::time::timeout;
use underpass_config::{Quoted, SpiffeError, SpiffeId, SpireSettings};

use super::{ANSWER_TIMEOUT, agent_problem};
use crate::error::{CredentialProblem, HboneError, IssuerProblem};
use crate::identity::Identity;
use crate::identity::renewal::Schedule;
use crate::identity::source::{IdentitySource, NextIdentity};
use crate::trust::bundle::Bundle;

/// Follows the identities that a SPIRE agent assigns to this process.
pub struct WorkloadApiSource {
    settings: SpireSettings,
    workload: SpiffeId,
    stream: Option<Updates>,
    /// The time of the next connect.
    schedule: Schedule,
    /// The last update, which the agent repeats after each connect.
    last: Option<X509Context>,
}

struct Updates {
    stream: Pin<Box<dyn Stream<Item = Result<X509Context, WorkloadApiError>> + Send>>,
    has_answered: bool,
}

impl WorkloadApiSource {
    /// A source that prefers the certificate of `workload`; otherwise it uses the agent's first.
    pub fn new(settings: SpireSettings, workload: SpiffeId) -> Self {
        Self { settings, workload, stream: None, schedule: Schedule::new(), last: None }
    }

    async fn next_identity(&mut self) -> Result<Identity, HboneError> {
        loop {
            let next = match self.update().await {
                Ok(context) if self.last.as_ref() == Some(&context) => continue,
                Ok(context) => self.accept(context),
                Err(error) => Err(error),
            };
            if next.is_err() {
                self.stream = None;
                self.schedule.failed();
            }
            return next;
        }
    }

    /// The agent's next update. Cancel-safe.
    async fn update(&mut self) -> Result<X509Context, HboneError> {
        let stream = match self.stream.take() {
            Some(stream) => self.stream.insert(stream),
            None => {
                self.schedule.due().await;
                let opened = timeout(ANSWER_TIMEOUT, open(&self.settings.socket)).await;
                let opened = opened
                    .map_err(|_| self.problem(IssuerProblem::AgentTimeout(ANSWER_TIMEOUT)))?;
                self.stream.insert(opened.map_err(|error| self.api_problem(error))?)
            }
        };
        let update = match stream.has_answered {
            true => Ok(stream.stream.next().await),
            false => timeout(ANSWER_TIMEOUT, stream.stream.next()).await,
        };
        match update {
            Ok(Some(Ok(context))) => {
                stream.has_answered = true;
                self.schedule = Schedule::new();
                Ok(context)
            }
            Ok(Some(Err(error))) => Err(self.api_problem(error)),
            Ok(None) => Err(self.problem(IssuerProblem::AgentClosed)),
            Err(_) => Err(self.problem(IssuerProblem::AgentTimeout(ANSWER_TIMEOUT))),
        }
    }

    fn accept(&mut self, context: X509Context) -> Result<Identity, HboneError> {
        let unusable = |error: HboneError| match error {
            HboneError::Credential { what, .. } => self.problem(IssuerProblem::Answer(what)),
            other => other,
        };
        let identity = self.identity(&context).map_err(unusable)?;
        self.last = Some(context);
        Ok(identity)
    }

    fn identity(&self, context: &X509Context) -> Result<Identity, HboneError> {
        let socket = &self.settings.socket;
        let workload = self.workload.to_string();
        let is_ours = |svid: &&Arc<X509Svid>| svid.spiffe_id().to_string() == workload;
        let svid = context.svids().iter().find(is_ours).or_else(|| context.default_svid());
        let svid = svid.ok_or_else(|| self.problem(IssuerProblem::NotRegistered))?;
        let mut bundles = BTreeMap::new();
        for (trust_domain, bundle) in context.bundle_set().iter() {
            // A trust domain without roots is not trusted.
            if bundle.authorities().is_empty() {
                continue;
            }
            let roots = bundle.authorities().iter().map(der);
            let problem = |error: SpiffeError| {
                HboneError::credential(socket, CredentialProblem::Certificate(error.to_string()))
            };
            let trust_domain = trust_domain.as_str().parse().map_err(problem)?;
            bundles.insert(trust_domain, Bundle::from_der(socket, roots)?);
        }
        let chain = svid.cert_chain().iter().map(der).collect();
        let key = PrivateKeyDer::Pkcs8(svid.private_key().as_bytes().to_vec().into());
        Identity::new(socket, chain, key, bundles)?.valid_now(socket)
    }

    fn api_problem(&self, error: WorkloadApiError) -> HboneError {
        let what = match &error {
            WorkloadApiError::NoIdentityIssued | WorkloadApiError::PermissionDenied(_) => {
                IssuerProblem::NotRegistered
            }
            WorkloadApiError::EmptyResponse | WorkloadApiError::Transport(_) => {
                IssuerProblem::Agent
            }
            _ => {
                let reason = Quoted::new(&error).to_string();
                IssuerProblem::Answer(CredentialProblem::Certificate(reason))
            }
        };
        let source = io::Error::other(Quoted::new(error).to_string());
        agent_problem(&self.settings.socket, what, Some(source))
    }

    fn problem(&self, what: IssuerProblem) -> HboneError {
        agent_problem(&self.settings.socket, what, None)
    }
}

impl IdentitySource for WorkloadApiSource {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(self.next_identity())
    }
}

impl fmt::Debug for WorkloadApiSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadApiSource")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

async fn open(socket: &Path) -> Result<Updates, WorkloadApiError> {
    let client = WorkloadApiClient::connect(Endpoint::Unix(socket.to_owned())).await?;
    let stream = Box::pin(client.stream_x509_contexts().await?);
    Ok(Updates { stream, has_answered: false })
}

fn der(certificate: &Certificate) -> CertificateDer<'static> {
    CertificateDer::from(certificate.as_bytes().to_vec())
}

#[cfg(test)]
mod tests;
