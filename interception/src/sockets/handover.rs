//! Passes lines of text and sockets to another process over a Unix socket (`SCM_RIGHTS`, unix(7)).
//!
//! Once a listener is passed, both processes accept from the same queue. No connection is refused,
//! whichever process ends. The proxy defines the protocol of the lines.

use std::io::{self, ErrorKind};
use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::sockets::descriptors::{self, MAX_DESCRIPTORS};
use crate::sockets::peer::Peer;

/// The maximum length of a line in bytes, unless [`Handover::with_longest_line`] sets another.
const MAX_LINE: usize = 4096;

/// One end of a handover between two processes.
#[derive(Debug)]
pub struct Handover {
    stream: UnixStream,
    longest_line: usize,
}

impl Handover {
    /// Wraps a connected stream.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, longest_line: MAX_LINE }
    }

    /// Sends and receives lines of up to this number of bytes.
    #[must_use]
    pub fn with_longest_line(self, longest_line: usize) -> Self {
        Self { longest_line, ..self }
    }

    /// The process at the other end.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn peer(&self) -> io::Result<Peer> {
        Peer::of(&self.stream)
    }

    /// Sends `line`, which must not contain a line break, with `sockets` attached.
    ///
    /// # Errors
    ///
    /// The error of the kernel. `InvalidInput` if the line is too long or there are too many
    /// sockets.
    pub async fn send(&self, line: &str, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = format!("{line}\n");
        if text.len() > self.longest_line {
            return Err(ErrorKind::InvalidInput.into());
        }
        let (mut rest, mut sockets) = (text.as_bytes(), sockets);
        while !rest.is_empty() {
            let send = || descriptors::send(&self.stream, rest, sockets);
            let sent = self.stream.async_io(Interest::WRITABLE, send).await?;
            rest = rest.get(sent..).unwrap_or_default();
            // The first part carries the sockets.
            sockets = &[];
        }
        Ok(())
    }

    /// Receives the next line and its sockets. `None` after the other process closed the connection
    /// or ended.
    ///
    /// # Errors
    ///
    /// The error of the kernel. `InvalidData` for a malformed message.
    pub async fn receive(&self) -> io::Result<Option<(String, Vec<OwnedFd>)>> {
        let (mut line, mut sockets) = (Vec::new(), Vec::new());
        while !line.ends_with(b"\n") {
            let receive_part = || self.receive_part(&mut line, &mut sockets);
            if self.stream.async_io(Interest::READABLE, receive_part).await? == 0 {
                return if line.is_empty() {
                    Ok(None)
                } else {
                    Err(ErrorKind::UnexpectedEof.into())
                };
            }
            if line.len() > self.longest_line || sockets.len() > MAX_DESCRIPTORS {
                return Err(ErrorKind::InvalidData.into());
            }
        }
        let text = String::from_utf8(line).map_err(|_| ErrorKind::InvalidData)?;
        Ok(Some((text.trim_end().to_owned(), sockets)))
    }

    fn receive_part(&self, line: &mut Vec<u8>, sockets: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut text = [0; 4096];
        let received = descriptors::receive(&self.stream, &mut text)?.complete()?;
        line.extend_from_slice(text.get(..received.bytes).unwrap_or_default());
        sockets.extend(received.descriptors);
        Ok(received.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::os::fd::AsFd as _;

    use nix::unistd::geteuid;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpStream;

    use super::*;
    use crate::sockets::listener::BoundListener;

    fn handover_pair() -> (Handover, Handover) {
        let (one, other) = UnixStream::pair().expect("a pair");
        (Handover::new(one), Handover::new(other))
    }

    fn bound() -> BoundListener {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port").into()
    }

    #[tokio::test]
    async fn passes_listener_with_its_accept_queue() {
        let (one, other) = handover_pair();
        let (first, second) = (bound(), bound());
        let address = first.local_addr().expect("bound");
        let mut waiting = TcpStream::connect(address).await.expect("connected before");
        one.send("two listeners", &[first.as_fd(), second.as_fd()]).await.expect("sent");
        drop((first, second));
        let (line, sockets) = other.receive().await.expect("received").expect("a line");
        assert_eq!((line.as_str(), sockets.len()), ("two listeners", 2));
        let listener = sockets.into_iter().next().expect("a socket");
        let listener = BoundListener::try_from(listener).expect("a listener");
        assert_eq!(listener.local_addr().expect("bound"), address);
        let (_accepted, client) =
            listener.register().expect("registered").accept().await.expect("accepted");
        assert_eq!(client, waiting.local_addr().expect("an address"));
        waiting.write_all(b"still there").await.expect("not reset");
    }

    #[tokio::test]
    async fn receives_lines_separately_and_detects_end() {
        let (one, other) = handover_pair();
        one.send("rules", &[]).await.expect("sent");
        assert_eq!(other.receive().await.expect("received").expect("a line").0, "rules");
        other.send("ok", &[]).await.expect("sent");
        assert_eq!(one.receive().await.expect("received").expect("a line").0, "ok");
        drop(one);
        assert!(other.receive().await.expect("an end").is_none());
    }

    #[tokio::test]
    async fn passes_line_longer_than_the_buffer_of_the_socket() {
        let (one, other) = handover_pair();
        let (one, other) = (one.with_longest_line(2 << 20), other.with_longest_line(2 << 20));
        let (long, file) = ("x".repeat(1 << 20), bound());
        let sent = async { one.send(&long, &[file.as_fd()]).await.expect("sent") };
        let ((), received) = tokio::join!(sent, other.receive());
        let (line, sockets) = received.expect("received").expect("a line");
        assert!(line == long && sockets.len() == 1, "{} bytes", line.len());
        let error = one.send(&"x".repeat(2 << 20), &[]).await.expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }

    #[tokio::test]
    async fn rejects_malformed_message_and_non_listener_fd() {
        let (one, other) = handover_pair();
        let mut raw = one.stream;
        raw.write_all(&[b'x'; 5000]).await.expect("written");
        assert_eq!(other.receive().await.expect_err("too long").kind(), ErrorKind::InvalidData);
        let (one, other) = handover_pair();
        let mut raw = one.stream;
        raw.write_all(b"\xff\n").await.expect("written");
        assert_eq!(other.receive().await.expect_err("no text").kind(), ErrorKind::InvalidData);
        let (unix, _) = UnixStream::pair().expect("a pair");
        let imposter = OwnedFd::from(unix.into_std().expect("its socket"));
        BoundListener::try_from(imposter).expect_err("the socket does not listen");
    }

    #[tokio::test]
    async fn kernel_identifies_peer_process() {
        let (one, _other) = handover_pair();
        let peer = one.peer().expect("credentials");
        assert_eq!(peer.uid, geteuid().as_raw());
        assert!(peer.is_trusted() && Peer { uid: 0, pid: None }.is_trusted());
        assert!(!Peer { uid: geteuid().as_raw() + 1, pid: None }.is_trusted());
        assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());
    }
}
