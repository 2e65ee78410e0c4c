//! Supervises tasks and threads according to their role.
//!
//! ```text
//! essential       a panic or early end ends the process with an error; the rules stay
//! restarting      a panic or early end is logged and counted; the task restarts after a back-off
//! per connection  a panic is logged and ends only that connection (`log_panic` of hbone)
//! ```

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use underpass_hbone::{Panic, catch_panic};

use crate::observe::metrics;

/// The bounds of the back-off before a task restarts. It doubles after each failure.
const MIN_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// The failure of a task or thread that must not end.
#[derive(Debug, Error)]
pub(crate) enum TaskFailure {
    #[error("{task} panicked: {panic}")]
    Panicked { task: Cow<'static, str>, panic: Panic },
    #[error("{task} ended unexpectedly")]
    Ended { task: Cow<'static, str> },
}

/// Starts essential tasks. Clones report to the same [`Failures`].
#[derive(Debug, Clone)]
pub(crate) struct Supervisor(mpsc::UnboundedSender<TaskFailure>);

/// Receives the failures of essential tasks.
#[derive(Debug)]
pub(crate) struct Failures(mpsc::UnboundedReceiver<TaskFailure>);

/// A running task. Dropping the handle aborts it.
#[derive(Debug)]
pub(crate) struct Task(AbortHandle);

impl Supervisor {
    pub(crate) fn new() -> (Self, Failures) {
        let (sender, failures) = mpsc::unbounded_channel();
        (Self(sender), Failures(failures))
    }

    /// Starts a task whose failure ends the process.
    pub(crate) fn essential<T: Send + 'static>(
        &self,
        task: &'static str,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task {
        let supervisor = self.clone();
        let running = tokio::spawn(async move {
            let failure = failure(task, catch_panic(future).await);
            supervisor.report(failure);
        });
        Task(running.abort_handle())
    }

    /// Runs the body of a thread whose panic ends the process. A normal end is allowed.
    pub(crate) fn essential_thread(&self, thread: String, body: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
            self.report(TaskFailure::Panicked { task: thread.into(), panic: Panic::of(&*panic) });
        }
    }

    fn report(&self, failure: TaskFailure) {
        // Fails if the process is already ending.
        self.0.send(failure).ok();
    }
}

impl Failures {
    /// Waits for the first failure. Cancel-safe.
    pub(crate) async fn next(&mut self) -> TaskFailure {
        match self.0.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }
}

/// Logs every panic of the process with its source location.
pub(crate) fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let place = panic.location().map(tracing::field::display);
        tracing::error!(thread, place, panic = %Panic::of(panic.payload()), "internal error: panic");
    }));
}

/// Starts the task that `make` creates, and starts it again after a panic or end.
pub(crate) fn restarting<F>(
    task: &'static str,
    mut make: impl FnMut() -> F + Send + 'static,
) -> Task
where
    F: Future<Output: Send> + Send + 'static,
{
    let running = tokio::spawn(async move {
        let mut pause = MIN_BACKOFF;
        loop {
            let began = Instant::now();
            let failure = failure(task, catch_panic(async { make().await }).await);
            if began.elapsed() > MAX_BACKOFF {
                pause = MIN_BACKOFF;
            }
            metrics::task_restarted(task);
            tracing::error!(%failure, ?pause, "a task failed: starting it again");
            sleep(pause).await;
            pause = (pause * 2).min(MAX_BACKOFF);
        }
    });
    Task(running.abort_handle())
}

fn failure<T>(task: &'static str, ended: Result<T, Panic>) -> TaskFailure {
    let task = Cow::Borrowed(task);
    match ended {
        Ok(_) => TaskFailure::Ended { task },
        Err(panic) => TaskFailure::Panicked { task, panic },
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[tokio::test]
    async fn panic_and_early_end_of_essential_task_are_reported_with_its_name() {
        let (supervisor, mut failures) = Supervisor::new();
        let _panics = supervisor.essential("one task", async { panic!("of {}", "a kind") });
        assert_eq!(failures.next().await.to_string(), "one task panicked: of a kind");
        let _ends = supervisor.essential("other task", async {});
        assert_eq!(failures.next().await.to_string(), "other task ended unexpectedly");
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_task_ends_without_failure() {
        let (supervisor, mut failures) = Supervisor::new();
        let (alive, end) = tokio::sync::oneshot::channel::<()>();
        let task = supervisor.essential("a task", async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        drop(task);
        end.await.unwrap_err();
        let waited = tokio::time::timeout(Duration::from_secs(1), failures.next()).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    #[tokio::test]
    async fn panic_of_essential_thread_is_reported_with_its_name() {
        let (supervisor, mut failures) = Supervisor::new();
        std::thread::spawn(move || supervisor.essential_thread("worker-7".into(), || panic!("ah")));
        assert_eq!(failures.next().await.to_string(), "worker-7 panicked: ah");
    }

    #[tokio::test(start_paused = true)]
    async fn restarting_task_starts_again_after_growing_pauses() {
        let (starts, began) = (Arc::new(AtomicUsize::new(0)), Instant::now());
        let (third, mut reached) = mpsc::unbounded_channel();
        let counted = starts.clone();
        let task = restarting("a task", move || {
            let (start, third) = (counted.fetch_add(1, Relaxed), third.clone());
            async move {
                match start {
                    0 => panic!("at once"),
                    1 => {}
                    _ => {
                        third.send(()).ok();
                        std::future::pending().await
                    }
                }
            }
        });
        reached.recv().await.unwrap();
        assert_eq!(began.elapsed(), MIN_BACKOFF * 3);
        drop(task);
        assert!(reached.recv().await.is_none(), "a dropped task ends");
        assert_eq!(starts.load(Relaxed), 3);
    }
}
