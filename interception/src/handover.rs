//! Handing sockets to another process: lines of text over a Unix socket, with sockets attached to
//! them (`SCM_RIGHTS`, unix(7)).
//!
//! With a listener, both processes accept from one queue, so that no connection is refused whichever
//! of them goes. Not here: what the lines say, and what the sockets are.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::unistd::geteuid;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// The longest line: far more than anything that is said.
const LONGEST_LINE: usize = 4096;
/// The most sockets that come with a line.
const MOST_SOCKETS: usize = 16;

/// One end of the conversation of two processes.
#[derive(Debug)]
pub struct Handover {
    stream: UnixStream,
}

impl Handover {
    /// A conversation over `stream`.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Who is at the other end, as the kernel knows it: for who connected, as it was when it did; for
    /// who listens, as it was when it began to (`SO_PEERCRED`, unix(7)).
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn peer(&self) -> io::Result<Peer> {
        let credentials = self.stream.peer_cred()?;
        Ok(Peer { uid: credentials.uid(), pid: credentials.pid() })
    }

    /// Says `line`, which has no line break in it, with `sockets` attached.
    ///
    /// # Errors
    ///
    /// The kernel's, and `InvalidInput` for more than one message can carry.
    pub async fn say(&self, line: &str, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = format!("{line}\n");
        if text.len() > LONGEST_LINE || sockets.len() > MOST_SOCKETS {
            return Err(ErrorKind::InvalidInput.into());
        }
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
            let mut attached = SendAncillaryBuffer::new(&mut space);
            if !sockets.is_empty() {
                attached.push(SendAncillaryMessage::ScmRights(sockets));
            }
            let text = [IoSlice::new(text.as_bytes())];
            Ok(sendmsg(&self.stream, &text, &mut attached, SendFlags::NOSIGNAL)?)
        };
        // A line is shorter than any socket's buffer, and the one before it has been answered.
        match self.stream.async_io(Interest::WRITABLE, send).await? {
            sent if sent == text.len() => Ok(()),
            _ => Err(ErrorKind::WriteZero.into()),
        }
    }

    /// The next line and what is attached to it; `None` if the other process has closed the
    /// conversation, or ended.
    ///
    /// # Errors
    ///
    /// The kernel's, and `InvalidData` for what is no line.
    pub async fn hear(&self) -> io::Result<Option<(String, Vec<OwnedFd>)>> {
        let (mut line, mut sockets) = (Vec::new(), Vec::new());
        while !line.ends_with(b"\n") {
            let receive = || self.receive(&mut line, &mut sockets);
            if self.stream.async_io(Interest::READABLE, receive).await? == 0 {
                return if line.is_empty() {
                    Ok(None)
                } else {
                    Err(ErrorKind::UnexpectedEof.into())
                };
            }
            if line.len() > LONGEST_LINE || sockets.len() > MOST_SOCKETS {
                return Err(ErrorKind::InvalidData.into());
            }
        }
        let text = String::from_utf8(line).map_err(|_| ErrorKind::InvalidData)?;
        Ok(Some((text.trim_end().to_owned(), sockets)))
    }

    fn receive(&self, line: &mut Vec<u8>, sockets: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut text = [0; 512];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
        let mut attached = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut text)],
            &mut attached,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        line.extend_from_slice(text.get(..received.bytes).unwrap_or_default());
        for message in attached.drain() {
            if let RecvAncillaryMessage::ScmRights(attached) = message {
                sockets.extend(attached);
            }
        }
        Ok(received.bytes)
    }
}

/// A process at the other end of a Unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its effective user.
    pub uid: u32,
    /// Its process id, where we can see it.
    pub pid: Option<i32>,
}

impl Peer {
    /// Whether it is root's or our own user's, who can do with us what they want anyway.
    #[must_use]
    pub fn is_trusted(self) -> bool {
        self.uid == 0 || self.uid == geteuid().as_raw()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::os::fd::AsFd as _;

    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpStream;

    use super::*;
    use crate::BoundListener;

    fn conversation() -> (Handover, Handover) {
        let (one, other) = UnixStream::pair().expect("a pair");
        (Handover::new(one), Handover::new(other))
    }

    fn bound() -> BoundListener {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port").into()
    }

    #[tokio::test]
    async fn a_listener_goes_to_the_other_side_and_takes_its_queue_along() {
        let (one, other) = conversation();
        let (first, second) = (bound(), bound());
        let address = first.local_addr().expect("bound");
        let mut waiting = TcpStream::connect(address).await.expect("connected before");
        one.say("two listeners", &[first.as_fd(), second.as_fd()]).await.expect("said");
        drop((first, second));
        let (line, sockets) = other.hear().await.expect("heard").expect("a line");
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
    async fn lines_come_one_by_one_and_the_end_is_told() {
        let (one, other) = conversation();
        one.say("rules", &[]).await.expect("said");
        assert_eq!(other.hear().await.expect("heard").expect("a line").0, "rules");
        other.say("ok", &[]).await.expect("said");
        assert_eq!(one.hear().await.expect("heard").expect("a line").0, "ok");
        drop(one);
        assert!(other.hear().await.expect("an end").is_none());
    }

    #[tokio::test]
    async fn what_is_no_line_and_no_listener_is_refused() {
        let (one, other) = conversation();
        let mut raw = one.stream;
        raw.write_all(&[b'x'; 5000]).await.expect("written");
        assert_eq!(other.hear().await.expect_err("too long").kind(), ErrorKind::InvalidData);
        let (one, other) = conversation();
        let mut raw = one.stream;
        raw.write_all(b"\xff\n").await.expect("written");
        assert_eq!(other.hear().await.expect_err("no text").kind(), ErrorKind::InvalidData);
        let (unix, _) = UnixStream::pair().expect("a pair");
        let imposter = OwnedFd::from(unix.into_std().expect("its socket"));
        BoundListener::try_from(imposter).expect_err("it does not listen");
    }

    #[tokio::test]
    async fn the_kernel_tells_who_the_other_is() {
        let (one, _other) = conversation();
        let peer = one.peer().expect("credentials");
        assert_eq!(peer.uid, geteuid().as_raw());
        assert!(peer.is_trusted() && Peer { uid: 0, pid: None }.is_trusted());
        assert!(!Peer { uid: geteuid().as_raw() + 1, pid: None }.is_trusted());
        assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());
    }
}
