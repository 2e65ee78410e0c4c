//! Runs long computations without delaying the threads that serve connections.

use std::thread;

use crate::process::privileges::confine_auxiliary_thread;

/// The nice value of the thread. Other threads get nine tenths of the CPU if both need it (weights
/// in sched(7)).
const NICE: i32 = 10;

/// Runs `work` on a new thread with low priority and without capabilities. Drops it if no thread
/// can be started.
pub fn run_in_background(work: Box<dyn FnOnce() + Send>) {
    run_on_thread(Box::new(|| {
        // On Linux, nice(2) affects only this thread. If it is not permitted, the thread keeps its
        // priority.
        rustix::process::nice(NICE).ok();
        work();
    }));
}

/// Runs `work`, which connections wait for, on a new thread without capabilities. Drops it if no
/// thread can be started.
pub fn run_on_thread(work: Box<dyn FnOnce() + Send>) {
    let run = move || {
        if let Err(error) = confine_auxiliary_thread() {
            tracing::warn!(%error, "a thread keeps capabilities that it does not need");
        }
        work();
    };
    thread::Builder::new().name("background".to_owned()).spawn(run).ok();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::process::getpriority_process;

    use super::*;

    #[test]
    fn only_background_thread_has_lower_priority() {
        let own = getpriority_process(None).unwrap();
        let priority = |run: fn(Box<dyn FnOnce() + Send>)| {
            let (finished, result) = mpsc::channel();
            run(Box::new(move || finished.send(getpriority_process(None).unwrap()).unwrap()));
            result.recv().unwrap()
        };
        assert_eq!(priority(run_in_background), (own + NICE).min(19));
        assert_eq!(priority(run_on_thread), own);
        assert_eq!(getpriority_process(None).unwrap(), own);
    }
}
