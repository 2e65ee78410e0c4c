//! Answers the queries of one pod: from the mesh, or by forwarding them to the pod's servers.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::FutureExt as _;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use underpass_config::{Ipv6, Settings};

use super::exchange::SocketExchange;
use super::forward::{ForwardedQuery, Forwarder, Reply};
use super::lookup_limit::LookupLimit;
use super::mesh::{self, PodView};
use super::message::{self, CLASS_IN, Malformed, Query, RecordType, ResponseCode};
use super::report::{self, AnswerSource, Failure, FailureLog};
use super::resolv_conf::ResolvConf;
use super::resolver_settings::ResolverSettings;
use super::response::{self, Transport};
use super::upstream::Upstream;
use crate::decide::snapshot::Snapshot;
use crate::mesh::on_demand::{Lookups, Wait};
use crate::node::Node;
use crate::node::pod::Pod;

/// How long a query waits for a lookup on demand: less than the timeout of any resolver.
const LOOKUP_WAIT: Duration = Duration::from_secs(1);
/// The maximum number of TCP connections of a pod's applications. Further ones wait in the kernel.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// Answers the queries of one pod.
#[derive(Debug)]
pub(crate) struct DnsService {
    view: PodView,
    mesh: watch::Receiver<Arc<Snapshot>>,
    lookups: Lookups,
    lookup_limit: LookupLimit,
    resolver: ResolverSettings,
    forwarder: Arc<Forwarder>,
    pub(super) connections: Arc<Semaphore>,
}

impl DnsService {
    fn new(
        view: PodView,
        mesh: watch::Receiver<Arc<Snapshot>>,
        (lookups, lookup_limit): (Lookups, LookupLimit),
        resolver: ResolverSettings,
        forwarder: Arc<Forwarder>,
    ) -> Arc<Self> {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Arc::new(Self { view, mesh, lookups, lookup_limit, resolver, forwarder, connections })
    }

    /// The service of a pod with these settings.
    pub(crate) fn of_pod(node: &Node, pod: &Pod, settings: &Settings) -> Arc<Self> {
        let view = PodView {
            namespace: settings.workload.namespace.clone(),
            network: settings.workload.network.clone(),
            domain: settings.dns.domain.clone(),
            ipv6: settings.interception.ipv6 == Ipv6::Capture,
        };
        let resolver = ResolverSettings::new(node.resolv_file.clone(), settings);
        let (sockets, limits) = (pod.sockets.clone(), pod.limits.clone());
        let upstream = Upstream::new(Arc::new(SocketExchange { sockets, limits }));
        let failures = FailureLog::new(&settings.workload, pod.failed_names.clone());
        let forwarder = Forwarder::new(upstream, failures, settings.dns.queries_per_second);
        let limit = LookupLimit::new(settings.dns.lookups_per_second);
        Self::new(view, node.mesh.clone(), (pod.lookups.clone(), limit), resolver, forwarder)
    }

    /// Serves a message of a client.
    pub(crate) fn serve(self: &Arc<Self>, message: &[u8], transport: Transport) -> Reply {
        self.serve_after_lookup(message, transport, !self.lookups.are_on_demand())
    }

    /// Serves a message. If the mesh may have the name and was not asked for it, asks first.
    fn serve_after_lookup(
        self: &Arc<Self>,
        message: &[u8],
        transport: Transport,
        is_looked_up: bool,
    ) -> Reply {
        let query = match Query::read(message) {
            Ok(query) => query,
            Err(Malformed::Ignored) => return Reply::Nothing,
            Err(Malformed::Rejected(code)) => {
                report::answered(AnswerSource::None, code);
                return message::rejection(message, code).map_or(Reply::Nothing, Reply::Now);
            }
        };
        if let Some(response) = response::unsupported_version(&query) {
            report::answered(AnswerSource::None, ResponseCode::BAD_VERSION);
            return Reply::Now(response);
        }
        let settings = self.resolver.current();
        let found = self.find(&query, &settings);
        if !is_looked_up && found.is_none() && self.has_unanswered_lookup(&query, &settings) {
            let looking_up = self.clone().look_up(query, settings, message.into(), transport);
            return Reply::Later(looking_up.boxed());
        }
        report::requested(&query, transport);
        let is_address = matches!(query.kind, RecordType::A | RecordType::AAAA);
        if let Some(found) = found.as_ref().filter(|_| is_address) {
            let mut addresses = found.addresses.clone();
            fastrand::shuffle(&mut addresses);
            let response = response::of_addresses(&query, found.alias, &addresses, transport);
            report::answered(AnswerSource::Mesh, message::code(&response));
            return Reply::Now(response);
        }
        let (query, message, is_in_mesh) = (Arc::new(query), message.into(), found.is_some());
        let forwarded = ForwardedQuery { query, message, transport, settings, is_in_mesh };
        self.forwarder.forward(forwarded)
    }

    fn find(&self, query: &Query, settings: &ResolvConf) -> Option<mesh::Found> {
        let snapshot = self.mesh.borrow();
        let (mesh, search) = (&snapshot.mesh, &settings.search);
        match query.class {
            CLASS_IN => mesh::find(mesh, &self.view, search, &query.name, query.kind),
            _ => None,
        }
    }

    fn has_unanswered_lookup(&self, query: &Query, settings: &ResolvConf) -> bool {
        let mesh = &self.mesh.borrow().mesh;
        let lookups = mesh::lookups(mesh, &self.view, &settings.search, &query.name);
        lookups.iter().any(|lookup| !mesh.is_answered(lookup))
    }

    /// Asks the control plane for the name, and serves the message afterwards. Without an answer
    /// the query fails: the name may be one of the mesh.
    async fn look_up(
        self: Arc<Self>,
        query: Query,
        settings: Arc<ResolvConf>,
        message: Box<[u8]>,
        transport: Transport,
    ) -> Vec<u8> {
        let refuse = |failure: Failure<'_>| {
            report::requested(&query, transport);
            self.forwarder.refuse(&query, transport, failure)
        };
        let permit = match self.forwarder.hold() {
            Ok(permit) => permit,
            Err(failure) => return refuse(failure),
        };
        let needed = |snapshot: &Snapshot| {
            mesh::lookups(&snapshot.mesh, &self.view, &settings.search, &query.name)
        };
        let current = self.mesh.borrow().clone();
        let unasked = self.lookups.count_unasked(&current, &needed(&current));
        if !self.lookup_limit.admit(unasked).await {
            return refuse(Failure::LookupRate);
        }
        let current = self.mesh.borrow().clone();
        let wait = Wait { since: Instant::now(), within: LOOKUP_WAIT };
        let found = self.lookups.resolve(current, &self.mesh, needed, wait).await;
        drop(permit);
        let _lease = match found {
            Ok((_, lease)) => lease,
            Err(error) => return refuse(Failure::Lookup(&error)),
        };
        match self.serve_after_lookup(&message, transport, true) {
            Reply::Nothing => Vec::new(),
            Reply::Now(response) => response,
            Reply::Later(response) => response.await,
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
