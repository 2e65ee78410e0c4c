//! A TCP connection as a side of a connection, and how it breaks.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::Interest;
use tokio::net::TcpStream;
use underpass_interception::{end_on_close, end_writing, write_before_end};

use super::Side;
use super::buffers::{Buffers, Share};
use crate::error::ProxyError;

/// What a connection's first read may take: most requests fit, and thousands of quiet connections stay cheap.
const FIRST_READ: usize = 4 * 1024;
/// What a busy connection's read may take: large enough to make system calls rare, small enough to stay in L2. Half of it
/// cost a fifth more CPU in bulk, twice of it gained nothing that could be told from noise.
const LARGEST_READ: usize = 128 * 1024;
/// What a connection moves before it counts as bulk, if its reads are of the largest by then.
const BULK: usize = 1 << 20;
/// How many full reads a connection waits that was refused a larger buffer, before it asks again.
const PATIENCE: u32 = 256;

/// What an error of a connection is: the client's or the upstream's.
pub(super) type Broke = fn(io::Error) -> ProxyError;

/// Waits until `stream` is reset or given up, though it is neither read nor written. Cancel-safe.
///
/// What it received before can be lost: to be asked when nothing more is to be read, or to be done with it.
pub(crate) async fn broken(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        // The kernel tells it once, and whoever asks first gets it.
        Ok(_) => {
            let error = stream.take_error().ok().flatten();
            error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
        }
        Err(error) => error,
    }
}

/// Notes that a read took all that `stream` had, as tokio does for its own short reads: the next one waits for more instead of
/// asking the kernel in vain, which is a seventh of a small request's system calls.
fn exhausted(stream: &TcpStream) {
    let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
    let _forgotten = stream.try_io(Interest::READABLE, nothing);
}

/// A connection, read into a buffer that grows while the connection is busy and is not held while it is idle.
pub(super) struct Tcp<'a> {
    pub(super) stream: &'a TcpStream,
    pub(super) broke: Broke,
    buffer: BytesMut,
    size: usize,
    /// What the buffer has beyond a first read.
    pub(super) share: Share<'a>,
    /// How many full reads are to pass before a larger buffer is asked for.
    patience: u32,
    /// How much was read since it began or was found not to be bulk.
    read: usize,
    full: bool,
    /// What follows the bytes that were read last, once that is known: an end, or that it broke.
    behind: Option<io::Result<()>>,
    /// What waits until it is broken, once somebody wants to know. Boxed: most connections never are half-closed for long.
    breaking: Option<Breaking<'a>>,
}

type Breaking<'a> = Pin<Box<dyn Future<Output = io::Error> + Send + 'a>>;

impl<'a> Tcp<'a> {
    pub(super) fn new(stream: &'a TcpStream, broke: Broke, buffers: &'a Buffers) -> Self {
        Self {
            stream,
            broke,
            buffer: BytesMut::new(),
            size: FIRST_READ,
            share: Share::none_of(buffers),
            patience: 0,
            read: 0,
            full: false,
            behind: None,
            breaking: None,
        }
    }

    /// Whether there is so much, and so much at a time, that splicing pays.
    pub(super) fn is_bulk(&self) -> bool {
        self.read >= BULK && self.full && self.size == LARGEST_READ
    }

    /// Begins anew to find out whether it is bulk, and lets the buffer go.
    pub(super) fn begin_anew(&mut self) {
        self.read = 0;
        self.release();
    }

    /// Makes room for a read. What was read before is written by now, as a rule, and its memory is used again.
    fn make_room(&mut self) -> usize {
        if self.buffer.capacity() < self.size / 2 {
            if !self.share.resize(self.size - FIRST_READ) {
                self.release();
                self.size = FIRST_READ;
                self.patience = PATIENCE;
            }
            self.buffer.reserve(self.size);
        }
        self.buffer.capacity()
    }

    /// Doubles after a read that filled its room, halves after one that used less than a quarter of it.
    fn adapt(&mut self, read: usize, room: usize) {
        self.read = self.read.saturating_add(read);
        self.full = read >= room;
        if self.full {
            self.patience = self.patience.saturating_sub(1);
            if self.patience == 0 {
                self.size = (self.size * 2).min(LARGEST_READ);
            }
        } else if read < self.size / 4 {
            self.size = (self.size / 2).max(FIRST_READ);
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if let Some(behind) = self.behind.take() {
            return Poll::Ready(behind.map(|()| None));
        }
        loop {
            let Poll::Ready(ready) = self.stream.poll_read_ready(cx) else {
                // An idle connection holds no buffer.
                self.release();
                return Poll::Pending;
            };
            ready?;
            let room = self.make_room();
            match self.stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Poll::Ready(Ok(None)),
                Ok(read) => {
                    if read < room {
                        exhausted(self.stream);
                        self.look_behind();
                    }
                    self.adapt(self.buffer.len(), room);
                    return Poll::Ready(Ok(Some(self.buffer.split().freeze())));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// After a read that left room: notes an end that has come already, and takes what else has. The kernel is asked only if it
    /// has told of either.
    fn look_behind(&mut self) {
        match self.stream.try_read_buf(&mut self.buffer) {
            Ok(0) => self.behind = Some(Ok(())),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The kernel tells it once.
            Err(error) => self.behind = Some(Err(error)),
        }
    }

    fn poll_drain(
        &self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<io::Result<usize>> {
        let before_end =
            || self.stream.try_io(Interest::WRITABLE, || write_before_end(self.stream, data));
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match if last { before_end() } else { self.stream.try_write(data) } {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    data.advance(written);
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Lets the buffer go.
    fn release(&mut self) {
        self.buffer = BytesMut::new();
        self.share.resize(0);
    }
}

impl Side for Tcp<'_> {
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>> {
        self.poll_fill(cx).map_err(self.broke)
    }

    fn is_at_end(&self) -> bool {
        matches!(self.behind, Some(Ok(())))
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, ProxyError>> {
        self.poll_drain(cx, data, last).map_err(self.broke)
    }

    fn finish(&mut self) -> Result<(), ProxyError> {
        end_writing(self.stream).map_err(self.broke)
    }

    fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        let stream = self.stream;
        let breaking = self.breaking.get_or_insert_with(|| Box::pin(broken(stream)));
        let error = ready!(breaking.as_mut().poll(cx));
        self.breaking = None;
        Poll::Ready((self.broke)(error))
    }

    fn poll_cut(&mut self, _: &mut Context<'_>) -> Poll<ProxyError> {
        Poll::Pending
    }

    fn close(&mut self, well: bool) {
        if well {
            end_on_close(self.stream);
        }
    }

    fn socket(&self) -> Option<&TcpStream> {
        Some(self.stream)
    }
}
