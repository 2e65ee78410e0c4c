//! A connection that carries messages with file descriptors attached (`SOCK_SEQPACKET`, unix(7)).
//! Node agents use it to pass the network namespaces of pods.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::io::ioctl_fionbio;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::sockets::descriptors::{self, Received};
use crate::sockets::peer::Peer;

/// The default maximum length of a received message in bytes. istio-cni's longest message has about
/// 600: two names of 253 octets and a namespace of 63.
const MAX_MESSAGE: usize = 4096;

/// A connected socket of the type `SOCK_SEQPACKET`.
#[derive(Debug)]
pub struct SeqPacket {
    /// tokio has no type for `SOCK_SEQPACKET`. Its `UnixStream` only registers the socket and waits
    /// for it.
    socket: UnixStream,
    /// Receives messages of up to its length. Kept, because a message is much shorter, and clearing
    /// a new buffer would take longer than receiving.
    buffer: Mutex<Box<[u8]>>,
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// The content, which is not empty.
    pub bytes: Vec<u8>,
    /// The attached descriptors. They are close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

impl SeqPacket {
    /// Connects to the listener at `path`. Never waits: if the accept queue is full, fails with
    /// `WouldBlock`, because the kernel does not queue the connection attempt of a non-blocking
    /// socket.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::new(socket)
    }

    /// Wraps `socket`, which must be connected and non-blocking. Another process may have used it.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = UnixStream::from_std(StdUnixStream::from(socket))?;
        Ok(Self { socket, buffer: buffer(MAX_MESSAGE) })
    }

    /// Creates two connected sockets, which belong to no runtime. The first one is non-blocking,
    /// the second one is blocking.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (one, other) = socketpair(family, kind, SocketFlags::CLOEXEC, None)?;
        ioctl_fionbio(&one, true)?;
        Ok((one, other))
    }

    /// Sets the maximum length of received messages in bytes.
    #[must_use]
    pub fn with_limit(self, max_message: usize) -> Self {
        Self { buffer: buffer(max_message), ..self }
    }

    /// Receives the first message from `socket`, which must be blocking, and then makes the socket
    /// non-blocking. For a process that needs the message to create its runtime.
    ///
    /// # Errors
    ///
    /// As [`receive`](Self::receive); `UnexpectedEof` if there is no message.
    pub fn receive_first(socket: OwnedFd, max_message: usize) -> io::Result<(OwnedFd, Message)> {
        let mut bytes = vec![0; max_message];
        let received = descriptors::receive(&socket, &mut bytes)?.complete()?;
        bytes.truncate(received.bytes);
        if bytes.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        ioctl_fionbio(&socket, true)?;
        Ok((socket, Message { bytes, descriptors: received.descriptors }))
    }

    /// The process at the other end.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn peer(&self) -> io::Result<Peer> {
        Peer::of(&self.socket)
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// The error of the kernel. `InvalidInput` for an empty message, which would read as the end of
    /// the connection, and for too many descriptors.
    pub async fn send(&self, bytes: &[u8], attached: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.is_empty() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let send = || descriptors::send(&self.socket, bytes, attached);
        // The kernel sends a message completely or not at all.
        self.socket.async_io(Interest::WRITABLE, send).await.map(|_| ())
    }

    /// Receives the next message. `None` after the other process closed the connection or ended.
    /// Cancel-safe: a message is lost only together with the connection.
    ///
    /// # Errors
    ///
    /// The error of the kernel. `InvalidData` if the message is too long or has too many
    /// descriptors; all received descriptors are closed then.
    pub async fn receive(&self) -> io::Result<Option<Message>> {
        self.receive_if(Received::complete).await
    }

    /// Like [`receive`](Self::receive), but a message whose descriptors could not all be received
    /// has none. The reason may be that this process has no free descriptor.
    ///
    /// # Errors
    ///
    /// The error of the kernel. `InvalidData` if the message is too long.
    pub async fn receive_despite_lost_descriptors(&self) -> io::Result<Option<Message>> {
        self.receive_if(Ok).await
    }

    async fn receive_if(
        &self,
        check: impl Fn(Received) -> io::Result<Received>,
    ) -> io::Result<Option<Message>> {
        let receive = || {
            // No code panics while it holds the lock.
            let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
            let received = check(descriptors::receive(&self.socket, &mut buffer)?)?;
            let bytes = buffer.get(..received.bytes).unwrap_or_default().to_vec();
            Ok(Message { bytes, descriptors: received.descriptors })
        };
        let message = self.socket.async_io(Interest::READABLE, receive).await?;
        Ok((!message.bytes.is_empty()).then_some(message))
    }
}

fn buffer(length: usize) -> Mutex<Box<[u8]>> {
    Mutex::new(vec![0; length].into())
}

