//! A pipe that moves bytes from one TCP connection to another inside the kernel (splice(2)).
//!
//! The caller chooses between copying and splicing, and waits for the connections.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// A pipe, which may contain bytes. No operation waits.
#[derive(Debug)]
pub struct SplicePipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl SplicePipe {
    /// Opens a pipe for `capacity` bytes.
    ///
    /// # Errors
    ///
    /// The error of the kernel: at the limit of descriptors, or above `fs.pipe-user-pages-soft`,
    /// where a pipe would be too small to be worth its system calls.
    pub fn open(capacity: usize) -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&write, capacity)?;
        Ok(Self { read, write })
    }

    /// Moves at most `max_bytes` from `source` into the pipe. Returns the number of bytes, which is
    /// 0 after FIN.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation. `WouldBlock` if `source` has no bytes or the pipe is
    /// full.
    pub fn fill(&self, source: &impl AsFd, max_bytes: usize) -> io::Result<usize> {
        Ok(splice(source, None, &self.write, None, max_bytes, flags())?)
    }

    /// Moves at most `max_bytes` from the pipe to `sink`. Returns the number of bytes.
    ///
    /// # Errors
    ///
    /// The kernel rejected the operation. `WouldBlock` if the pipe is empty or `sink` accepts no
    /// bytes.
    pub fn drain(&self, sink: &impl AsFd, max_bytes: usize) -> io::Result<usize> {
        Ok(splice(&self.read, None, sink, None, max_bytes, flags())?)
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _, Write as _};
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn moves_bytes_between_connections_and_reports_their_end() {
        let ((mut client, accepted), (upstream, mut server)) = (pair(), pair());
        let pipe = SplicePipe::open(4096).unwrap();
        accepted.set_nonblocking(true).unwrap();
        let nothing = pipe.fill(&accepted, 4096).unwrap_err();
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(pipe.fill(&accepted, 4096).unwrap(), 5);
        assert_eq!(pipe.drain(&upstream, 3).unwrap(), 3);
        assert_eq!(pipe.drain(&upstream, 2).unwrap(), 2);
        assert_eq!(pipe.fill(&accepted, 4096).unwrap(), 0);
        let mut bytes = [0; 5];
        server.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
    }
}
