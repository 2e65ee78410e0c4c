//! The settings of the export of traces and log events by OTLP.

use std::path::PathBuf;

use super::ratio::Ratio;

/// A collector of traces and log events (OTLP over HTTP with Protobuf).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtlpSettings {
    /// `http://HOST:PORT` or `https://HOST:PORT`, with an optional path, which precedes that of a
    /// signal.
    pub endpoint: String,
    /// The file with further headers of each request. Read for every request.
    pub headers: Option<PathBuf>,
    /// PEM: the roots that verify the collector's certificate. Set if the endpoint is `https`.
    pub roots: Option<PathBuf>,
    /// The fraction of the connections that are traced, unless a peer has decided.
    pub sample_ratio: Ratio,
    /// Whether log events are exported too.
    pub logs: bool,
}
