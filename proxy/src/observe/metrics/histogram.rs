//! A histogram of durations. A sample is two relaxed atomic increments.
//!
//! Each worker has histograms of its own, which a scrape adds up, so that workers do not contend
//! for cache lines. A bucket keeps the trace of its latest sample, which OpenMetrics calls an
//! exemplar.

use std::num::NonZeroU128;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use super::exposition::{Format, Page};

/// The upper bounds of the buckets, in seconds; the last bucket has none.
pub(super) type Bounds = &'static [f64];

/// The histogram of one worker.
#[derive(Debug)]
pub(super) struct Histogram {
    bounds: Bounds,
    buckets: Box<[Bucket]>,
    /// The sum of all samples, in microseconds.
    sum: AtomicU64,
}

#[derive(Debug, Default)]
struct Bucket {
    count: AtomicU64,
    /// Locked by a scrape only for a copy. Samples do not wait for it.
    exemplar: Mutex<Option<Exemplar>>,
}

/// A sample with its trace.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Exemplar {
    trace_id: NonZeroU128,
    seconds: f64,
    at: SystemTime,
}

impl Histogram {
    pub(super) fn new(bounds: Bounds) -> Self {
        let buckets = (0..=bounds.len()).map(|_| Bucket::default()).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0) }
    }

    pub(super) fn record(&self, sample: Duration, trace_id: Option<NonZeroU128>) {
        let seconds = sample.as_secs_f64();
        let index = self.bounds.partition_point(|bound| *bound < seconds);
        let Some(bucket) = self.buckets.get(index) else { return };
        bucket.count.fetch_add(1, Relaxed);
        let micros = u64::try_from(sample.as_micros()).unwrap_or(u64::MAX);
        self.sum.fetch_add(micros, Relaxed);
        if let (Some(trace_id), Ok(mut exemplar)) = (trace_id, bucket.exemplar.try_lock()) {
            *exemplar = Some(Exemplar { trace_id, seconds, at: SystemTime::now() });
        }
    }
}

/// The sum of the histograms of all workers.
#[derive(Debug)]
pub(super) struct Total {
    bounds: Bounds,
    buckets: Vec<(u64, Option<Exemplar>)>,
    /// In microseconds.
    sum: u64,
}

impl Total {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, buckets: vec![(0, None); bounds.len() + 1], sum: 0 }
    }

    /// Adds the histogram of a worker, which has the same bounds.
    pub(super) fn add(&mut self, histogram: &Histogram) {
        for (total, bucket) in self.buckets.iter_mut().zip(&histogram.buckets) {
            total.0 += bucket.count.load(Relaxed);
            let exemplar = bucket.exemplar.try_lock().ok().and_then(|exemplar| *exemplar);
            let newer = |exemplar: &Exemplar| total.1.is_none_or(|other| other.at <= exemplar.at);
            total.1 = exemplar.filter(newer).or(total.1);
        }
        self.sum = self.sum.wrapping_add(histogram.sum.load(Relaxed));
    }

    /// Appends the lines of the histogram with these labels, which are not empty.
    pub(super) fn render(&self, name: &str, labels: &str, page: &mut Page) {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let mut count = 0;
        for (bound, (in_bucket, exemplar)) in bounds.zip(&self.buckets) {
            count += in_bucket;
            let bound = if bound.is_finite() { format!("{bound:?}") } else { "+Inf".to_owned() };
            let exemplar = match exemplar {
                Some(exemplar) if page.format == Format::OpenMetrics => exemplar.text(),
                _ => String::new(),
            };
            page.line(format_args!("{name}_bucket{{{labels},le=\"{bound}\"}} {count}{exemplar}"));
        }
        let sum = Duration::from_micros(self.sum).as_secs_f64();
        page.line(format_args!("{name}_sum{{{labels}}} {sum}"));
        page.line(format_args!("{name}_count{{{labels}}} {count}"));
    }
}

impl Exemplar {
    /// The end of a line of OpenMetrics.
    fn text(&self) -> String {
        let at = self.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let Self { trace_id, seconds, .. } = self;
        format!(" # {{trace_id=\"{trace_id:032x}\"}} {seconds} {at:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = &[0.001, 1.0];

    fn rendered(format: Format, histograms: &[Histogram]) -> Vec<String> {
        let (mut total, mut page) = (Total::new(BOUNDS), Page::new(format));
        histograms.iter().for_each(|histogram| total.add(histogram));
        total.render("x", "a=\"b\"", &mut page);
        page.into_text().lines().map(str::to_owned).collect()
    }

    #[test]
    fn histograms_of_workers_add_up() {
        let workers = [(); 2].map(|()| Histogram::new(BOUNDS));
        for (worker, millis) in [(0, 1), (1, 1), (0, 2), (1, 500), (0, 3000)] {
            workers[worker].record(Duration::from_millis(millis), None);
        }
        assert_eq!(
            rendered(Format::Prometheus, &workers),
            [
                "x_bucket{a=\"b\",le=\"0.001\"} 2",
                "x_bucket{a=\"b\",le=\"1.0\"} 4",
                "x_bucket{a=\"b\",le=\"+Inf\"} 5",
                "x_sum{a=\"b\"} 3.504",
                "x_count{a=\"b\"} 5",
            ]
        );
    }

    #[test]
    fn bucket_has_exemplar_of_latest_trace_in_openmetrics_only() {
        let workers = [(); 2].map(|()| Histogram::new(BOUNDS));
        for (worker, trace_id) in [(0, 1_u128), (0, 2), (1, 0xabc)] {
            let sample = Duration::from_millis(250);
            workers[worker].record(sample, NonZeroU128::new(trace_id));
        }
        let lines = rendered(Format::OpenMetrics, &workers);
        let start = "x_bucket{a=\"b\",le=\"1.0\"} 3 \
                     # {trace_id=\"00000000000000000000000000000abc\"} 0.25 ";
        let at = lines[1].strip_prefix(start).unwrap_or_else(|| panic!("{lines:?}"));
        assert!(at.parse::<f64>().is_ok_and(|at| at > 1.7e9), "{at}");
        assert!(lines[0].ends_with("} 0") && lines[2].ends_with("} 3"), "{lines:?}");
        assert!(rendered(Format::Prometheus, &workers).iter().all(|line| !line.contains('#')));
    }
}
