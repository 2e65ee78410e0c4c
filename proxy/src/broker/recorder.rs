//! Sends the metrics of the broker to the proxy process, which serves `/metrics`.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, Recorder,
    SetRecorderError, SharedString, Unit,
};

use crate::broker::link::Sender;
use crate::broker::message::{Change, Metric, ToProxy};

/// Installs the recorder of the broker.
///
/// # Errors
///
/// The process has a recorder already.
pub(crate) fn install(sender: Sender<ToProxy>) -> Result<(), SetRecorderError<impl fmt::Debug>> {
    metrics::set_global_recorder(Forwarding { sender, gauges: Mutex::default() })
}

/// Sends each change of a metric.
#[derive(Debug)]
struct Forwarding {
    sender: Sender<ToProxy>,
    /// The gauges with their last values: only changes are sent.
    gauges: Mutex<HashMap<Key, Arc<ForwardedGauge>>>,
}

/// Sends each increment.
#[derive(Debug)]
struct ForwardedCounter {
    key: Key,
    sender: Sender<ToProxy>,
}

/// Sends each new value.
#[derive(Debug)]
struct ForwardedGauge {
    key: Key,
    sender: Sender<ToProxy>,
    value: Mutex<Option<f64>>,
}

/// Sends a change. Fails only if the proxy process has ended, or reads too slowly, which ends it.
/// Each refused message of the proxy process is counted, so a hostile process causes messages to
/// itself.
fn send(sender: &Sender<ToProxy>, key: &Key, change: Change) {
    let label = |label: &metrics::Label| (label.key().to_owned(), label.value().to_owned());
    let (name, labels) = (key.name().to_owned(), key.labels().map(label).collect());
    sender.post(&ToProxy::Metric(Metric { name, labels, change })).ok();
}

impl CounterFn for ForwardedCounter {
    fn increment(&self, value: u64) {
        send(&self.sender, &self.key, Change::Count(value));
    }

    /// The broker has no counter with absolute values.
    fn absolute(&self, _: u64) {}
}

impl ForwardedGauge {
    fn update(&self, new: impl FnOnce(f64) -> f64) {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let new = new(value.unwrap_or_default());
        if *value != Some(new) {
            *value = Some(new);
            send(&self.sender, &self.key, Change::Set { bits: new.to_bits() });
        }
    }
}

impl GaugeFn for ForwardedGauge {
    fn increment(&self, by: f64) {
        self.update(|value| value + by);
    }

    fn decrement(&self, by: f64) {
        self.update(|value| value - by);
    }

    fn set(&self, new: f64) {
        self.update(|_| new);
    }
}

impl Recorder for Forwarding {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        let (key, sender) = (key.clone(), self.sender.clone());
        Counter::from_arc(Arc::new(ForwardedCounter { key, sender }))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        let mut gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        let gauge = gauges.entry(key.clone()).or_insert_with(|| {
            let (key, sender) = (key.clone(), self.sender.clone());
            Arc::new(ForwardedGauge { key, sender, value: Mutex::default() })
        });
        Gauge::from_arc(gauge.clone())
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

#[cfg(test)]
mod tests {
    use underpass_interception::SeqPacket;

    use super::*;
    use crate::broker::link;
    use crate::broker::message::Message as _;

    #[tokio::test]
    async fn sends_increments_of_counters_and_changes_of_gauges() {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let (sender, _, writer) = link::open::<ToProxy>(ours).unwrap();
        let forwarding = Forwarding { sender, gauges: Mutex::default() };
        metrics::with_local_recorder(&forwarding, || {
            metrics::counter!("repairs").increment(2);
            for value in [1, 1, 2] {
                metrics::gauge!("pods", "state" => "serving").set(value);
            }
        });
        drop(forwarding);
        writer.run().await;
        let mut received = Vec::new();
        let mut socket = theirs;
        while let Ok((rest, message)) = SeqPacket::receive_first(socket, 4096) {
            let Some(ToProxy::Metric(metric)) = ToProxy::decode(&message.bytes) else {
                panic!("{message:?}");
            };
            received.push((metric.name, metric.labels.len(), metric.change));
            socket = rest;
        }
        let set = |value: f64| ("pods".to_owned(), 1, Change::Set { bits: value.to_bits() });
        let repairs = ("repairs".to_owned(), 0, Change::Count(2));
        assert_eq!(received, [repairs, set(1.0), set(2.0)]);
    }
}
