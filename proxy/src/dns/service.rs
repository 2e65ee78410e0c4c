//! Answers the queries of one pod: from the mesh, from stored responses, or by asking the pod's
//! servers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt as _, Shared};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout};
use underpass_config::{Ipv6, Settings};
use underpass_hbone::log_panic;

use super::cache::{Cache, Cached, Key};
use super::exchange::SocketExchange;
use super::mesh::{self, PodView};
use super::message::{self, CLASS_IN, Malformed, Query, RecordType, ResponseCode};
use super::report::{self, AnswerSource, Report};
use super::resolv_conf::ResolvConf;
use super::resolv_file::ResolvFile;
use super::response::{self, Age, StoredResponse, Transport};
use super::upstream::{Upstream, UpstreamError};
use crate::decide::snapshot::Snapshot;
use crate::limits::Rate;
use crate::mesh::on_demand::Lookups;
use crate::node::Node;
use crate::node::pod::Pod;

/// How long a client waits for a server while there is a stale response (RFC 8767 section 5: client
/// response timer).
const STALE_WAIT: Duration = Duration::from_millis(1800);
/// How long a query waits for a lookup on demand: less than the timeout of any resolver.
const LOOKUP_WAIT: Duration = Duration::from_secs(1);
/// The maximum number of queries of a pod that wait for its servers.
const MAX_OUTSTANDING: usize = 512;
/// The maximum number of queries of a pod that wait for an answer, also those that wait for an equal
/// query.
const MAX_WAITING: usize = 4096;

/// Answers the queries of one pod.
#[derive(Debug)]
pub(crate) struct DnsService {
    view: PodView,
    mesh: watch::Receiver<Arc<Snapshot>>,
    lookups: Lookups,
    resolver: ResolverSource,
    upstream: Upstream,
    cache: Mutex<Cache>,
    /// The queries that wait for servers. Equal queries wait together, so that a server that asks
    /// this proxy causes no endless loop.
    running: Mutex<HashMap<Question, Running>>,
    outstanding: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// Limits the queries to the pod's servers, which are those of its neighbours too.
    pace: Mutex<Pace>,
}

/// Where the resolver settings come from.
#[derive(Debug)]
struct ResolverSource {
    file: Arc<ResolvFile>,
    /// Whether the file is that of the node. The search path is then that of the pod's namespace.
    is_of_node: bool,
    /// The maximum number of queries to servers per second; `None`: unlimited.
    per_second: Option<u32>,
}

/// Refuses queries that exceed a rate.
#[derive(Debug)]
struct Pace {
    rate: Option<Rate>,
    /// The time before which every query is refused.
    exhausted: Option<Instant>,
}

impl Pace {
    fn admit(&mut self) -> bool {
        if self.exhausted.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        self.exhausted = self.rate.as_mut().and_then(Rate::take);
        true
    }
}

/// The parts of a query that the response of a server depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Question {
    key: Key,
    transport: Transport,
    limit: usize,
}

type Running = Shared<BoxFuture<'static, Result<Answered, Arc<UpstreamError>>>>;

/// The response of a server.
#[derive(Debug, Clone)]
struct Answered {
    /// As the server sent it, to the query of the client that asked first.
    message: Arc<[u8]>,
    /// For other clients; `None` if it cannot serve them.
    stored: Option<Arc<StoredResponse>>,
}

/// The reply to a message of a client.
pub(crate) enum Reply {
    /// Nothing: the message is no query.
    Nothing,
    Now(Vec<u8>),
    Later(BoxFuture<'static, Vec<u8>>),
}

impl DnsService {
    fn new(
        view: PodView,
        mesh: watch::Receiver<Arc<Snapshot>>,
        lookups: Lookups,
        resolver: ResolverSource,
        upstream: Upstream,
    ) -> Arc<Self> {
        let (cache, running) = Default::default();
        let [outstanding, waiting] =
            [MAX_OUTSTANDING, MAX_WAITING].map(|limit| Arc::new(Semaphore::new(limit)));
        let pace = Pace { rate: resolver.per_second.map(Rate::new), exhausted: None };
        let pace = Mutex::new(pace);
        Arc::new(Self {
            view,
            mesh,
            lookups,
            resolver,
            upstream,
            cache,
            running,
            outstanding,
            waiting,
            pace,
        })
    }

