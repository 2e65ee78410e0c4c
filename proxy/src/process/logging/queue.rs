//! Queues log lines, bounded in bytes, and writes them on a thread.
//!
//! ```text
//! threads ─ push ─▶ queue ─ take all ─▶ thread: write ─▶ pause 10 ms, or until 64 KiB are queued
//! ```
//!
//! A line that would exceed the bound is lost and counted. When a stalled or full output recovers,
//! the thread writes the count as a separate line.

use std::io::{self, ErrorKind, Write};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::line::Lines;
use crate::observe::log_loss;

/// The maximum number of bytes that are queued or being written.
const MAX_BYTES: usize = 1 << 20;
/// The thread's pause after a write. Lines that are pushed meanwhile need not wake it, which saves
/// two of the 30 system calls of a connection.
const WRITE_INTERVAL: Duration = Duration::from_millis(10);
/// The number of queued bytes that ends the pause early.
const BATCH_BYTES: usize = 64 << 10;
/// The delay after a failed write before the next attempt to report lost lines.
const WRITE_RETRY_DELAY: Duration = Duration::from_secs(1);
/// The maximum time that the end of the process waits for queued lines to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The queue of log lines, shared with the writer thread.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Wakes the writer thread.
    work: Condvar,
    /// Wakes the drop of [`QueueGuard`], which waits for the thread's end.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// The number of bytes that the thread is writing.
    in_flight: usize,
    /// Lines lost since the thread last took the queued lines.
    lost: u64,
    thread: ThreadState,
    is_closed: bool,
}

/// The state of the writer thread. `push` wakes it only if necessary.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ThreadState {
    #[default]
    Writing,
    /// Waits for a line.
    Idle,
    /// Waits for [`BATCH_BYTES`] or the end of [`WRITE_INTERVAL`].
    Paused,
    Ended,
}

/// Closes the queue on drop, after the thread has written the queued lines.
#[derive(Debug)]
pub(crate) struct QueueGuard(Arc<Queue>);

/// Starts the thread that writes to `output`.
pub(super) fn start<W: Write + Send + 'static>(
    output: W,
    lines: Lines,
) -> io::Result<(Arc<Queue>, QueueGuard)> {
    let queue = Arc::new(Queue::default());
    let mut writer = Output { to: output, lines, unreported: 0, is_within_line: false };
    let reader = queue.clone();
    let write = move || {
        // A panic loses the lines of the current write, which count as one lost line.
        while catch_unwind(AssertUnwindSafe(|| write_lines(&reader, &mut writer))).is_err() {
            log_loss::lost(1);
            writer.unreported += 1;
            thread::park_timeout(WRITE_INTERVAL);
        }
    };
    thread::Builder::new().name("log".to_owned()).spawn(write)?;
    Ok((queue.clone(), QueueGuard(queue)))
}

