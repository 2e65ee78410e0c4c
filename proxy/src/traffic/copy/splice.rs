//! Zero-copy forwarding of bulk between two TCP connections: splice(2) through a pipe.
//!
//! `tcp.rs` detects bulk, and `direction.rs` ends a direction.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use underpass_interception::SplicePipe;

use super::Side as _;
use super::tcp::Tcp;
use crate::error::ProxyError;
use crate::limits::{Buffers, FdPermit};
use crate::observe::metrics::buffer_refused;

/// The size of a pipe in bytes. A quarter of it cost an eighth more CPU for bulk; four times of it
/// gained less than a tenth. An unprivileged user may have 64 MiB in pipes
/// (`fs.pipe-user-pages-soft`).
const PIPE: usize = 256 * 1024;
/// A move of fewer bytes is small.
const SMALL_MOVE: usize = 16 * 1024;
/// The number of consecutive small moves after which a connection is no longer bulk, and is copied.
const MAX_SMALL_MOVES: u32 = 8;
/// The maximum number of empty pipes that a worker keeps.
const MAX_SPARE: usize = 64;

thread_local! {
    /// The empty pipes of this worker. A connection never leaves its worker's thread.
    static POOL: RefCell<PipePool> = const { RefCell::new(PipePool { spare: Vec::new(), members: 0 }) };
}

/// A direction that moves bulk. It holds a pipe only while bytes are in it. The pipe is always
/// empty before it is filled, so EAGAIN identifies the connection to wait for, and the bytes that
/// leave the pipe are the moved bytes.
pub(super) struct Splice {
    pipe: Option<Pipe>,
    /// The number of consecutive small moves.
    small_moves: u32,
    _member: SplicingDirection,
}

impl Splice {
    pub(super) fn new() -> Self {
        Self { pipe: None, small_moves: 0, _member: SplicingDirection::new() }
    }

    /// Moves bytes until it must wait. True after FIN, when all bytes are written. False when the
    /// direction must be copied again, because it is no longer bulk or there is no pipe.
    pub(super) fn poll(
        &mut self,
        source: &mut Tcp<'_>,
        sink: &mut Tcp<'_>,
        watch_sink: bool,
        cx: &mut Context<'_>,
        count: &impl Fn(usize),
    ) -> Poll<Result<bool, ProxyError>> {
        loop {
            let Some(pipe) = &mut self.pipe else {
                let Poll::Ready(ready) = source.stream.poll_read_ready(cx) else {
                    return if watch_sink { sink.poll_aborted(cx).map(Err) } else { Poll::Pending };
                };
                ready.map_err(source.into_error)?;
                self.pipe = take_pipe(source);
                if self.pipe.is_none() {
                    return Poll::Ready(Ok(false));
                }
                continue;
            };
            if pipe.filled > 0 {
                if poll_empty(pipe, sink, cx, count)?.is_pending() {
                    return source.poll_aborted(cx).map(Err);
                }
                if self.small_moves == MAX_SMALL_MOVES {
                    self.release(source);
                    return Poll::Ready(Ok(false));
                }
            }
            // Polling readiness for every piece consumes tokio's task budget, so that the task
            // yields.
            let ready = source.stream.poll_read_ready(cx);
            let mut fill = || source.stream.try_io(Interest::READABLE, || pipe.fill(source.stream));
            match ready.map(|ready| ready.and_then(|()| fill())) {
                Poll::Ready(Ok(0)) => {
                    self.release(source);
                    return Poll::Ready(Ok(true));
                }
                Poll::Ready(Ok(bytes)) => {
                    self.small_moves = if bytes < SMALL_MOVE { self.small_moves + 1 } else { 0 };
                }
                Poll::Ready(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Poll::Ready(Err((source.into_error)(error)));
                }
                Poll::Ready(Err(_)) | Poll::Pending => self.release(source),
            }
        }
    }

    fn release(&mut self, source: &mut Tcp<'_>) {
        self.pipe = None;
        source.restart_detection();
    }
}

