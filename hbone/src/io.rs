//! The connection under TLS, its type erased: so TLS and HTTP/2 are compiled once, in this crate, whatever a tunnel runs over.
//!
//! Not here: buffering. What is called through the pointer are a system call's worth of reads and vectored writes.

use std::fmt;

use tokio::io::{AsyncRead, AsyncWrite};

/// Any byte stream that a task can own.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Unpin + Send + Sync {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Transport for T {}

/// What TLS runs over.
pub(crate) type Io = Box<dyn Transport>;

impl fmt::Debug for dyn Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transport")
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_batch_of_records_is_still_written_at_once() {
        let (near, mut far) = duplex(64);
        let mut near: Io = Box::new(near);
        assert!(near.is_write_vectored());
        let batch = [IoSlice::new(b"several "), IoSlice::new(b"records")];
        assert_eq!(near.write_vectored(&batch).await.unwrap(), 15);
        let mut read = [0; 15];
        far.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"several records");
    }
}