impl AsFd for SeqPacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::IoSlice;
    use std::mem::MaybeUninit;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::testing::{SeqPacketListener, seqpacket_pair};

    fn pair() -> (SeqPacket, SeqPacket) {
        seqpacket_pair().expect("a pair")
    }

    /// The number of descriptors of this process that refer to `path`.
    fn open(path: &Path) -> usize {
        let entries = fs::read_dir("/proc/self/fd").expect("a folder").flatten();
        entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to == path)).count()
    }

    /// Sends a message with any number of descriptors.
    fn send_unchecked(socket: &SeqPacket, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); 512];
        let mut attached = SendAncillaryBuffer::new(&mut space);
        assert!(attached.push(SendAncillaryMessage::ScmRights(descriptors)));
        let bytes = [IoSlice::new(bytes)];
        sendmsg(&socket.socket, &bytes, &mut attached, SendFlags::empty()).expect("sent");
    }

    #[tokio::test]
    async fn receives_messages_separately_with_their_descriptors() {
        let (one, other) = pair();
        let file = File::open("/proc/self/stat").expect("a file");
        one.send(b"first", &[file.as_fd(), file.as_fd()]).await.expect("sent");
        one.send(b"second", &[]).await.expect("sent");
        let first = other.receive().await.expect("received").expect("a message");
        assert_eq!((first.bytes.as_slice(), first.descriptors.len()), (&b"first"[..], 2));
        let second = other.receive().await.expect("received").expect("a message");
        assert_eq!((second.bytes.as_slice(), second.descriptors.len()), (&b"second"[..], 0));
        drop(one);
        assert!(other.receive().await.expect("an end").is_none());
    }

    #[tokio::test]
    async fn rejects_long_message_and_closes_its_descriptors() {
        let (one, other) = pair();
        let path = std::env::temp_dir().join(format!("seqpacket-{}", std::process::id()));
        let file = File::create(&path).expect("a file");
        one.send(&[b'x'; MAX_MESSAGE + 1], &[file.as_fd()]).await.expect("sent");
        one.send(&[b'x'; MAX_MESSAGE], &[]).await.expect("sent");
        let error = other.receive().await.expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        assert_eq!(open(&path), 1, "only the sender's");
        let next = other.receive().await.expect("received").expect("a message");
        assert_eq!(next.bytes.len(), MAX_MESSAGE);
        fs::remove_file(&path).expect("removed");
    }

    #[tokio::test]
    async fn rejects_more_descriptors_than_it_can_receive() {
        let (one, other) = pair();
        let file = File::open("/proc/self/stat").expect("a file");
        let many: Vec<_> = (0..=descriptors::MAX_DESCRIPTORS).map(|_| file.as_fd()).collect();
        let error = one.send(b"many", &many).await.expect_err("too many");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        send_unchecked(&one, b"many", &many);
        let error = other.receive().await.expect_err("too many");
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
    }

    #[tokio::test]
    async fn message_with_lost_descriptors_has_none() {
        let (one, other) = pair();
        let path = std::env::temp_dir().join(format!("seqpacket-lost-{}", std::process::id()));
        let file = File::create(&path).expect("a file");
        let many: Vec<_> = (0..=descriptors::MAX_DESCRIPTORS).map(|_| file.as_fd()).collect();
        send_unchecked(&one, b"many", &many);
        one.send(b"next", &[file.as_fd()]).await.expect("sent");
        for (expected, count) in [(b"many", 0), (b"next", 1)] {
            let received = other.receive_despite_lost_descriptors().await;
            let received = received.expect("received").expect("a message");
            assert_eq!(
                (received.bytes.as_slice(), received.descriptors.len()),
                (&expected[..], count)
            );
        }
        assert_eq!(open(&path), 1, "the others are closed");
        fs::remove_file(&path).expect("removed");
    }

    #[tokio::test]
    async fn connects_to_listener_and_identifies_it() {
        let path = std::env::temp_dir().join(format!("seqpacket-{}.sock", std::process::id()));
        let error = SeqPacket::connect(&path).expect_err("no listener");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let listener = SeqPacketListener::bind(&path).expect("listens");
        let connection = SeqPacket::connect(&path).expect("connected");
        assert!(connection.peer().expect("credentials").is_trusted());
        let error = SeqPacket::connect(&path).expect_err("a full queue");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        let accepted = listener.accept().await.expect("accepted");
        accepted.send(b"hello", &[]).await.expect("sent");
        let message = connection.receive().await.expect("received").expect("a message");
        assert_eq!(message.bytes, b"hello");
        drop(listener);
        let error = SeqPacket::connect(&path).expect_err("a socket without listener");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        fs::remove_file(&path).expect("removed");
    }
}
