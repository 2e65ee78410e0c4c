//! The metric series of connections: their number, lifetime and labels.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

/// The number and lifetime of the metric series of connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeriesSettings {
    /// The maximum number of label sets. Further connections are counted as `overflow`.
    pub limit: usize,
    /// The time after which an unused label set is removed.
    pub idle: Duration,
    /// The labels that no series has.
    pub omitted: Vec<MetricLabel>,
}

/// A label of the metrics of connections that may be omitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MetricLabel(&'static str);

impl MetricLabel {
    /// The labels about the service and about both ends.
    pub const ALL: [Self; 23] = [
        Self("destination_service"),
        Self("destination_service_name"),
        Self("destination_service_namespace"),
        Self("source_workload"),
        Self("source_workload_namespace"),
        Self("source_canonical_service"),
        Self("source_canonical_revision"),
        Self("source_app"),
        Self("source_version"),
        Self("source_cluster"),
        Self("source_principal"),
        Self("source_region"),
        Self("source_zone"),
        Self("destination_workload"),
        Self("destination_workload_namespace"),
        Self("destination_canonical_service"),
        Self("destination_canonical_revision"),
        Self("destination_app"),
        Self("destination_version"),
        Self("destination_cluster"),
        Self("destination_principal"),
        Self("destination_region"),
        Self("destination_zone"),
    ];

    /// The name of the label.
    pub fn name(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for MetricLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl FromStr for MetricLabel {
    type Err = UnknownLabel;

    fn from_str(text: &str) -> Result<Self, UnknownLabel> {
        Self::ALL.into_iter().find(|label| label.0 == text).ok_or(UnknownLabel)
    }
}

/// A text that names no [`MetricLabel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("must be a label about the source or the destination, such as source_principal")]
pub struct UnknownLabel;

impl Default for SeriesSettings {
    fn default() -> Self {
        // A label set takes about 4 KiB of `/metrics`. With this time, a peer that connects every
        // half hour keeps its counters.
        Self { limit: 1000, idle: Duration::from_secs(3600), omitted: Vec::new() }
    }
}
