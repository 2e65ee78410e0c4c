//! Moving bulk from one connection to another without having it: splice(2) through a pipe.
//!
//! Not here: when a connection is bulk (`tcp.rs`), and how a direction ends (`copy.rs`).

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::task::coop::consume_budget;

use super::buffers::Buffers;
use super::tcp::{TcpSink, TcpSource};
use super::{Sink as _, once};
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

/// What has become of a spliced direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spliced {
    /// It ended with FIN, and all is written.
    Ended,
    /// It goes on, but not in bulk, or not by pipes.
    Quiet,
}

/// Moves bytes by pipes as long as they are many. A pipe is held only while there is something to move, and is always empty when
/// it is filled: so EAGAIN tells which of the two connections has to be waited for, and what left the pipe is what was moved.
pub(super) async fn relay(
    from: &mut TcpSource<'_>,
    to: &mut TcpSink<'_>,
    half_closed: &AtomicBool,
    moved: &impl Fn(usize),
) -> Result<Spliced, ProxyError> {
    let _member = Member::new();
    let mut few = 0;
    loop {
        from.begin_anew();
        if !from.share.resize(PIPE) {
            return Ok(Spliced::Quiet);
        }
        let Some(mut pipe) = Pipe::take(from.share.buffers()) else {
            from.begin_anew();
            buffer_refused("pipe");
            return Ok(Spliced::Quiet);
        };
        loop {
            match from.stream.try_io(Interest::READABLE, || pipe.fill(from.stream)) {
                Ok(0) => return Ok(Spliced::Ended),
                Ok(bytes) => few = if bytes < FEW_BYTES { few + 1 } else { 0 },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err((from.broke)(error)),
            }
            empty(&mut pipe, to, moved).await?;
            if few == FEW_MOVES {
                drop(pipe);
                from.begin_anew();
                return Ok(Spliced::Quiet);
            }
            consume_budget().await;
        }
        drop(pipe);
        from.begin_anew();
        tokio::select! {
            biased;
            ready = from.stream.readable() => ready.map_err(from.broke)?,
            error = async { once(half_closed).await; to.aborted().await } => return Err(error),
        }
    }
}

/// Moves all that is in the pipe.
async fn empty(
    pipe: &mut Pipe,
    to: &TcpSink<'_>,
    moved: &impl Fn(usize),
) -> Result<(), ProxyError> {
    while pipe.filled > 0 {
        match to.stream.try_io(Interest::WRITABLE, || pipe.drain(to.stream)) {
            Ok(0) => return Err((to.broke)(io::ErrorKind::WriteZero.into())),
            Ok(bytes) => moved(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                to.stream.writable().await.map_err(to.broke)?;
            }
            Err(error) => return Err((to.broke)(error)),
        }
    }
    Ok(())
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
