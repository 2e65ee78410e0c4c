//! Moving bulk from one connection to another without having it: splice(2) through a pipe.
//!
//! Not here: when a connection is bulk (`tcp.rs`), and how a direction ends (`copy.rs`).

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;

use super::Side as _;
use super::buffers::Buffers;
use super::tcp::Tcp;
use crate::descriptors::Held;
use crate::error::ProxyError;
use crate::metrics::buffer_refused;

/// What a pipe may take at once. A quarter of it cost an eighth more CPU in bulk; four times of it gained less than a tenth, and an
/// unprivileged user may have 64 MiB in pipes (`fs.pipe-user-pages-soft`).
const PIPE: usize = 256 * 1024;
/// Moves below this, so many in a row, are better made by copying: the connection is bulk no longer.
const FEW_BYTES: usize = 16 * 1024;
const FEW_MOVES: u32 = 8;
/// How many empty pipes a worker keeps at most.
const SPARE: usize = 64;

thread_local! {
    /// The empty pipes of this worker. Its connections never leave its thread.
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { spare: Vec::new(), members: 0 }) };
}

/// A direction that is bulk. It moves bytes by pipes as long as they are many. A pipe is held only while there is something to move,
/// and is always empty when it is filled: so EAGAIN tells which of the two connections has to be waited for, and what left the
/// pipe is what was moved.
pub(super) struct Splice {
    pipe: Option<Pipe>,
    /// How many moves in a row were of few bytes.
    few: u32,
    _member: Member,
}

impl Splice {
    pub(super) fn new() -> Self {
        Self { pipe: None, few: 0, _member: Member::new() }
    }

    /// Ready when it has ended with FIN and all is written (true), or when it goes on, but not in bulk, or not by pipes (false).
    pub(super) fn poll(
        &mut self,
        from: &mut Tcp<'_>,
        to: &mut Tcp<'_>,
        watches: bool,
        cx: &mut Context<'_>,
        moved: &impl Fn(usize),
    ) -> Poll<Result<bool, ProxyError>> {
        loop {
            let Some(pipe) = &mut self.pipe else {
                let Poll::Ready(ready) = from.stream.poll_read_ready(cx) else {
                    return if watches { to.poll_aborted(cx).map(Err) } else { Poll::Pending };
                };
                ready.map_err(from.broke)?;
                self.pipe = take_pipe(from);
                if self.pipe.is_none() {
                    return Poll::Ready(Ok(false));
                }
                continue;
            };
            if pipe.filled > 0 {
                ready!(poll_empty(pipe, to, cx, moved))?;
                if self.few == FEW_MOVES {
                    self.give_back(from);
                    return Poll::Ready(Ok(false));
                }
            }
            // Asked anew for every piece, which gives others their turn: tokio lets no task find its connections ready for ever.
            let ready = from.stream.poll_read_ready(cx);
            let mut fill = || from.stream.try_io(Interest::READABLE, || pipe.fill(from.stream));
            match ready.map(|ready| ready.and_then(|()| fill())) {
                Poll::Ready(Ok(0)) => {
                    self.give_back(from);
                    return Poll::Ready(Ok(true));
                }
                Poll::Ready(Ok(bytes)) => {
                    self.few = if bytes < FEW_BYTES { self.few + 1 } else { 0 };
                }
                Poll::Ready(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Poll::Ready(Err((from.broke)(error)));
                }
                Poll::Ready(Err(_)) | Poll::Pending => self.give_back(from),
            }
        }
    }

    fn give_back(&mut self, from: &mut Tcp<'_>) {
        self.pipe = None;
        from.begin_anew();
    }
}

/// A pipe instead of the buffer, if there is memory for it.
fn take_pipe(from: &mut Tcp<'_>) -> Option<Pipe> {
    from.begin_anew();
    if !from.share.resize(PIPE) {
        return None;
    }
    let pipe = Pipe::take(from.share.buffers());
    if pipe.is_none() {
        from.begin_anew();
        buffer_refused("pipe");
    }
    pipe
}

/// Moves all that is in the pipe.
fn poll_empty(
    pipe: &mut Pipe,
    to: &Tcp<'_>,
    cx: &mut Context<'_>,
    moved: &impl Fn(usize),
) -> Poll<Result<(), ProxyError>> {
    while pipe.filled > 0 {
        ready!(to.stream.poll_write_ready(cx)).map_err(to.broke)?;
        match to.stream.try_io(Interest::WRITABLE, || pipe.drain(to.stream)) {
            Ok(0) => return Poll::Ready(Err((to.broke)(io::ErrorKind::WriteZero.into()))),
            Ok(bytes) => moved(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err((to.broke)(error))),
        }
    }
    Poll::Ready(Ok(()))
}

/// A pipe in use. Dropped empty, it is kept for others; with something in it, it is closed.
struct Pipe {
    ends: Arc<Ends>,
    filled: usize,
}

struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    _held: Held,
}

impl Pipe {
    /// A spare one, or a new one if there can be one.
    fn take(buffers: &Buffers) -> Option<Self> {
        let spare = POOL.with_borrow_mut(|pool| pool.spare.pop());
        let ends = match spare {
            Some(ends) => ends,
            None => Arc::new(Ends::new(buffers.pipe_ends()?).ok()?),
        };
        Some(Self { ends, filled: 0 })
    }

    /// Takes what there is from `source`, up to [`PIPE`].
    fn fill(&mut self, source: &impl AsFd) -> io::Result<usize> {
        let bytes = splice(source, None, &self.ends.write, None, PIPE, flags())?;
        self.filled += bytes;
        Ok(bytes)
    }

    fn drain(&mut self, sink: &impl AsFd) -> io::Result<usize> {
        let bytes = splice(&self.ends.read, None, sink, None, self.filled, flags())?;
        self.filled = self.filled.saturating_sub(bytes);
        Ok(bytes)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if self.filled == 0 {
            // Fails when the thread is ending, and the pipe with it.
            let _ending = POOL.try_with(|pool| pool.borrow_mut().keep(self.ends.clone()));
        }
    }
}

impl Ends {
    fn new(held: Held) -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Refused beyond a user's share of memory for pipes (fs.pipe-user-pages-soft), where a pipe is not worth its calls.
        fcntl_setpipe_size(&write, PIPE)?;
        Ok(Self { read, write, _held: held })
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

/// Empty pipes, no more than there are directions that use some: when the last one is through, none is left open.
struct Pool {
    spare: Vec<Arc<Ends>>,
    members: usize,
}

impl Pool {
    fn keep(&mut self, ends: Arc<Ends>) {
        if self.spare.len() < self.members.min(SPARE) {
            self.spare.push(ends);
        }
    }
}

/// A direction that uses pipes.
struct Member;

impl Member {
    fn new() -> Self {
        POOL.with_borrow_mut(|pool| pool.members += 1);
        Self
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ending = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            pool.members = pool.members.saturating_sub(1);
            let members = pool.members;
            pool.spare.truncate(members);
        });
    }
}

/// How many directions are spliced by this worker.
#[cfg(test)]
pub(super) fn members() -> usize {
    POOL.with_borrow(|pool| pool.members)
}

/// How many pipes it keeps.
#[cfg(test)]
pub(super) fn spare() -> usize {
    POOL.with_borrow(|pool| pool.spare.len())
}
