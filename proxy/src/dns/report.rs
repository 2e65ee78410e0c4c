//! Counts queries, and logs those without an answer.

use tokio::time::Instant;
use underpass_hbone::LogLimit;

use super::message::{Query, RecordType, ResponseCode};
use super::response::Transport;
use super::upstream::UpstreamError;
use crate::error::chain;
use crate::observe::metrics;

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

/// One query.
pub(super) struct Report {
    kind: RecordType,
    transport: Transport,
    began: Instant,
}

impl Report {
    pub(super) fn new(query: &Query, transport: Transport) -> Self {
        metrics::dns::request(query.kind.as_str(), transport.as_str());
        Self { kind: query.kind, transport, began: Instant::now() }
    }

    pub(super) fn answered(&self, source: AnswerSource, code: ResponseCode) {
        metrics::dns::answer(source.as_str(), code.as_str());
        if source == AnswerSource::Upstream {
            self.upstream(code == ResponseCode::SERVER_FAILURE);
        }
    }

    /// Counts and logs a query without an answer. `reason`: `limit`, `slow`, `upstream`.
    pub(super) fn failed(
        &self,
        query: &Query,
        reason: &'static str,
        error: Option<&UpstreamError>,
    ) {
        static LIMIT: LogLimit = LogLimit::new("failed DNS queries");
        metrics::dns::answer(AnswerSource::None.as_str(), ResponseCode::SERVER_FAILURE.as_str());
        self.upstream(true);
        if LIMIT.admit(reason) {
            let hint = match error {
                Some(_) => "check the servers in dns.resolv_conf, and whether the pod reaches them",
                None => "look for an application that asks too much: limits.dns_queries_per_second",
            };
            tracing::warn!(
                name = %query.name,
                r#type = self.kind.as_str(),
                transport = self.transport.as_str(),
                reason,
                error = error.map(|error| chain(error)),
                hint,
                "a DNS query failed"
            );
        }
    }

    fn upstream(&self, failed: bool) {
        let (kind, transport) = (self.kind.as_str(), self.transport.as_str());
        metrics::dns::upstream(kind, transport, self.began.elapsed(), failed);
    }
}

/// Counts a message that is no valid query.
pub(super) fn rejected(code: ResponseCode) {
    metrics::dns::answer(AnswerSource::None.as_str(), code.as_str());
}