/// Frees the read buffer and takes a pipe, if the limits allow one.
fn take_pipe(source: &mut Tcp<'_>) -> Option<Pipe> {
    source.restart_detection();
    if !source.share.resize(PIPE) {
        return None;
    }
    let pipe = Pipe::take(source.share.buffers());
    if pipe.is_none() {
        source.restart_detection();
        buffer_refused("pipe");
    }
    pipe
}

/// Writes all bytes in the pipe.
fn poll_empty(
    pipe: &mut Pipe,
    sink: &Tcp<'_>,
    cx: &mut Context<'_>,
    count: &impl Fn(usize),
) -> Poll<Result<(), ProxyError>> {
    while pipe.filled > 0 {
        ready!(sink.stream.poll_write_ready(cx)).map_err(sink.into_error)?;
        match sink.stream.try_io(Interest::WRITABLE, || pipe.drain(sink.stream)) {
            Ok(0) => return Poll::Ready(Err((sink.into_error)(io::ErrorKind::WriteZero.into()))),
            Ok(bytes) => count(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err((sink.into_error)(error))),
        }
    }
    Poll::Ready(Ok(()))
}

/// A pipe in use. On drop an empty pipe is kept for reuse, another one is closed.
struct Pipe {
    pooled: Arc<PooledPipe>,
    filled: usize,
}

struct PooledPipe {
    pipe: SplicePipe,
    _permit: FdPermit,
}

impl Pipe {
    /// A spare pipe or a new one; `None` at the limit of descriptors or of memory for pipes.
    fn take(buffers: &Buffers) -> Option<Self> {
        let spare = POOL.with_borrow_mut(|pool| pool.spare.pop());
        let pooled = match spare {
            Some(pooled) => pooled,
            None => {
                let permit = buffers.pipe_ends()?;
                Arc::new(PooledPipe { pipe: SplicePipe::open(PIPE).ok()?, _permit: permit })
            }
        };
        Some(Self { pooled, filled: 0 })
    }

    /// Moves up to [`PIPE`] bytes from `source` into the pipe.
    fn fill(&mut self, source: &impl AsFd) -> io::Result<usize> {
        let bytes = self.pooled.pipe.fill(source, PIPE)?;
        self.filled += bytes;
        Ok(bytes)
    }

    fn drain(&mut self, sink: &impl AsFd) -> io::Result<usize> {
        let bytes = self.pooled.pipe.drain(sink, self.filled)?;
        self.filled = self.filled.saturating_sub(bytes);
        Ok(bytes)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if self.filled == 0 {
            // Fails only while the thread ends, which closes the pipe.
            let _ending = POOL.try_with(|pool| pool.borrow_mut().keep(self.pooled.clone()));
        }
    }
}

/// Empty pipes, at most one for each splicing direction. They are closed with the last such
/// direction.
struct PipePool {
    spare: Vec<Arc<PooledPipe>>,
    members: usize,
}

impl PipePool {
    fn keep(&mut self, pipe: Arc<PooledPipe>) {
        if self.spare.len() < self.members.min(MAX_SPARE) {
            self.spare.push(pipe);
        }
    }
}

/// Counts one splicing direction until it is dropped.
struct SplicingDirection;

impl SplicingDirection {
    fn new() -> Self {
        POOL.with_borrow_mut(|pool| pool.members += 1);
        Self
    }
}

impl Drop for SplicingDirection {
    fn drop(&mut self) {
        let _ending = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            pool.members = pool.members.saturating_sub(1);
            let members = pool.members;
            pool.spare.truncate(members);
        });
    }
}

/// The number of directions that this worker splices.
#[cfg(test)]
pub(super) fn members() -> usize {
    POOL.with_borrow(|pool| pool.members)
}

/// The number of empty pipes that this worker keeps.
#[cfg(test)]
pub(super) fn spare() -> usize {
    POOL.with_borrow(|pool| pool.spare.len())
}
