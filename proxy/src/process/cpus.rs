//! Counts the CPUs that this process may use.

/// The number of CPUs, limited by cgroup quotas and CPU affinity.
pub(crate) fn available_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
