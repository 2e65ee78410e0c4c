//! Sends and receives bytes with file descriptors attached (`SCM_RIGHTS`, unix(7)).

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The maximum number of descriptors in one call.
pub(super) const MAX_DESCRIPTORS: usize = 64;

/// The bytes and descriptors of one receive call.
pub(super) struct Received {
    /// The number of bytes in the buffer. 0 at the end of the connection.
    pub(super) bytes: usize,
    /// The received descriptors. They are close-on-exec. Empty if not all could be received.
    pub(super) descriptors: Vec<OwnedFd>,
    /// Whether descriptors were attached that could not all be received.
    pub(super) has_lost_descriptors: bool,
}

impl Received {
    /// Fails with `InvalidData` if descriptors were lost.
    pub(super) fn complete(self) -> io::Result<Self> {
        match self.has_lost_descriptors {
            false => Ok(self),
            true => Err(invalid("not all attached descriptors could be received".to_owned())),
        }
    }
}

/// Sends `bytes` with `descriptors` attached. Returns the number of sent bytes.
pub(super) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut attached = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        attached.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut attached, SendFlags::NOSIGNAL)?)
}

/// Receives into `buffer`. If the kernel dropped descriptors (`MSG_CTRUNC`), closes the received
/// ones. If it dropped bytes (`MSG_TRUNC`), fails with `InvalidData`.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut attached = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut attached, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in attached.drain() {
        if let RecvAncillaryMessage::ScmRights(attached) = message {
            descriptors.extend(attached);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        let limit = buffer.len();
        return Err(invalid(format!("a message is longer than {limit} bytes")));
    }
    // The kernel rounds the space up, so that it may contain one descriptor more. The flag is also
    // set if this process has no free descriptor.
    let has_lost_descriptors =
        descriptors.len() > MAX_DESCRIPTORS || received.flags.contains(ReturnFlags::CTRUNC);
    if has_lost_descriptors {
        descriptors.clear();
    }
    Ok(Received { bytes: received.bytes, descriptors, has_lost_descriptors })
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}
