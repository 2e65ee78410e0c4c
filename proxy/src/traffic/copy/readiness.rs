//! Uses of socket readiness that depend on tokio's internals. Each dependency has a test in
//! `tests/readiness.rs`.
//!
//! tokio stores the readiness that epoll last reported for a socket, and makes a system call only
//! if the operation may succeed. An operation that would block clears the bit for data, but never
//! the bits for a closed direction or an error.
//!
//! All of this requires a single-threaded runtime. Otherwise an event could arrive between a read
//! and [`mark_drained`], and would be cleared with the readiness of the read.

use std::io;

use bytes::BytesMut;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Records that a read took all data of `stream`, as tokio does after short reads. The next read
/// then waits for an event without a system call, which saves a seventh of the system calls of a
/// small request.
pub(super) fn mark_drained(stream: &TcpStream) {
    let would_block = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
    let _would_block = stream.try_io(Interest::READABLE, would_block);
}

/// After [`mark_drained`], reads an end that epoll has already reported: FIN or an error. Makes no
/// system call without such a report. Appends data that has arrived since to `buffer`.
pub(super) fn read_pending_end(
    stream: &TcpStream,
    buffer: &mut BytesMut,
) -> Option<io::Result<()>> {
    match stream.try_read_buf(buffer) {
        Ok(0) => Some(Ok(())),
        Ok(_) => None,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        // The kernel reports an error only once.
        Err(error) => Some(Err(error)),
    }
}

/// Waits until `stream` is reset or has timed out, without reading or writing it. Neither FIN nor
/// unread data affects the wait. Cancel-safe.
///
/// Takes the socket's error, so that a later read would return data and then a clean end. Do not
/// read afterwards.
pub(crate) async fn aborted(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => {
            let error = stream.take_error().ok().flatten();
            error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
        }
        Err(error) => error,
    }
}
