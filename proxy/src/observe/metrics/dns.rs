//! The metrics of the DNS proxy. The first four have the names and labels of ztunnel's.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_histogram, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

const REQUESTS: &str = "istio_dns_requests_total";
const UPSTREAM: &str = "istio_dns_upstream_requests_total";
const UPSTREAM_FAILURES: &str = "istio_dns_upstream_failures_total";
const UPSTREAM_DURATION: &str = "istio_dns_upstream_request_duration_seconds";
const ANSWERS: &str = "underpass_dns_answers_total";

/// ztunnel's buckets, in seconds.
const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

pub(super) fn with_buckets(builder: PrometheusBuilder) -> Result<PrometheusBuilder, BuildError> {
    builder.set_buckets_for_metric(Matcher::Full(UPSTREAM_DURATION.to_owned()), &BUCKETS)
}

pub(super) fn describe() {
    describe_counter!(REQUESTS, "DNS queries of applications, by type and protocol.");
    describe_counter!(UPSTREAM, "DNS queries for a server of the pod, by type and protocol.");
    describe_counter!(
        UPSTREAM_FAILURES,
        "DNS queries without an answer of a server, or with SERVFAIL."
    );
    describe_histogram!(UPSTREAM_DURATION, "The duration of DNS queries for a server of the pod.");
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
    histogram!(UPSTREAM_DURATION, &labels).record(duration);
    if failed {
        counter!(UPSTREAM_FAILURES, &labels).increment(1);
    }
}
