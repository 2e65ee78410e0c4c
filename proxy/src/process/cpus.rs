//! Counts the CPUs that this process may use.

/// The number of CPUs, cgroup limits and affinity included.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
