//! The connection under TLS, its type erased, so that TLS and HTTP/2 are compiled once, in this
//! crate, whatever a tunnel runs over.
//!
//! Not here: reading and writing many records at once, which the record layer does
//! (`tls/record.rs`).

use std::fmt;

use tokio::io::{AsyncRead, AsyncWrite};

/// Any byte stream that a task can own.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + Sync {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Transport for T {}

/// What TLS runs over.
pub(crate) type Io = Box<dyn Transport>;

/// What TLS shall run over.
pub(crate) fn transport(io: impl Transport + 'static) -> Io {
    Box::new(io)
}

impl fmt::Debug for dyn Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transport")
    }
}
