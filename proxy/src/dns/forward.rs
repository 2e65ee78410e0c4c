//! Forwards queries of one pod to its servers, and stores the responses.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt as _, Shared};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use underpass_hbone::log_panic;

use super::cache::{Cache, Cached, Key, STALE_WAIT, Stale};
use super::message::{self, Query, ResponseCode};
use super::report::{self, AnswerSource, Failure, FailureLog};
use super::resolv_conf::ResolvConf;
use super::response::{self, Age, StoredResponse, Transport};
use super::upstream::Upstream;
use crate::limits::Rate;

/// The maximum number of queries of a pod that wait for its servers.
const MAX_OUTSTANDING: usize = 512;
/// The maximum number of queries of a pod that wait for an answer, also those that wait for an
/// equal query.
const MAX_WAITING: usize = 4096;

/// The reply to a message of a client.
pub(crate) enum Reply {
    /// Nothing: the message is no query.
    Nothing,
    Now(Vec<u8>),
    Later(BoxFuture<'static, Vec<u8>>),
}

/// Forwards queries of one pod.
#[derive(Debug)]
pub(super) struct Forwarder {
    upstream: Upstream,
    cache: Mutex<Cache>,
    /// The queries that wait for servers. Equal queries wait together, so that a server that asks
    /// this proxy causes no endless loop.
    running: Mutex<HashMap<Question, Running>>,
    outstanding: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// Limits the queries to the pod's servers, which are those of its neighbours too; `None`:
    /// unlimited.
    rate: Option<Mutex<Rate>>,
    failures: FailureLog,
}

/// A query for the pod's servers.
#[derive(Debug)]
pub(super) struct ForwardedQuery {
    pub(super) query: Arc<Query>,
    /// The query as the client wrote it.
    pub(super) message: Arc<[u8]>,
    /// How the client receives its response.
    pub(super) transport: Transport,
    /// The current settings of the pod.
    pub(super) settings: Arc<ResolvConf>,
    /// Whether the mesh has the name, which the servers may not know.
    pub(super) is_in_mesh: bool,
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

/// The entry of a query in `Forwarder::running`. Removes it when dropped, also after a panic: a
/// later equal query must not wait for one that has ended.
struct RunningEntry {
    forwarder: Arc<Forwarder>,
    question: Question,
}

impl Drop for RunningEntry {
    fn drop(&mut self) {
        self.forwarder.running().remove(&self.question);
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

impl Forwarder {
    /// `per_second` limits the queries to servers; `None`: unlimited.
    pub(super) fn new(
        upstream: Upstream,
        failures: FailureLog,
        per_second: Option<u32>,
    ) -> Arc<Self> {
        let (cache, running) = Default::default();
        let [outstanding, waiting] =
            [MAX_OUTSTANDING, MAX_WAITING].map(|limit| Arc::new(Semaphore::new(limit)));
        let rate = per_second.map(Rate::new).map(Mutex::new);
        Arc::new(Self { upstream, cache, running, outstanding, waiting, rate, failures })
    }

    /// Replies with a stored response, or with the response of a server.
    pub(super) fn forward(self: &Arc<Self>, query: ForwardedQuery) -> Reply {
        let key = Key::of(&query.query);
        let cached =
            key.as_ref().map_or(Cached::Missing, |key| self.cache().get(key, Instant::now()));
        let stale = match cached {
            Cached::Fresh(stored, age) => {
                report::answered(AnswerSource::Cache, stored.code());
                return Reply::Now(query.to_client(stored.to(
                    &query.query,
                    Age::Fresh(age),
                    query.transport,
                )));
            }
            Cached::Stale(stored) => Some(stored),
            Cached::Missing => None,
        };
        let forwarding = Forwarding { forwarder: self.clone(), query, stale };
        match self.waiting.clone().try_acquire_owned() {
            Ok(permit) => Reply::Later(forwarding.run(key, permit).boxed()),
            Err(_) => Reply::Now(forwarding.without_answer(Some(Failure::Waiting))),
        }
    }

    /// Counts a query as outstanding until the permit is dropped.
    pub(super) fn hold(&self) -> Result<OwnedSemaphorePermit, Failure<'static>> {
        self.outstanding.clone().try_acquire_owned().map_err(|_| Failure::Outstanding)
    }

    /// Logs and counts the failure of a query. Returns the response.
    pub(super) fn refuse(
        &self,
        query: &Query,
        transport: Transport,
        failure: Failure<'_>,
    ) -> Vec<u8> {
        self.failures.log(query, transport, failure);
        server_failure(query)
    }

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

    /// Whether one more query to a server is within the rate.
    fn admit(&self) -> bool {
        let take =
            |rate: &Mutex<Rate>| rate.lock().unwrap_or_else(PoisonError::into_inner).try_take();
        self.rate.as_ref().is_none_or(take)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // No code panics while it holds the lock.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<Question, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn server_failure(query: &Query) -> Vec<u8> {
    report::answered(AnswerSource::None, ResponseCode::SERVER_FAILURE);
    response::of_code(query, ResponseCode::SERVER_FAILURE)
}

impl ForwardedQuery {
    /// The response for the client: a name of the mesh exists, although the servers may not know
    /// it.
    fn to_client(&self, mut response: Vec<u8>) -> Vec<u8> {
        if self.is_in_mesh && message::code(&response) == ResponseCode::NAME_ERROR {
            message::set_code(&mut response, ResponseCode::NO_ERROR);
        }
        response
    }
}

/// A query that has no fresh stored response.
struct Forwarding {
    forwarder: Arc<Forwarder>,
    query: ForwardedQuery,
    stale: Option<Stale>,
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

impl Forwarding {
    /// `_permit` counts the query until it is answered.
    async fn run(self, key: Option<Key>, _permit: OwnedSemaphorePermit) -> Vec<u8> {
        let mut asked = self.ask(key.as_ref()).await;
        if matches!(asked, Asked::OfOtherClient) {
            asked = self.ask(None).await;
        }
        match asked {
            Asked::Answered { answered, is_first } => self.answer(&answered, is_first),
            Asked::OfOtherClient => self.without_answer(None),
            Asked::Failed(failure) => self.without_answer(failure),
        }
    }

    /// Asks the servers, and waits unless there is a stale response and they have just failed.
    async fn ask(&self, key: Option<&Key>) -> Asked {
        let (running, is_first) = match self.start(key) {
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
                self.forwarder.failed(key);
                Asked::Failed(None)
            }
        }
    }

    /// Asks the servers, or joins an equal query.
    fn start(&self, key: Option<&Key>) -> Result<(Running, bool), Failure<'static>> {
        let ForwardedQuery { query, message, transport: client, settings, .. } = &self.query;
        let (client, limit) = (*client, client.limit(query));
        let question = key.map(|key| Question { key: key.clone(), transport: client, limit });
        let mut running = self.forwarder.running();
        if let Some(known) = question.as_ref().and_then(|question| running.get(question)) {
            return Ok((known.clone(), false));
        }
        let permit = self.forwarder.hold()?;
        if !self.forwarder.admit() {
            return Err(Failure::Rate);
        }
        let (forwarder, settings) = (self.forwarder.clone(), settings.clone());
        let (query, message) = (query.clone(), message.clone());
        let entry = question
            .clone()
            .map(|question| RunningEntry { forwarder: forwarder.clone(), question });
        let transport = if settings.use_tcp { Transport::Tcp } else { client };
        let asking = async move {
            let began = Instant::now();
            let outcome = forwarder.upstream.ask(&settings, transport, &query, &message).await;
            forwarder.failures.exchanged(&query, client, began, &outcome);
            let key = entry.as_ref().map(|entry| &entry.question.key);
            if report::is_failure(&outcome) {
                forwarder.failed(key);
            }
            let outcome = outcome.ok().map(|message| forwarder.store(key, message));
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
        let ForwardedQuery { query, transport, .. } = &self.query;
        let response = match &answered.stored {
            Some(stored) if !is_first => stored.to(query, Age::Fresh(Duration::ZERO), *transport),
            _ => {
                let mut message = answered.message.to_vec();
                message::set_id(&mut message, query.id);
                response::truncate(message, query, *transport)
            }
        };
        self.query.to_client(response)
    }

    /// The stale response; otherwise a failure.
    fn without_answer(&self, failure: Option<Failure<'_>>) -> Vec<u8> {
        if let Some(response) = self.stale_response() {
            return response;
        }
        let ForwardedQuery { query, transport, .. } = &self.query;
        match failure {
            Some(failure) => self.forwarder.refuse(query, *transport, failure),
            None => server_failure(query),
        }
    }

    fn stale_response(&self) -> Option<Vec<u8>> {
        let stored = &self.stale.as_ref()?.response;
        report::answered(AnswerSource::Stale, stored.code());
        let ForwardedQuery { query, transport, .. } = &self.query;
        Some(self.query.to_client(stored.to(query, Age::Stale, *transport)))
    }
}

#[cfg(test)]
mod tests;
