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

use super::cache::{Cache, Cached, Key, STALE_WAIT, Stale};
use super::exchange::SocketExchange;
use super::mesh::{self, PodView};
use super::message::{self, CLASS_IN, Malformed, Query, RecordType, ResponseCode};
use super::report::{self, AnswerSource, Failure, FailureLog};
use super::resolv_conf::ResolvConf;
use super::resolv_file::ResolvFile;
use super::response::{self, Age, StoredResponse, Transport};
use super::upstream::Upstream;
use crate::decide::snapshot::Snapshot;
use crate::limits::Rate;
use crate::mesh::on_demand::{Lookups, Wait};
use crate::node::Node;
use crate::node::pod::Pod;

/// How long a query waits for a lookup on demand: less than the timeout of any resolver.
const LOOKUP_WAIT: Duration = Duration::from_secs(1);
/// The maximum number of queries of a pod that wait for its servers.
const MAX_OUTSTANDING: usize = 512;
/// The maximum number of queries of a pod that wait for an answer, also those that wait for an
/// equal query.
const MAX_WAITING: usize = 4096;
/// The maximum number of TCP connections of a pod's applications. Further ones wait in the kernel.
pub(super) const MAX_CONNECTIONS: usize = 64;

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
    pub(super) connections: Arc<Semaphore>,
    /// Limits the queries to the pod's servers, which are those of its neighbours too.
    rate: Option<Mutex<Rate>>,
    failures: FailureLog,
}

/// Where the resolver settings come from.
#[derive(Debug)]
struct ResolverSource {
    file: Arc<ResolvFile>,
    /// Whether the file is that of the node. The search path is then that of the pod's namespace.
    is_of_node: bool,
    /// The content of the node's file, and the settings of the pod that follow from it.
    of_pod: Mutex<Option<(Arc<ResolvConf>, Arc<ResolvConf>)>>,
    /// The maximum number of queries to servers per second; `None`: unlimited.
    per_second: Option<u32>,
}

/// The parts of a query that the response of a server depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Question {
    key: Key,
    transport: Transport,
    limit: usize,
}

/// `None`: no server has answered.
type Running = Shared<BoxFuture<'static, Option<Answered>>>;

/// The entry of a query in `DnsService::running`. Removes it when dropped, also after a panic: a
/// later equal query must not wait for one that has ended.
struct RunningEntry {
    service: Arc<DnsService>,
    question: Question,
}

impl Drop for RunningEntry {
    fn drop(&mut self) {
        self.service.running().remove(&self.question);
    }
}

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
        failures: FailureLog,
    ) -> Arc<Self> {
        let (cache, running) = Default::default();
        let limits = [MAX_OUTSTANDING, MAX_WAITING, MAX_CONNECTIONS];
        let [outstanding, waiting, connections] =
            limits.map(|limit| Arc::new(Semaphore::new(limit)));
        let rate = resolver.per_second.map(Rate::new).map(Mutex::new);
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
            connections,
            rate,
            failures,
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
            of_pod: Mutex::default(),
            per_second: settings.dns.queries_per_second,
        };
        let (sockets, limits) = (pod.sockets.clone(), pod.limits.clone());
        let upstream = Upstream::new(Arc::new(SocketExchange { sockets, limits }));
        let failures = FailureLog::new(&settings.workload, pod.failed_names.clone());
        Self::new(view, node.mesh.clone(), pod.lookups.clone(), resolver, upstream, failures)
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
        let settings = self.resolv_conf();
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
        let key = Key::of(&query);
        let cached =
            key.as_ref().map_or(Cached::Missing, |key| self.cache().get(key, Instant::now()));
        let stale = match cached {
            Cached::Fresh(stored, age) => {
                let response = stored.to(&query, Age::Fresh(age), transport);
                report::answered(AnswerSource::Cache, stored.code());
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
        };
        match self.waiting.clone().try_acquire_owned() {
            Ok(permit) => Reply::Later(forward.run(key, message.into(), permit).boxed()),
            Err(_) => Reply::Now(forward.without_answer(Some(Failure::Waiting))),
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
            self.refuse(&query, transport, failure)
        };
        let Ok(permit) = self.outstanding.try_acquire() else {
            return refuse(Failure::Outstanding);
        };
        let current = self.mesh.borrow().clone();
        let needed = |snapshot: &Snapshot| {
            mesh::lookups(&snapshot.mesh, &self.view, &settings.search, &query.name)
        };
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

    fn refuse(&self, query: &Query, transport: Transport, failure: Failure<'_>) -> Vec<u8> {
        self.failures.log(query, transport, failure);
        report::answered(AnswerSource::None, ResponseCode::SERVER_FAILURE);
        response::of_code(query, ResponseCode::SERVER_FAILURE)
    }

    fn resolv_conf(&self) -> Arc<ResolvConf> {
        let ResolverSource { file, is_of_node, of_pod, .. } = &self.resolver;
        let settings = file.current();
        if !is_of_node {
            return settings;
        }
        // No code panics while it holds the lock.
        let mut of_pod = of_pod.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of_node, known)) = &*of_pod
            && Arc::ptr_eq(of_node, &settings)
        {
            return known.clone();
        }
        let made = Arc::new(settings.of_pod(&self.view.namespace, &self.view.domain));
        *of_pod = Some((settings, made.clone()));
        made
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
        let take =
            |rate: &Mutex<Rate>| rate.lock().unwrap_or_else(PoisonError::into_inner).try_take();
        self.rate.as_ref().is_none_or(take)
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
    stale: Option<Stale>,
    is_in_mesh: bool,
}

