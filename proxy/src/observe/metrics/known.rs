//! A worker's cache of series, which avoids the registry's lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use foldhash::fast::RandomState;

use super::registry::SeriesRegistry;
use super::series::{Labels, Series};
use super::timings::Timings;

/// The maximum number of cached series, about 200 bytes each. When it is exceeded, the cache is
/// cleared.
const MAX_CACHED: usize = 1024;

/// The cache of one worker, and its own measurements.
#[derive(Debug)]
pub(crate) struct KnownSeries {
    registry: Arc<SeriesRegistry>,
    timings: Arc<Timings>,
    /// Locked by its worker's thread only.
    cached: Mutex<HashMap<Labels, Weak<Series>, RandomState>>,
}

impl Default for KnownSeries {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}

impl KnownSeries {
    pub(crate) fn new(registry: Arc<SeriesRegistry>) -> Self {
        let timings = registry.timings_of_worker();
        Self { registry, timings, cached: Mutex::default() }
    }

    /// The durations that this worker measures.
    pub(crate) fn timings(&self) -> &Arc<Timings> {
        &self.timings
    }

    /// The series with these labels. The caller owns it while it counts, so that it does not
    /// expire.
    pub(crate) fn get(&self, labels: Labels) -> Arc<Series> {
        let mut cached = self.lock();
        if let Some(series) = cached.get(&labels).and_then(Weak::upgrade) {
            return series;
        }
        let series = self.registry.get(&labels);
        // An overflow series is not cached, because the registry may have room for a separate
        // series later.
        if !series.is_overflow() {
            if cached.len() >= MAX_CACHED {
                cached.clear();
            }
            cached.insert(labels, Arc::downgrade(&series));
        }
        series
    }

    /// Clears the cache, which releases the workloads and services of an old mesh.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Labels, Weak<Series>, RandomState>> {
        // No code panics while it holds the lock.
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::{Mesh, Workload};

    use super::*;
    use crate::observe::metrics::series::put;
    use crate::observe::party::{Direction, Party};

    /// The same workload, as read into a new mesh.
    fn workload() -> Arc<Workload> {
        let mesh = Mesh::from_text("mesh", "workloads: [{name: a, workloadIps: [10.0.0.1]}]");
        mesh.unwrap().workloads()[0].clone()
    }

    fn to(workload: &Arc<Workload>) -> Labels {
        let destination = Party { workload: Some(workload.clone()), ..Party::default() };
        Labels::new(Direction::Outbound, &Party::default(), &destination, None, true)
    }

    #[test]
    fn connections_with_equal_labels_share_a_series() {
        let known = KnownSeries::default();
        let (here, again) = (workload(), workload());
        let first = known.get(to(&here));
        assert!(Arc::ptr_eq(&first, &known.get(to(&here))));
        assert!(
            Arc::ptr_eq(&first, &known.get(to(&again))),
            "equal labels of another mesh share a series"
        );
        let plain = Labels { mutual_tls: false, ..to(&here) };
        assert!(!Arc::ptr_eq(&first, &known.get(plain)));
        let Labels { source, destination, .. } = to(&here);
        let back = Labels { source: destination, destination: source, ..to(&here) };
        assert!(!Arc::ptr_eq(&first, &known.get(back)));
    }

    #[test]
    fn series_cache_is_bounded_and_releases_old_mesh() {
        let known = KnownSeries::default();
        let workloads: Vec<_> = (0..=MAX_CACHED).map(|_| workload()).collect();
        workloads.iter().for_each(|one| drop(known.get(to(one))));
        assert_eq!(known.lock().len(), 1);
        known.forget();
        assert!(workloads.iter().all(|one| Arc::strong_count(one) == 1));
    }

    #[test]
    fn label_values_are_escaped() {
        let mut text = String::new();
        put(&mut text, "one", Some("a\"b\\c\nd"));
        put(&mut text, "two", None);
        assert_eq!(text, r#"one="a\"b\\c\nd",two="unknown""#);
    }
}
