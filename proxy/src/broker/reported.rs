//! Applies the metrics that the broker reports for the endpoints of the proxy process.

use metrics::{Label, counter, gauge};

use crate::broker::message::{Change, Metric};

/// Applies a change of a metric of the broker.
pub(super) fn apply(Metric { name, labels, change }: Metric) {
    let label = |(key, value)| Label::new::<String, String>(key, value);
    let labels: Vec<Label> = labels.into_iter().map(label).collect();
    match change {
        Change::Count(by) => counter!(name, labels).increment(by),
        Change::Set { bits } => gauge!(name, labels).set(f64::from_bits(bits)),
    }
}
