//! Asks the servers of a pod in the order, as often and as long as resolv.conf(5) defines.
//!
//! A server that has not answered in time may still answer while the next one is asked: the first
//! useful response counts.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::message::{self, Query, ResponseCode};
use super::resolv_conf::ResolvConf;
use super::response::Transport;

/// The maximum time for one query, with all servers and attempts. Applications have stopped waiting
/// by then (glibc: 10 s for one server by default).
const MAX_TIME: Duration = Duration::from_secs(20);
/// The maximum number of attempts of a pod that run beside an earlier attempt of the same query.
/// Each attempt has a socket. The service limits the queries, and so the first attempts.
const MAX_FURTHER: usize = 512;
/// How long a server that did not answer is asked last.
const AVOID_TIME: Duration = Duration::from_secs(30);

/// Exchanges messages with servers.
pub(crate) trait Exchange: fmt::Debug + Send + Sync {
    /// Sends a query to a server, with an id of its own, and returns the first message that answers
    /// it. Has no timeout.
    fn exchange(
        &self,
        server: SocketAddr,
        transport: Transport,
        query: Arc<Query>,
        message: Arc<[u8]>,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>>;
}

/// Why no server has answered.
#[derive(Debug, Clone, Error)]
pub(crate) enum UpstreamError {
    #[error("the pod has no DNS server")]
    NoServer,
    #[error("no answer within {} s from {}", after.as_secs_f32(), list(servers))]
    Timeout { servers: Vec<SocketAddr>, after: Duration },
    #[error("cannot ask {server}")]
    Failed { server: SocketAddr, source: Arc<io::Error> },
}

fn list(servers: &[SocketAddr]) -> String {
    servers.iter().map(|server| server.ip().to_string()).collect::<Vec<_>>().join(", ")
}

/// Asks the servers of one pod.
#[derive(Debug)]
pub(crate) struct Upstream {
    exchange: Arc<dyn Exchange>,
    /// The servers that did not answer, with the times.
    silent: Mutex<HashMap<SocketAddr, Instant>>,
    turn: AtomicUsize,
    further: Semaphore,
}

impl Upstream {
    pub(crate) fn new(exchange: Arc<dyn Exchange>) -> Self {
        let further = Semaphore::new(MAX_FURTHER);
        Self { exchange, silent: Mutex::default(), turn: AtomicUsize::default(), further }
    }

    /// Returns the first useful response. If all servers report errors, returns the first of those.
    ///
    /// # Errors
    ///
    /// No server has answered.
    pub(super) async fn ask(
        &self,
        settings: &ResolvConf,
        transport: Transport,
        query: &Arc<Query>,
        message: &Arc<[u8]>,
    ) -> Result<Vec<u8>, UpstreamError> {
        let servers = self.order(settings);
        let (began, end) = (Instant::now(), Instant::now() + MAX_TIME);
        let mut plan = servers.repeat(settings.attempts).into_iter().peekable();
        let mut attempts = FuturesUnordered::new();
        let (mut error_response, mut error) = (None, UpstreamError::NoServer);
        let mut newest = None;
        loop {
            // With too many attempts of the pod, the earlier ones of this query continue alone.
            let permit = self.further.try_acquire().ok();
            let may_ask = attempts.is_empty() || permit.is_some();
            if let Some(server) = plan.next_if(|_| may_ask) {
                let permit = permit.filter(|_| !attempts.is_empty());
                let (query, message) = (query.clone(), message.clone());
                let exchange = self.exchange.exchange(server, transport, query, message);
                attempts.push(async move {
                    let _permit = permit;
                    (server, exchange.await)
                });
                newest = Some(server);
            }
            let until = end.min(Instant::now() + settings.timeout);
            match timeout_at(until, attempts.next()).await {
                Ok(None) => break,
                Ok(Some((server, Ok(response)))) => {
                    self.silent().remove(&server);
                    if is_useful(&response) {
                        return Ok(response);
                    }
                    error_response.get_or_insert(response);
                }
                Ok(Some((server, Err(source)))) => {
                    self.avoid(server);
                    error = UpstreamError::Failed { server, source: Arc::new(source) };
                }
                Err(_) => {
                    newest.into_iter().for_each(|server| self.avoid(server));
                    let servers = servers.clone();
                    error = UpstreamError::Timeout { servers, after: began.elapsed() };
                    if plan.peek().is_none() || Instant::now() >= end {
                        break;
                    }
                }
            }
        }
        error_response.ok_or(error)
    }

    /// The servers in the order of this query: those that answer before those that do not.
    fn order(&self, settings: &ResolvConf) -> Vec<SocketAddr> {
        let mut servers = settings.servers.clone();
        if settings.rotate && !servers.is_empty() {
            let turn = self.turn.fetch_add(1, Relaxed) % servers.len();
            servers.rotate_left(turn);
        }
        let now = Instant::now();
        let mut silent = self.silent();
        silent.retain(|server, since| {
            now.duration_since(*since) < AVOID_TIME && settings.servers.contains(server)
        });
        // The sort is stable.
        servers.sort_by_key(|server| silent.contains_key(server));
        servers
    }

    fn avoid(&self, server: SocketAddr) {
        self.silent().insert(server, Instant::now());
    }

    fn silent(&self) -> MutexGuard<'_, HashMap<SocketAddr, Instant>> {
        // No code panics while it holds the lock.
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the response is final. After the other codes glibc, too, asks the next server.
fn is_useful(response: &[u8]) -> bool {
    use ResponseCode as Code;
    let code = message::code(response);
    !matches!(code, Code::SERVER_FAILURE | Code::NOT_IMPLEMENTED | Code::REFUSED)
}

#[cfg(test)]
pub(super) mod tests;