    /// The service of a pod with these settings.
    pub(crate) fn of_pod(node: &Node, pod: &Pod, settings: &Settings) -> Arc<Self> {
        let view = PodView {
            namespace: settings.workload.namespace.clone(),
            network: settings.workload.network.clone(),
            domain: settings.dns.domain.clone(),
            ipv6: settings.interception.ipv6 == Ipv6::Capture,
        };
        let resolver = ResolverSource {
            file: node.resolv_file.clone(),
            is_of_node: node.has_many_pods,
            per_second: settings.dns.queries_per_second,
        };
        let (sockets, limits) = (pod.sockets.clone(), pod.limits.clone());
        let upstream = Upstream::new(Arc::new(SocketExchange { sockets, limits }));
        Self::new(view, node.mesh.clone(), node.lookups.clone(), resolver, upstream)
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
                report::rejected(code);
                return message::rejection(message, code).map_or(Reply::Nothing, Reply::Now);
            }
        };
        let settings = self.resolv_conf();
        let found = self.find(&query, &settings);
        if !is_looked_up && found.is_none() && self.has_unanswered_lookup(&query, &settings) {
            let looking_up = self.clone().look_up(query, settings, message.into(), transport);
            return Reply::Later(looking_up.boxed());
        }
        let report = Report::new(&query, transport);
        let is_address = matches!(query.kind, RecordType::A | RecordType::AAAA);
        if let Some(found) = found.as_ref().filter(|_| is_address) {
            let mut addresses = found.addresses.clone();
            fastrand::shuffle(&mut addresses);
            let response = response::of_addresses(&query, found.alias, &addresses, transport);
            report.answered(AnswerSource::Mesh, message::code(&response));
            return Reply::Now(response);
        }
        let key = Key::of(&query);
        let cached =
            key.as_ref().map_or(Cached::Missing, |key| self.cache().get(key, Instant::now()));
        let stale = match cached {
            Cached::Fresh(stored, age) => {
                let response = stored.to(&query, Age::Fresh(age), transport);
                report.answered(AnswerSource::Cache, stored.code());
                return Reply::Now(in_mesh(response, found.is_some()));
            }
            Cached::Stale(stored) => Some(stored),
            Cached::Missing => None,
        };
        let forward = Forward {
            service: self.clone(),
            query: Arc::new(query),
            transport,
            settings,
            stale,
            is_in_mesh: found.is_some(),
            report,
        };
        match self.waiting.clone().try_acquire_owned() {
            Ok(permit) => Reply::Later(forward.run(key, message.into(), permit).boxed()),
            Err(_) => Reply::Now(forward.without_answer("limit", None)),
        }
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
    /// the pod's servers are asked: a connection to what they answer asks for the address itself.
    async fn look_up(
        self: Arc<Self>,
        query: Query,
        settings: Arc<ResolvConf>,
        message: Box<[u8]>,
        transport: Transport,
    ) -> Vec<u8> {
        if let Ok(_permit) = self.outstanding.try_acquire() {
            let current = self.mesh.borrow().clone();
            let needed = |snapshot: &Snapshot| {
                mesh::lookups(&snapshot.mesh, &self.view, &settings.search, &query.name)
            };
            self.lookups.resolve(current, &self.mesh, needed, LOOKUP_WAIT).await.ok();
        }
        match self.serve_after_lookup(&message, transport, true) {
            Reply::Nothing => Vec::new(),
            Reply::Now(response) => response,
            Reply::Later(response) => response.await,
        }
    }

