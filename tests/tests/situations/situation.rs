//! A row of the table: how a situation is made, and the answer that each tool must give.

use std::future::Future;
use std::pin::Pin;

use crate::stage::Broken;

/// A broken situation.
pub(crate) struct Situation {
    /// A sentence about it, which is the name of its trial.
    pub(crate) name: &'static str,
    /// Makes it.
    pub(crate) make: Make,
    pub(crate) status: Status,
    pub(crate) doctor: Doctor,
    pub(crate) log: Log,
    pub(crate) metric: Metric,
}

/// Makes a situation.
pub(crate) type Make = fn() -> Pin<Box<dyn Future<Output = Broken>>>;

/// The entry that `underpass status` must list.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Status {
    /// A problem of this part with these words, and a hint. The exit code is 3.
    Problem(&'static str, &'static str),
    /// A notice of this part with these words, and a hint.
    Notice(&'static str, &'static str),
    /// Failed connections with this reason, and these words in the hint.
    Failure(&'static str, &'static str),
    /// A DNS name that failed, with these words in the error or the hint.
    Name(&'static str, &'static str),
    /// No proxy answers: it has not started, or has ended. These words are in the hint.
    NoProxy(&'static str),
}

/// The finding of `underpass doctor`: the id of the check, its level, and words of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Doctor(pub(crate) &'static str, pub(crate) &'static str, pub(crate) &'static str);

/// The line that the log must contain.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Log {
    /// A line with all of these words.
    Line(&'static [&'static str]),
    /// The error of a failed start and its hint, with these words.
    StartError(&'static [&'static str]),
    /// No line, for this reason.
    Absent(&'static str),
}

/// The metric that `/metrics` must show.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Metric {
    /// A counter with these labels that is zero or absent in a sound scene.
    Rises(&'static str, &'static [(&'static str, &'static str)]),
    /// A gauge with these labels and this value.
    Is(&'static str, &'static [(&'static str, &'static str)], f64),
    /// A gauge whose value is nearly that of another one.
    Nearly(&'static str, &'static str),
    /// A gauge whose value is a time in the past.
    Passed(&'static str),
    /// No metric, for this reason.
    Absent(&'static str),
}

/// The counter of failed connections.
pub(crate) const ERRORS: &str = "underpass_connection_errors_total";
/// The counter of certificates that could not be renewed.
pub(crate) const CERTIFICATE_FAILURES: &str = "underpass_certificate_failures_total";
/// The reason why a process that does not start has no metric.
pub(crate) const NOT_STARTED: &str = "the process ends before it serves metrics";
