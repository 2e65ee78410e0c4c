//! Uses of a socket's readiness that depend on how tokio keeps it; `tests/readiness.rs`
//! names each dependency.
//!
//! tokio keeps the readiness that epoll last reported for a socket, and asks the kernel only while
//! that says that the operation may succeed. An operation that would block clears the bit for data,
//! but never the bits for a closed direction or an error.
//!
//! All of this requires a runtime of one thread. Otherwise an event could arrive between a read and
//! [`mark_drained`], and would be cleared with the readiness of the read.

use std::io;

use bytes::BytesMut;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Records that a read took all data of `stream`, as tokio does after its own short reads: the next
/// read waits for an event instead of asking the kernel, which saves a seventh of the system calls
/// of a small request.
pub(super) fn mark_drained(stream: &TcpStream) {
    let would_block = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
    let _would_block = stream.try_io(Interest::READABLE, would_block);
}

/// After [`mark_drained`]: reads an end that epoll has reported already, FIN or an error. Without
/// such a report this makes no system call. Data that arrived since is appended to `buffer`.
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

/// Waits until `stream` is reset or has timed out, without reading or writing it. A FIN does not
/// end the wait, nor does unread data delay it. Cancel-safe.
///
/// Takes the socket's error, so that a later read returns data and then a clean end: do not read
/// after this.
pub(crate) async fn aborted(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => {
            let error = stream.take_error().ok().flatten();
            error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
        }
        Err(error) => error,
    }
}
