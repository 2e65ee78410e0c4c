//! Refuses a pod if the limit of open files is too low for another one.
//!
//! Idle pods may use three quarters of the descriptors that the limit leaves for pods and
//! connections. Without this, a process could no longer receive the descriptors of a message,
//! accept connections, or change rules.

use std::sync::Arc;

use thiserror::Error;
use underpass_hbone::Budget;

use super::descriptors::{Descriptors, descriptors_of_idle_pod};
use super::{open_files, open_files_limit};

/// The descriptors of all idle pods of a node daemon. Clones share the count.
#[derive(Debug, Clone)]
pub(crate) struct PodDescriptors(Arc<State>);

#[derive(Debug)]
struct State {
    budget: Budget,
    /// The limit of open files of the process.
    limit: usize,
}

/// The descriptors of one pod.
#[derive(Debug)]
pub(crate) struct PodDescriptorsPermit {
    state: Arc<State>,
    count: usize,
}

/// The pods that are served leave no descriptors for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the limit of {limit} open files is too low for another pod, which needs {needed}")]
pub(crate) struct TooManyPods {
    limit: usize,
    needed: usize,
}

impl PodDescriptors {
    /// The descriptors of this process with `workers` threads. A proxy process has the same limit,
    /// and fewer other files.
    pub(crate) fn new(workers: usize) -> Self {
        Self::with_limit(open_files_limit(), open_files(), workers)
    }

    fn with_limit(limit: usize, open: usize, workers: usize) -> Self {
        let allowed = Descriptors::new(limit, open, workers).total();
        Self(Arc::new(State { budget: Budget::new(allowed - allowed / 4), limit }))
    }

    /// Takes the descriptors of a pod.
    ///
    /// # Errors
    ///
    /// The other pods leave too few.
    pub(crate) fn take(&self, has_dns_proxy: bool) -> Result<PodDescriptorsPermit, TooManyPods> {
        let (limit, count) = (self.0.limit, descriptors_of_idle_pod(has_dns_proxy));
        let taken = self.0.budget.take(count);
        taken.map_err(|_| TooManyPods { limit, needed: count })?;
        Ok(PodDescriptorsPermit { state: self.0.clone(), count })
    }
}

impl Drop for PodDescriptorsPermit {
    fn drop(&mut self) {
        self.state.budget.give_back(self.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_refused_while_others_use_three_quarters_of_the_descriptors() {
        // 200 - 24 - 2 * 4 - 64 = 104 are allowed: 78 are for idle pods.
        let descriptors = PodDescriptors::with_limit(200, 24, 2);
        let [one, _two, _three, _four] = [false, true, false, false].map(|has_dns_proxy| {
            descriptors.take(has_dns_proxy).expect("70 descriptors are in use at the end")
        });
        let refused = descriptors.take(false).expect_err("8 descriptors are left");
        assert_eq!(refused, TooManyPods { limit: 200, needed: 16 });
        drop(one);
        descriptors.take(true).expect("24 descriptors are left");
    }
}
