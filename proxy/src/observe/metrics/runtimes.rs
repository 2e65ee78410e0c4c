//! The load of the workers, as their runtimes measure it. The names are ztunnel's, whose workers
//! share one runtime.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use tokio::runtime::{Handle, RuntimeMetrics};

use super::exposition::{Kind, Page};

const WORKERS: &str = "tokio_num_workers";
const QUEUED: &str = "tokio_global_queue_depth";
const TASKS: &str = "tokio_num_alive_tasks";
const BUSY: &str = "tokio_worker_total_busy_duration_seconds_total";

/// The runtimes of the workers, each with the index of its worker.
#[derive(Default)]
pub(crate) struct Runtimes(Mutex<Vec<(usize, RuntimeMetrics)>>);

impl fmt::Debug for Runtimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runtimes")
    }
}

impl Runtimes {
    /// Includes the runtime of a worker.
    pub(crate) fn include(&self, worker: usize, runtime: &Handle) {
        let mut runtimes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        runtimes.push((worker, runtime.metrics()));
        runtimes.sort_by_key(|(worker, _)| *worker);
    }

    pub(super) fn render(&self, page: &mut Page) {
        // No code panics while it holds the lock.
        let runtimes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |of: fn(&RuntimeMetrics) -> usize| -> usize {
            runtimes.iter().map(|(_, runtime)| of(runtime)).sum()
        };
        for (name, help, value) in [
            (WORKERS, "Data workers.", runtimes.len()),
            (
                QUEUED,
                "Tasks that other threads have woken.",
                sum(RuntimeMetrics::global_queue_depth),
            ),
            (TASKS, "Tasks of the workers.", sum(RuntimeMetrics::num_alive_tasks)),
        ] {
            page.family(name, Kind::Gauge, help);
            page.line(format_args!("{name} {value}"));
        }
        page.family(BUSY, Kind::Counter, "The time that a worker has run tasks.");
        for (worker, runtime) in &*runtimes {
            // The runtime of a worker has one thread.
            let busy = runtime.worker_total_busy_duration(0).as_secs_f64();
            page.line(format_args!("{BUSY}{{worker=\"{worker}\"}} {busy}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::super::exposition::Format;
    use super::*;

    #[test]
    fn busy_time_of_each_worker_is_shown() {
        let runtimes = Runtimes::default();
        let start = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let [busy, idle] = [start(), start()];
        runtimes.include(1, idle.handle());
        runtimes.include(0, busy.handle());
        busy.block_on(async {
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(20) {
                std::hint::spin_loop();
            }
            // The runtime adds the time when it looks for events.
            tokio::time::sleep(Duration::from_millis(1)).await;
        });
        let mut page = Page::new(Format::Prometheus);
        runtimes.render(&mut page);
        let text = page.into_text();
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
            line.unwrap_or_else(|| panic!("{name} is not in:\n{text}")).parse::<f64>().unwrap()
        };
        assert_eq!(value(WORKERS), 2.0);
        assert!(value(&format!("{BUSY}{{worker=\"0\"}}")) >= 0.02, "{text}");
        assert_eq!(value(&format!("{BUSY}{{worker=\"1\"}}")), 0.0);
    }
}
