//! Erases the type of the connection under TLS, so that TLS and HTTP/2 are compiled once for all
//! transports.
//!
//! `tls::record` reads and writes the records.

use std::fmt;

use tokio::io::{AsyncRead, AsyncWrite};

/// Any byte stream that a task can own.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + Sync {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Transport for T {}

/// The connection under TLS.
pub(crate) type Io = Box<dyn Transport>;

/// Erases the type of a transport.
pub(crate) fn transport(io: impl Transport + 'static) -> Io {
    Box::new(io)
}

impl fmt::Debug for dyn Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transport")
    }
}
