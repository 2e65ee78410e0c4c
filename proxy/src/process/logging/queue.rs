//! A queue of log lines that is bounded in bytes, and the thread that writes them.
//!
//! ```text
//! threads ─ push ─▶ waiting ─ take (all at once) ─▶ thread: write ─▶ rest 10 ms, or until 64 KiB wait
//! ```
//!
//! A line that would exceed the bound is lost and counted. While the output is stalled or full the
//! thread keeps the count, and writes it as a line of its own once the output takes lines again.

use std::io::{self, ErrorKind, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::line::Lines;
use crate::observe::metrics;

/// How many bytes wait or are being written, at most.
const MAX_BYTES: usize = 1 << 20;
/// How long the thread rests when it has written what there was. A thread that logs meanwhile need
/// not wake it: that cost a connection two of its 30 system calls.
const REST: Duration = Duration::from_millis(10);
/// So much is reason enough to end the rest.
const BATCH_BYTES: usize = 64 << 10;
/// How long after a failed write the next attempt to report the lost lines is.
const RETRY: Duration = Duration::from_secs(1);
/// How long the end of the process waits for lines to be written.
const FAREWELL: Duration = Duration::from_secs(1);

/// The lines that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// What the thread waits for.
    work: Condvar,
    /// What the guard waits for.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// How many bytes the thread writes now.
    in_flight: usize,
    /// Lines lost since the thread last took lines.
    lost: u64,
    thread: ThreadState,
    closed: bool,
}

/// What the thread does, and so whether it must be woken.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ThreadState {
    #[default]
    Writing,
    /// Until there is a line.
    Idle,
    /// Until there are many.
    Resting,
    Ended,
}

/// Writes the lines that wait when it is dropped.
#[derive(Debug)]
pub(crate) struct QueueGuard(Arc<Queue>);

/// Starts the thread that writes to `output`.
pub(super) fn start<W: Write + Send + 'static>(
    output: W,
    lines: Lines,
) -> io::Result<(Arc<Queue>, QueueGuard)> {
    let queue = Arc::new(Queue::default());
    let writer = Output { to: output, lines, unreported: 0, within_line: false };
    let reader = queue.clone();
    thread::Builder::new().name("log".to_owned()).spawn(move || write_lines(&reader, writer))?;
    Ok((queue.clone(), QueueGuard(queue)))
}

impl Queue {
    /// Adds a line, unless it exceeds the bound: then it is lost and counted.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.waiting.len() + state.in_flight + line.len() > MAX_BYTES || state.closed {
            state.lost += 1;
            drop(state);
            metrics::log_lines_lost(1);
            return;
        }
        state.waiting.extend_from_slice(line);
        let wake = match state.thread {
            ThreadState::Idle => true,
            ThreadState::Resting => state.waiting.len() >= BATCH_BYTES,
            ThreadState::Writing | ThreadState::Ended => false,
        };
        if wake {
            state.thread = ThreadState::Writing;
            drop(state);
            self.work.notify_one();
        }
    }

    /// Waits for lines, or for `timeout`, and takes all of them; the number of lines lost after
    /// them. `None` when the queue is closed and empty.
    fn take(&self, lines: &mut Vec<u8>, timeout: Option<Duration>) -> Option<u64> {
        lines.clear();
        let mut state = self.state();
        state.in_flight = 0;
        let nothing =
            |state: &mut State| state.waiting.is_empty() && state.lost == 0 && !state.closed;
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
        if state.closed && state.waiting.is_empty() && state.lost == 0 {
            return None;
        }
        mem::swap(&mut state.waiting, lines);
        state.in_flight = lines.len();
        Some(mem::take(&mut state.lost))
    }

    /// Waits until many lines wait, or for [`REST`].
    fn rest(&self) {
        let mut state = self.state();
        state.in_flight = 0;
        state.thread = ThreadState::Resting;
        let few = |state: &mut State| state.waiting.len() < BATCH_BYTES && !state.closed;
        let waited = self.work.wait_timeout_while(state, REST, few);
        waited.unwrap_or_else(PoisonError::into_inner).0.thread = ThreadState::Writing;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for QueueGuard {
    fn drop(&mut self) {
        let Self(queue) = self;
        let mut state = queue.state();
        state.closed = true;
        queue.work.notify_one();
        let running = |state: &mut State| state.thread != ThreadState::Ended;
        drop(queue.ended.wait_timeout_while(state, FAREWELL, running));
    }
}

fn write_lines<W: Write>(queue: &Queue, mut output: Output<W>) {
    let mut lines = Vec::new();
    loop {
        let retry = (output.unreported > 0).then_some(RETRY);
        let Some(lost) = queue.take(&mut lines, retry) else { break };
        output.write(&lines, lost);
        // What a burst needed is given back.
        lines.clear();
        lines.shrink_to(BATCH_BYTES);
        queue.rest();
    }
    queue.state().thread = ThreadState::Ended;
    queue.ended.notify_one();
}

/// Where lines go, and how many did not arrive there.
struct Output<W> {
    to: W,
    lines: Lines,
    /// Lost lines that the log has not reported yet.
    unreported: u64,
    /// Whether the last byte that was written is not the end of a line.
    within_line: bool,
}

impl<W: Write> Output<W> {
    /// Writes lines, and then how many were lost.
    fn write(&mut self, lines: &[u8], lost: u64) {
        let unwritten = self.write_lines(lines);
        let failed = unwritten.iter().filter(|byte| **byte == b'\n').count() as u64;
        if failed > 0 {
            metrics::log_lines_lost(failed);
        }
        self.unreported += lost + failed;
        // After a failure the next attempt reports it.
        if self.unreported > 0 && unwritten.is_empty() {
            let report = self.lines.lost(self.unreported);
            if self.write_lines(&report).is_empty() {
                self.unreported = 0;
            }
        }
    }

    /// Writes lines; what could not be written of them.
    fn write_lines<'a>(&mut self, lines: &'a [u8]) -> &'a [u8] {
        if self.within_line && self.write_bytes(b"\n") == 0 {
            return lines;
        }
        self.within_line = false;
        let (written, unwritten) = lines.split_at(self.write_bytes(lines));
        self.within_line = written.last().is_some_and(|last| *last != b'\n');
        unwritten
    }

    /// Writes until all is written or the output fails; how many bytes that were.
    fn write_bytes(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match self.to.write(rest) {
                Ok(0) => break,
                Ok(written) => done = bytes.len().min(done + written),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    // A pipe that another process made non-blocking, and that is full.
                    ErrorKind::WouldBlock => thread::park_timeout(REST),
                    _ => break,
                },
            }
        }
        done
    }
}

#[cfg(test)]
mod tests;