impl Queue {
    /// Queues a line. A line that exceeds the bound is lost and counted.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.waiting.len() + state.in_flight + line.len() > MAX_BYTES || state.is_closed {
            state.lost += 1;
            drop(state);
            log_loss::lost(1);
            return;
        }
        state.waiting.extend_from_slice(line);
        let wake = match state.thread {
            ThreadState::Idle => true,
            ThreadState::Paused => state.waiting.len() >= BATCH_BYTES,
            ThreadState::Writing | ThreadState::Ended => false,
        };
        if wake {
            state.thread = ThreadState::Writing;
            drop(state);
            self.work.notify_one();
        }
    }

    /// Waits for lines, at most for `timeout`, and moves all of them to `lines`. Returns the number
    /// of lines lost since the last call; `None` when the queue is closed and empty.
    fn take(&self, lines: &mut Vec<u8>, timeout: Option<Duration>) -> Option<u64> {
        lines.clear();
        let mut state = self.state();
        state.in_flight = 0;
        let nothing =
            |state: &mut State| state.waiting.is_empty() && state.lost == 0 && !state.is_closed;
        if nothing(&mut state) {
            state.thread = ThreadState::Idle;
            state = match timeout {
                None => {
                    self.work.wait_while(state, nothing).unwrap_or_else(PoisonError::into_inner)
                }
                Some(timeout) => {
                    let waited = self.work.wait_timeout_while(state, timeout, nothing);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        state.thread = ThreadState::Writing;
        if state.is_closed && state.waiting.is_empty() && state.lost == 0 {
            return None;
        }
        mem::swap(&mut state.waiting, lines);
        state.in_flight = lines.len();
        Some(mem::take(&mut state.lost))
    }

    /// Waits for [`BATCH_BYTES`], at most for [`WRITE_INTERVAL`].
    fn wait_for_batch(&self) {
        let mut state = self.state();
        state.in_flight = 0;
        state.thread = ThreadState::Paused;
        let few = |state: &mut State| state.waiting.len() < BATCH_BYTES && !state.is_closed;
        let waited = self.work.wait_timeout_while(state, WRITE_INTERVAL, few);
        waited.unwrap_or_else(PoisonError::into_inner).0.thread = ThreadState::Writing;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for QueueGuard {
    fn drop(&mut self) {
        let Self(queue) = self;
        let mut state = queue.state();
        state.is_closed = true;
        queue.work.notify_one();
        let running = |state: &mut State| state.thread != ThreadState::Ended;
        drop(queue.ended.wait_timeout_while(state, FLUSH_TIMEOUT, running));
    }
}

fn write_lines<W: Write>(queue: &Queue, output: &mut Output<W>) {
    let mut lines = Vec::new();
    loop {
        let retry = (output.unreported > 0).then_some(WRITE_RETRY_DELAY);
        let Some(lost) = queue.take(&mut lines, retry) else { break };
        output.write(&lines, lost);
        // Free the memory of a burst.
        lines.clear();
        lines.shrink_to(BATCH_BYTES);
        queue.wait_for_batch();
    }
    queue.state().thread = ThreadState::Ended;
    queue.ended.notify_one();
}

/// The log's output, and the number of lines that could not be written.
struct Output<W> {
    to: W,
    lines: Lines,
    /// Lost lines that the log has not reported yet.
    unreported: u64,
    /// Whether the last written byte is inside a line.
    is_within_line: bool,
}

impl<W: Write> Output<W> {
    /// Writes lines, then a line with the number of lost ones.
    fn write(&mut self, lines: &[u8], lost: u64) {
        let unwritten = self.write_lines(lines);
        let failed = unwritten.iter().filter(|byte| **byte == b'\n').count() as u64;
        if failed > 0 {
            log_loss::lost(failed);
        }
        self.unreported += lost + failed;
        // After a failure, the next attempt reports the count.
        if self.unreported > 0 && unwritten.is_empty() {
            let report = self.lines.lost(self.unreported);
            if self.write_lines(&report).is_empty() {
                self.unreported = 0;
            }
        }
    }

    /// Writes lines; returns the part that could not be written.
    fn write_lines<'a>(&mut self, lines: &'a [u8]) -> &'a [u8] {
        if self.is_within_line && self.write_bytes(b"\n") == 0 {
            return lines;
        }
        self.is_within_line = false;
        let (written, unwritten) = lines.split_at(self.write_bytes(lines));
        self.is_within_line = written.last().is_some_and(|last| *last != b'\n');
        unwritten
    }

    /// Writes until all is written or the output fails; returns the number of written bytes.
    fn write_bytes(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match self.to.write(rest) {
                Ok(0) => break,
                Ok(written) => done = bytes.len().min(done + written),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    // The output is a full pipe that another process has made non-blocking.
                    ErrorKind::WouldBlock => thread::park_timeout(WRITE_INTERVAL),
                    _ => break,
                },
            }
        }
        done
    }
}

#[cfg(test)]
mod tests;