    fn resolv_conf(&self) -> Arc<ResolvConf> {
        let settings = self.resolver.file.current();
        match self.resolver.is_of_node {
            true => Arc::new(settings.of_pod(&self.view.namespace, &self.view.domain)),
            false => settings,
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // No code panics while it holds the lock.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<Question, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more query to a server is within the rate.
    fn admit(&self) -> bool {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).admit()
    }
}

/// A name of the mesh exists, although the pod's servers may not know it.
fn in_mesh(mut response: Vec<u8>, is_in_mesh: bool) -> Vec<u8> {
    if is_in_mesh && message::code(&response) == ResponseCode::NAME_ERROR {
        message::set_code(&mut response, ResponseCode::NO_ERROR);
    }
    response
}

/// A query for the pod's servers.
struct Forward {
    service: Arc<DnsService>,
    query: Arc<Query>,
    transport: Transport,
    settings: Arc<ResolvConf>,
    stale: Option<Arc<StoredResponse>>,
    is_in_mesh: bool,
    report: Report,
}

impl Forward {
    /// `_permit` counts the query until it is answered.
    async fn run(
        self,
        key: Option<Key>,
        message: Arc<[u8]>,
        _permit: OwnedSemaphorePermit,
    ) -> Vec<u8> {
        let Some((running, is_first)) = self.start(key, message) else {
            return self.without_answer("limit", None);
        };
        let wait = if self.stale.is_some() { STALE_WAIT } else { Duration::MAX };
        match timeout(wait, running).await {
            Ok(Ok(answered)) => self.answer(&answered, is_first),
            Ok(Err(error)) => self.without_answer("upstream", Some(&error)),
            Err(_) => self.without_answer("slow", None),
        }
    }

    /// Asks the servers, or joins an equal query. `None` if too many queries wait.
    fn start(&self, key: Option<Key>, message: Arc<[u8]>) -> Option<(Running, bool)> {
        let (transport, limit) = (self.transport, self.transport.limit(&self.query));
        let question = key.map(|key| Question { key, transport, limit });
        let mut running = self.service.running();
        if let Some(known) = question.as_ref().and_then(|question| running.get(question)) {
            return Some((known.clone(), false));
        }
        let permit = self.service.outstanding.clone().try_acquire_owned().ok()?;
        if !self.service.admit() {
            return None;
        }
        let (service, query) = (self.service.clone(), self.query.clone());
        let (settings, asked) = (self.settings.clone(), question.clone());
        let transport = if settings.use_tcp { Transport::Tcp } else { transport };
        let asking = async move {
            let outcome = service.upstream.ask(&settings, transport, &query, &message).await;
            let outcome = outcome.map(|message| service.store(asked.as_ref(), message));
            if let Some(asked) = &asked {
                service.running().remove(asked);
            }
            drop(permit);
            outcome.map_err(Arc::new)
        };
        let asking = asking.boxed().shared();
        // It ends also if no client waits any longer, so that the response is stored.
        tokio::spawn(log_panic("query to a DNS server", asking.clone()));
        if let Some(question) = question {
            running.insert(question, asking.clone());
        }
        Some((asking, true))
    }

    fn answer(&self, answered: &Answered, is_first: bool) -> Vec<u8> {
        let code = message::code(&answered.message);
        if code == ResponseCode::SERVER_FAILURE
            && let Some(response) = self.stale_response()
        {
            return response;
        }
        self.report.answered(AnswerSource::Upstream, code);
        let response = match &answered.stored {
            Some(stored) if !is_first => {
                stored.to(&self.query, Age::Fresh(Duration::ZERO), self.transport)
            }
            _ => {
                let mut message = answered.message.to_vec();
                message::set_id(&mut message, self.query.id);
                response::truncate(message, &self.query, self.transport)
            }
        };
        in_mesh(response, self.is_in_mesh)
    }

    /// The stale response; otherwise a failure, which is logged with its reason.
    fn without_answer(&self, reason: &'static str, error: Option<&UpstreamError>) -> Vec<u8> {
        if let Some(response) = self.stale_response() {
            return response;
        }
        self.report.failed(&self.query, reason, error);
        response::of_code(&self.query, ResponseCode::SERVER_FAILURE)
    }

    fn stale_response(&self) -> Option<Vec<u8>> {
        let stored = self.stale.as_ref()?;
        self.report.answered(AnswerSource::Stale, stored.code());
        let response = stored.to(&self.query, Age::Stale, self.transport);
        Some(in_mesh(response, self.is_in_mesh))
    }
}

impl DnsService {
    fn store(&self, asked: Option<&Question>, message: Vec<u8>) -> Answered {
        let stored = asked.and_then(|_| StoredResponse::new(message.clone())).map(Arc::new);
        if let (Some(Question { key, .. }), Some(stored)) = (asked, &stored) {
            self.cache().insert(key.clone(), stored.clone(), Instant::now());
        }
        Answered { message: message.into(), stored }
    }
}

#[cfg(test)]
mod tests;
