//! The connection under TLS: read in large pieces, and its type erased, so that TLS and HTTP/2 are compiled once, in this crate,
//! whatever a tunnel runs over.
//!
//! Not here: gathering what is written, which rustls does.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::{fmt, io};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// A read of a quiet tunnel: some small requests.
const SMALLEST_READ: usize = 4 * 1024;
/// A read of a busy one: what a peer's write of 128 KiB is as TLS records.
const LARGEST_READ: usize = 136 * 1024;

/// Any byte stream that a task can own.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + Sync {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Transport for T {}

/// What TLS runs over.
pub(crate) type Io = Box<dyn Transport>;

/// What TLS shall run over.
pub(crate) fn transport(io: impl Transport + 'static) -> Io {
    Box::new(ReadAhead::new(io))
}

/// Reads as much as there is, for rustls asks for one record at a time: that would be a system call for each 16 KiB. In bulk this
/// and writing as much at once (`tls.rs`) save about a fifth of a proxy's CPU.
///
/// The size follows what comes, and a tunnel that waits for its peer holds no more than a small buffer.
struct ReadAhead<T> {
    io: T,
    buffer: Vec<u8>,
    /// How much of `buffer` was taken.
    taken: usize,
    size: usize,
}

impl<T: AsyncRead + Unpin> ReadAhead<T> {
    fn new(io: T) -> Self {
        Self { io, buffer: Vec::new(), taken: 0, size: SMALLEST_READ }
    }

    fn unread(&self) -> &[u8] {
        self.buffer.get(self.taken..).unwrap_or_default()
    }

    /// Reads into the empty buffer; nothing at the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        (self.taken, self.size) = (0, self.next_size());
        self.buffer.clear();
        self.buffer.reserve(self.size);
        let read = poll_read_buf(Pin::new(&mut self.io), cx, &mut self.buffer);
        if read.is_pending() && self.buffer.capacity() > SMALLEST_READ {
            self.buffer = Vec::new();
        }
        read.map_ok(|_| ())
    }

    /// Doubles after a read that filled its room, halves after one that used less than a quarter of it.
    fn next_size(&self) -> usize {
        match self.buffer.len() {
            0 => self.size,
            full if full >= self.size => (self.size * 2).min(LARGEST_READ),
            few if few < self.size / 4 => (self.size / 2).max(SMALLEST_READ),
            _ => self.size,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ReadAhead<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread().is_empty() {
            ready!(self.poll_fill(cx))?;
        }
        let length = self.unread().len().min(buf.remaining());
        buf.put_slice(self.unread().get(..length).unwrap_or_default());
        self.taken += length;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ReadAhead<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl fmt::Debug for dyn Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transport")
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use futures_util::future::poll_immediate;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_batch_of_records_is_still_written_at_once() {
        let (near, mut far) = duplex(64);
        let mut near = transport(near);
        assert!(near.is_write_vectored());
        let batch = [IoSlice::new(b"several "), IoSlice::new(b"records")];
        assert_eq!(near.write_vectored(&batch).await.unwrap(), 15);
        let mut read = [0; 15];
        far.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"several records");
    }

    #[tokio::test]
    async fn reads_grow_with_what_comes_and_little_is_held_for_a_tunnel_that_waits() {
        let (near, mut far) = duplex(4 * LARGEST_READ);
        let mut near = ReadAhead::new(near);
        let sent: Vec<u8> = (0..=u8::MAX).cycle().take(3 * LARGEST_READ).collect();
        far.write_all(&sent).await.unwrap();
        let (mut read, mut record) = (Vec::new(), [0; 1000]);
        let mut sizes = Vec::new();
        while read.len() < sent.len() {
            let length = near.read(&mut record).await.unwrap();
            read.extend_from_slice(&record[..length]);
            sizes.push(near.buffer.len());
        }
        assert!(read == sent, "what was read is what was sent");
        sizes.dedup();
        let expected = [1, 2, 4, 8].map(|times| times * SMALLEST_READ);
        assert_eq!(sizes[..4], expected);
        let waiting = poll_immediate(near.read(&mut record)).await;
        assert!(waiting.is_none() && near.buffer.capacity() <= SMALLEST_READ);
        drop(far);
        assert_eq!(near.read(&mut record).await.unwrap(), 0, "the end is an end");
    }
}
