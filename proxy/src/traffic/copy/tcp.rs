//! A TCP connection as one side of a relay.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::Interest;
use tokio::net::TcpStream;
use underpass_interception::{end_on_close, end_writing, write_before_end};

use super::readiness::{aborted, mark_drained, read_pending_end};
use super::{Side, Sink, Source};
use crate::error::ProxyError;
use crate::limits::{BufferShare, Buffers};

/// The size of a connection's first read in bytes: most requests fit, and idle connections stay
/// small.
const FIRST_READ: usize = 4 * 1024;
/// The size of a busy connection's reads in bytes: large enough to make system calls rare, small
/// enough to stay in the L2 cache. Half of it cost a fifth more CPU for bulk; twice of it gained
/// nothing measurable.
const LARGEST_READ: usize = 128 * 1024;
/// The number of bytes after which a connection counts as bulk, if its reads have the largest size.
const BULK: usize = 1 << 20;
/// The number of full reads after which a connection that was refused a larger buffer requests one
/// again.
const GROW_AFTER_FULL_READS: u32 = 256;

/// Wraps an I/O error as an error of the client or of the upstream.
pub(super) type IntoError = fn(io::Error) -> ProxyError;

/// A connection, read into a buffer that grows while the connection is busy and is freed while it
/// is idle.
pub(super) struct Tcp<'a> {
    pub(super) stream: &'a TcpStream,
    pub(super) into_error: IntoError,
    buffer: BytesMut,
    /// The size of the next buffer.
    size: usize,
    /// The buffer's memory beyond a first read.
    pub(super) share: BufferShare<'a>,
    /// The number of full reads before the next request for a larger buffer.
    full_reads_left: u32,
    /// The number of bytes read since the start of the connection or the last restart of detection.
    read: usize,
    /// Whether the last read filled its buffer.
    is_full: bool,
    /// The known end that follows the bytes of the last read: FIN or an error.
    pending_end: Option<io::Result<()>>,
    /// Present while this side is watched for an abort. Boxed, because few connections are watched.
    abort_watch: Option<AbortWatch<'a>>,
}

type AbortWatch<'a> = Pin<Box<dyn Future<Output = io::Error> + Send + 'a>>;

impl<'a> Tcp<'a> {
    pub(super) fn new(stream: &'a TcpStream, into_error: IntoError, buffers: &'a Buffers) -> Self {
        Self {
            stream,
            into_error,
            buffer: BytesMut::new(),
            size: FIRST_READ,
            share: BufferShare::none_of(buffers),
            full_reads_left: 0,
            read: 0,
            is_full: false,
            pending_end: None,
            abort_watch: None,
        }
    }

    /// Whether the connection sends so much, in reads so large, that splicing pays.
    pub(super) fn is_bulk(&self) -> bool {
        self.read >= BULK && self.is_full && self.size == LARGEST_READ
    }

    /// Restarts the detection of bulk, and frees the buffer.
    pub(super) fn restart_detection(&mut self) {
        self.read = 0;
        self.release();
    }

    /// Reserves room for a read, and returns its size. Normally the bytes of the last read are
    /// already written, and their memory is reused.
    fn make_room(&mut self) -> usize {
        if self.buffer.capacity() < self.size / 2 {
            if !self.share.resize(self.size - FIRST_READ) {
                self.release();
                self.size = FIRST_READ;
                self.full_reads_left = GROW_AFTER_FULL_READS;
            }
            self.buffer.reserve(self.size);
        }
        self.buffer.capacity()
    }

    /// Doubles the buffer size after a full read, and halves it after a read of less than a
    /// quarter.
    fn adapt(&mut self, read: usize, room: usize) {
        self.read = self.read.saturating_add(read);
        self.is_full = read >= room;
        if self.is_full {
            self.full_reads_left = self.full_reads_left.saturating_sub(1);
            if self.full_reads_left == 0 {
                self.size = (self.size * 2).min(LARGEST_READ);
            }
        } else if read < self.size / 4 {
            self.size = (self.size / 2).max(FIRST_READ);
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if let Some(end) = self.pending_end.take() {
            return Poll::Ready(end.map(|()| None));
        }
        loop {
            let Poll::Ready(ready) = self.stream.poll_read_ready(cx) else {
                self.release();
                return Poll::Pending;
            };
            ready?;
            let room = self.make_room();
            match self.stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Poll::Ready(Ok(None)),
                Ok(read) => {
                    if read < room {
                        mark_drained(self.stream);
                        self.pending_end = read_pending_end(self.stream, &mut self.buffer);
                    }
                    self.adapt(self.buffer.len(), room);
                    return Poll::Ready(Ok(Some(self.buffer.split().freeze())));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
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

    /// Frees the memory that an idle connection does not need. Inlined, because it runs whenever a
    /// read waits.
    #[inline]
    fn release(&mut self) {
        self.buffer = BytesMut::new();
        self.share.resize(0);
        self.abort_watch = None;
    }
}

impl<'a> Side<'a> for Tcp<'a> {
    fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<ProxyError> {
        if let Some(Err(error)) = self.pending_end.take_if(|end| end.is_err()) {
            return Poll::Ready((self.into_error)(error));
        }
        let stream = self.stream;
        let watch = self.abort_watch.get_or_insert_with(|| Box::pin(aborted(stream)));
        let error = ready!(watch.as_mut().poll(cx));
        self.abort_watch = None;
        Poll::Ready((self.into_error)(error))
    }

    fn close(&mut self, outcome: &Result<(), ProxyError>) {
        if outcome.is_ok() {
            end_on_close(self.stream);
        }
    }

    fn as_tcp(&mut self) -> Option<&mut Self> {
        Some(self)
    }
}

impl<'a> Source<'a> for Tcp<'a> {
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ProxyError>> {
        self.poll_fill(cx).map_err(self.into_error)
    }

    fn is_at_end(&self) -> bool {
        matches!(self.pending_end, Some(Ok(())))
    }
}

impl<'a> Sink<'a> for Tcp<'a> {
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        last: bool,
    ) -> Poll<Result<usize, ProxyError>> {
        self.poll_drain(cx, data, last).map_err(self.into_error)
    }

    fn finish(&mut self, closing: bool) -> Result<(), ProxyError> {
        // close(2) sends the FIN: all received data has been read, so it does not reset.
        if closing { Ok(()) } else { end_writing(self.stream).map_err(self.into_error) }
    }
}
