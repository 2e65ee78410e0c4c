//! The series that one worker has found, cached without the registry's lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use foldhash::fast::RandomState;

use super::registry::SeriesRegistry;
use super::series::{Labels, Series};

/// How many series a worker caches, some 200 bytes each. With more, the cache starts again.
const CACHED_AT_MOST: usize = 1024;

/// The series that one worker has counted in, which it finds without the registry's lock.
#[derive(Debug, Default)]
pub(crate) struct KnownSeries {
    registry: Arc<SeriesRegistry>,
    /// Only its worker's thread ever locks it.
    cached: Mutex<HashMap<Labels, Weak<Series>, RandomState>>,
}

impl KnownSeries {
    pub(crate) fn new(registry: Arc<SeriesRegistry>) -> Self {
        Self { registry, cached: Mutex::default() }
    }

    /// The series of these labels. A caller that counts in it holds it, so that it does not expire.
    pub(crate) fn get(&self, labels: Labels) -> Arc<Series> {
        let mut cached = self.lock();
        if let Some(series) = cached.get(&labels).and_then(Weak::upgrade) {
            return series;
        }
        let series = self.registry.get(&labels);
        // An overflow series is looked up again: there may be room for its own by then.
        if !series.is_overflow() {
            if cached.len() >= CACHED_AT_MOST {
                cached.clear();
            }
            cached.insert(labels, Arc::downgrade(&series));
        }
        series
    }

    /// Clears the cache, and releases the mesh that its keys are of.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Labels, Weak<Series>, RandomState>> {
        // The cache is whole at any time.
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::{Mesh, Workload};

    use super::*;
    use crate::observe::metrics::series::put;
    use crate::observe::party::{Direction, Party};

    /// As a state of the mesh has it.
    fn workload() -> Arc<Workload> {
        let mesh = Mesh::from_text("mesh", "workloads: [{name: a, workloadIps: [10.0.0.1]}]");
        mesh.unwrap().workloads()[0].clone()
    }

    fn to(workload: &Arc<Workload>) -> Labels {
        let destination = Party { workload: Some(workload.clone()), ..Party::default() };
        Labels::new(Direction::Outbound, &Party::default(), &destination, None, true)
    }

    #[test]
    fn series_is_shared_by_connections_with_equal_labels() {
        let known = KnownSeries::default();
        let (here, again) = (workload(), workload());
        let first = known.get(to(&here));
        assert!(Arc::ptr_eq(&first, &known.get(to(&here))));
        assert!(Arc::ptr_eq(&first, &known.get(to(&again))), "the same labels of another mesh");
        let plain = Labels { mutual_tls: false, ..to(&here) };
        assert!(!Arc::ptr_eq(&first, &known.get(plain)));
        let Labels { source, destination, .. } = to(&here);
        let back = Labels { source: destination, destination: source, ..to(&here) };
        assert!(!Arc::ptr_eq(&first, &known.get(back)));
    }

    #[test]
    fn cache_is_bounded_and_releases_old_mesh() {
        let known = KnownSeries::default();
        let workloads: Vec<_> = (0..=CACHED_AT_MOST).map(|_| workload()).collect();
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
