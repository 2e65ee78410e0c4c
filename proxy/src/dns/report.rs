//! Counts queries, and logs those without an answer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::WorkloadSettings;

use super::failed_names::{FailedName, FailedNames};
use super::message::{self, Query, ResponseCode};
use super::response::Transport;
use super::upstream::UpstreamError;
use crate::error::chain;
use crate::mesh::on_demand::LookupError;
use crate::observe::metrics;

/// The number of failed queries of a pod that are logged per [`WINDOW`].
const MAX_LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(1);

/// Where the answer to a query comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AnswerSource {
    Mesh,
    /// A stored response.
    Cache,
    /// A stored response that has expired, because no server has answered in time.
    Stale,
    /// A server of the pod.
    Upstream,
    /// This proxy, because no server has answered, or the query is malformed.
    None,
}

impl AnswerSource {
    fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Cache => "cache",
            Self::Stale => "stale",
            Self::Upstream => "upstream",
            Self::None => "none",
        }
    }
}

/// Why a query gets no answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Failure<'a> {
    /// No server has answered.
    Upstream(&'a UpstreamError),
    /// A server has answered with SERVFAIL.
    Response,
    /// The control plane has not answered a lookup on demand.
    Lookup(&'a LookupError),
    /// Too many lookups on demand per second.
    LookupRate,
    /// Too many queries for the servers per second.
    Rate,
    /// Too many queries wait for the servers.
    Outstanding,
    /// Too many queries wait for an answer, also of an equal query.
    Waiting,
}

impl Failure<'_> {
    fn reason(self) -> &'static str {
        match self {
            Self::Upstream(_) => "upstream",
            Self::Response => "servfail",
            Self::Lookup(_) => "lookup",
            Self::LookupRate => "lookup_rate",
            Self::Rate => "rate",
            Self::Outstanding => "outstanding",
            Self::Waiting => "waiting",
        }
    }

    fn error(self) -> Option<String> {
        match self {
            Self::Upstream(error) => Some(chain(error)),
            Self::Lookup(error) => Some(chain(error)),
            Self::Response | Self::LookupRate | Self::Rate | Self::Outstanding | Self::Waiting => {
                None
            }
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Self::Upstream(_) => {
                "check the pod's DNS servers (resolv.conf), and whether the pod reaches them"
            }
            Self::Response => "check the servers of the pod, which answer SERVFAIL",
            Self::Lookup(error) => error.hint(),
            Self::LookupRate => {
                "look for an application that asks for random names, or raise \
                 dns.lookups_per_second"
            }
            Self::Rate => {
                "look for an application that asks too much, or raise dns.queries_per_second"
            }
            Self::Outstanding | Self::Waiting => {
                "look for a slow DNS server, and for an application that asks too much"
            }
        }
    }
}

/// Logs and lists the failed queries of one pod.
#[derive(Debug)]
pub(super) struct FailureLog {
    /// Its namespace and name.
    pod: String,
    names: Arc<FailedNames>,
    lines: Mutex<Lines>,
}

/// The lines in the current [`WINDOW`].
#[derive(Debug, Default)]
struct Lines {
    begun: Option<Instant>,
    logged: u32,
    /// The number of lines that were left out since the last one.
    suppressed: u64,
}

impl Lines {
    /// Whether a line may be logged; then the number of lines that were left out before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.begun.is_none_or(|begun| now.duration_since(begun) >= WINDOW) {
            (self.begun, self.logged) = (Some(now), 0);
        }
        if self.logged >= MAX_LINES {
            self.suppressed += 1;
            return None;
        }
        self.logged += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl FailureLog {
    pub(super) fn new(pod: &WorkloadSettings, names: Arc<FailedNames>) -> Self {
        let pod = format!("{}/{}", pod.namespace, pod.name);
        Self { pod, names, lines: Mutex::default() }
    }

    fn list(&self, query: &Query, failure: Failure<'_>) {
        let now = Instant::now();
        let failed = FailedName {
            name: query.name.clone(),
            kind: query.kind.as_str(),
            reason: failure.reason(),
            error: None,
            explained: now,
            hint: failure.hint(),
            count: 1,
            last: now,
        };
        self.names.add(failed, || failure.error());
    }

    pub(super) fn log(&self, query: &Query, transport: Transport, failure: Failure<'_>) {
        self.list(query, failure);
        // No code panics while it holds the lock.
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(suppressed) = lines.admit(Instant::now()) else { return };
        drop(lines);
        tracing::warn!(
            pod = self.pod,
            name = %query.name,
            r#type = query.kind.as_str(),
            transport = transport.as_str(),
            reason = failure.reason(),
            error = failure.error(),
            hint = failure.hint(),
            suppressed = (suppressed > 0).then_some(suppressed),
            "a DNS query failed"
        );
    }

    /// Counts a query to the servers that began at `began`, and logs its failure.
    pub(super) fn exchanged(
        &self,
        query: &Query,
        transport: Transport,
        began: Instant,
        outcome: &Result<Vec<u8>, UpstreamError>,
    ) {
        let (kind, protocol) = (query.kind.as_str(), transport.as_str());
        metrics::dns::upstream(kind, protocol, began.elapsed(), is_failure(outcome));
        match outcome {
            Err(error) => self.log(query, transport, Failure::Upstream(error)),
            // The application gets this response.
            Ok(_) if is_failure(outcome) => self.list(query, Failure::Response),
            Ok(_) => {}
        }
    }
}

/// Whether no server has answered, or only with SERVFAIL.
pub(super) fn is_failure(outcome: &Result<Vec<u8>, UpstreamError>) -> bool {
    outcome
        .as_ref()
        .map_or(true, |response| message::code(response) == ResponseCode::SERVER_FAILURE)
}

/// Counts a query.
pub(super) fn requested(query: &Query, transport: Transport) {
    metrics::dns::request(query.kind.as_str(), transport.as_str());
}

/// Counts a response.
pub(super) fn answered(source: AnswerSource, code: ResponseCode) {
    metrics::dns::answer(source.as_str(), code.as_str());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lines_of_a_pod_are_limited_and_counted() {
        let (mut lines, now) = (Lines::default(), Instant::now());
        let admitted = (0..100).filter(|_| lines.admit(now).is_some()).count();
        assert_eq!(admitted, 10);
        assert_eq!(lines.admit(now + WINDOW), Some(90));
        assert_eq!(lines.admit(now + WINDOW), Some(0));
    }

    #[test]
    fn hint_names_the_setting_of_the_rate() {
        assert!(Failure::Rate.hint().contains("dns.queries_per_second"));
        assert_eq!(Failure::Outstanding.reason(), "outstanding");
    }
}