/// The outcome of asking the servers.
enum Asked {
    Answered {
        answered: Answered,
        is_first: bool,
    },
    /// The response cannot serve the clients that joined an equal query.
    OfOtherClient,
    /// `None`: no server has answered in time, which is logged where the servers are asked.
    Failed(Option<Failure<'static>>),
}

impl Forward {
    /// `_permit` counts the query until it is answered.
    async fn run(
        self,
        key: Option<Key>,
        message: Arc<[u8]>,
        _permit: OwnedSemaphorePermit,
    ) -> Vec<u8> {
        let mut asked = self.ask(key.as_ref(), &message).await;
        if matches!(asked, Asked::OfOtherClient) {
            asked = self.ask(None, &message).await;
        }
        match asked {
            Asked::Answered { answered, is_first } => self.answer(&answered, is_first),
            Asked::OfOtherClient => self.without_answer(None),
            Asked::Failed(failure) => self.without_answer(failure),
        }
    }

    /// Asks the servers, and waits unless there is a stale response and they have just failed.
    async fn ask(&self, key: Option<&Key>, message: &Arc<[u8]>) -> Asked {
        let (running, is_first) = match self.start(key, message) {
            Ok(started) => started,
            Err(failure) => return Asked::Failed(Some(failure)),
        };
        let outcome = match &self.stale {
            None => Some(running.await),
            Some(Stale { has_failed: true, .. }) => running.now_or_never(),
            Some(_) => timeout(STALE_WAIT, running).await.ok(),
        };
        match outcome {
            Some(Some(Answered { stored: None, .. })) if !is_first => Asked::OfOtherClient,
            Some(Some(answered)) => Asked::Answered { answered, is_first },
            Some(None) => Asked::Failed(None),
            None => {
                self.service.failed(key);
                Asked::Failed(None)
            }
        }
    }

    /// Asks the servers, or joins an equal query.
    fn start(
        &self,
        key: Option<&Key>,
        message: &Arc<[u8]>,
    ) -> Result<(Running, bool), Failure<'static>> {
        let (client, limit) = (self.transport, self.transport.limit(&self.query));
        let question = key.map(|key| Question { key: key.clone(), transport: client, limit });
        let mut running = self.service.running();
        if let Some(known) = question.as_ref().and_then(|question| running.get(question)) {
            return Ok((known.clone(), false));
        }
        let permit = self.service.outstanding.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Failure::Outstanding)?;
        if !self.service.admit() {
            return Err(Failure::Rate);
        }
        let (service, query) = (self.service.clone(), self.query.clone());
        let (settings, message) = (self.settings.clone(), message.clone());
        let entry =
            question.clone().map(|question| RunningEntry { service: service.clone(), question });
        let transport = if settings.use_tcp { Transport::Tcp } else { client };
        let asking = async move {
            let began = Instant::now();
            let outcome = service.upstream.ask(&settings, transport, &query, &message).await;
            service.failures.exchanged(&query, client, began, &outcome);
            let key = entry.as_ref().map(|entry| &entry.question.key);
            if report::is_failure(&outcome) {
                service.failed(key);
            }
            let outcome = outcome.ok().map(|message| service.store(key, message));
            drop((entry, permit));
            outcome
        };
        let asking = asking.boxed().shared();
        if let Some(question) = question {
            running.insert(question, asking.clone());
        }
        drop(running);
        // It ends also if no client waits any longer, so that the response is stored.
        tokio::spawn(log_panic("query to a DNS server", asking.clone()));
        Ok((asking, true))
    }

    fn answer(&self, answered: &Answered, is_first: bool) -> Vec<u8> {
        let code = message::code(&answered.message);
        if code == ResponseCode::SERVER_FAILURE
            && let Some(response) = self.stale_response()
        {
            return response;
        }
        report::answered(AnswerSource::Upstream, code);
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

    /// The stale response; otherwise a failure.
    fn without_answer(&self, failure: Option<Failure<'_>>) -> Vec<u8> {
        if let Some(response) = self.stale_response() {
            return response;
        }
        if let Some(failure) = failure {
            return self.service.refuse(&self.query, self.transport, failure);
        }
        report::answered(AnswerSource::None, ResponseCode::SERVER_FAILURE);
        response::of_code(&self.query, ResponseCode::SERVER_FAILURE)
    }

    fn stale_response(&self) -> Option<Vec<u8>> {
        let stored = &self.stale.as_ref()?.response;
        report::answered(AnswerSource::Stale, stored.code());
        let response = stored.to(&self.query, Age::Stale, self.transport);
        Some(in_mesh(response, self.is_in_mesh))
    }
}

impl DnsService {
    fn store(&self, key: Option<&Key>, message: Vec<u8>) -> Answered {
        let stored = key.and_then(|_| StoredResponse::new(message.clone())).map(Arc::new);
        if let (Some(key), Some(stored)) = (key, &stored) {
            self.cache().insert(key.clone(), stored.clone(), Instant::now());
        }
        Answered { message: message.into(), stored }
    }

    /// Records that no server has answered.
    fn failed(&self, key: Option<&Key>) {
        if let Some(key) = key {
            self.cache().fail(key, Instant::now());
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
