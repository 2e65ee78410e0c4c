//! The metrics of the DNS proxy. The first four have the names of ztunnel's.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::{counter, describe_counter};

use super::exposition::{Kind, Page};
use super::histogram::{Bounds, Histogram, Total};

const REQUESTS: &str = "istio_dns_requests_total";
const UPSTREAM: &str = "istio_dns_upstream_requests_total";
const UPSTREAM_FAILURES: &str = "istio_dns_upstream_failures_total";
const UPSTREAM_DURATION: &str = "istio_dns_upstream_request_duration_seconds";
const ANSWERS: &str = "underpass_dns_answers_total";

/// ztunnel's buckets.
const BOUNDS: Bounds = &[0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// The durations of queries to servers, by type and protocol. Global like the recorder of the
/// process. A query to a server takes much longer than the lock.
static DURATIONS: Mutex<BTreeMap<[&'static str; 2], Histogram>> = Mutex::new(BTreeMap::new());

fn durations() -> MutexGuard<'static, BTreeMap<[&'static str; 2], Histogram>> {
    // No code panics while it holds the lock.
    DURATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn describe() {
    describe_counter!(REQUESTS, "DNS queries of applications, by type and protocol.");
    describe_counter!(UPSTREAM, "DNS queries for a server of the pod, by type and protocol.");
    describe_counter!(
        UPSTREAM_FAILURES,
        "DNS queries without an answer of a server, or with SERVFAIL."
    );
    describe_counter!(ANSWERS, "Responses to DNS queries, by source and response code.");
}

/// Counts a query of an application.
pub(crate) fn request(kind: &'static str, protocol: &'static str) {
    counter!(REQUESTS, "request_query_type" => kind, "request_protocol" => protocol).increment(1);
}

/// Counts a response to an application.
pub(crate) fn answer(source: &'static str, code: &'static str) {
    counter!(ANSWERS, "source" => source, "code" => code).increment(1);
}

/// Counts a query for a server of the pod.
pub(crate) fn upstream(
    kind: &'static str,
    protocol: &'static str,
    duration: Duration,
    failed: bool,
) {
    let labels = [("request_query_type", kind), ("request_protocol", protocol)];
    counter!(UPSTREAM, &labels).increment(1);
    let mut durations = durations();
    let histogram = durations.entry([kind, protocol]).or_insert_with(|| Histogram::new(BOUNDS));
    histogram.record(duration, None);
    if failed {
        counter!(UPSTREAM_FAILURES, &labels).increment(1);
    }
}

/// Appends the histogram of queries for servers.
pub(super) fn render(page: &mut Page) {
    let durations = durations();
    if durations.is_empty() {
        return;
    }
    let help = "The duration of DNS queries for a server of the pod.";
    page.family(UPSTREAM_DURATION, Kind::Histogram, help);
    for ([kind, protocol], histogram) in &*durations {
        let mut total = Total::new(BOUNDS);
        total.add(histogram);
        let labels = format!("request_query_type=\"{kind}\",request_protocol=\"{protocol}\"");
        total.render(UPSTREAM_DURATION, &labels, page);
    }
}
