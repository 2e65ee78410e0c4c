//! A server of Istio's ZDS protocol, which announces one pod to a shared ztunnel.
//!
//! ztunnel connects and sends a greeting. It acknowledges every message. Here there are two: the
//! pod with the descriptor of its namespace, and the end of the snapshot. It serves the pod while
//! the connection stays open.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::thread;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use tokio::runtime::Handle;
use underpass_interception::SeqPacket;
use underpass_tests::Pod;

/// `WorkloadResponse { ack { error: "" } }`.
const ACCEPTED: [u8; 2] = [10, 0];
/// Fields of `WorkloadRequest`.
const ADD_WORKLOAD: u8 = 1;
const SNAPSHOT_SENT: u8 = 3;

/// Listens on the Unix socket `path`, and announces `pod` to the ztunnel that connects.
///
/// # Errors
///
/// The kernel rejected the operation.
pub(crate) fn announce(path: &Path, pod: &Pod) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen(&listener, 1)?;
    let namespace = pod.namespace().as_fd().try_clone_to_owned()?;
    let (workload, runtime) = (add_workload(pod.name()), Handle::current());
    // Accepting blocks, so it runs on a thread, which ends with ztunnel. If ztunnel refuses the
    // pod, the thread ends too, and ztunnel does not become ready.
    thread::spawn(move || -> io::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = accept_with(listener, flags)?;
        runtime.block_on(serve(accepted, &workload, &namespace))
    });
    Ok(())
}

async fn serve(accepted: OwnedFd, workload: &[u8], namespace: &OwnedFd) -> io::Result<()> {
    let ztunnel = SeqPacket::new(accepted)?;
    let _greeting = ztunnel.receive().await?;
    ztunnel.send(workload, &[namespace.as_fd()]).await?;
    if ztunnel.receive().await?.is_some_and(|answer| answer.bytes == ACCEPTED) {
        ztunnel.send(&field(SNAPSHOT_SENT, b""), &[]).await?;
        while ztunnel.receive().await?.is_some() {}
    }
    Ok(())
}

/// `WorkloadRequest { add { uid, workload_info { name, namespace, service_account } } }`.
fn add_workload(name: &str) -> Vec<u8> {
    let name = name.as_bytes();
    let info = [field(1, name), field(2, b"default"), field(3, name)].concat();
    field(ADD_WORKLOAD, &[field(1, name), field(2, &info)].concat())
}

/// A protobuf field of fewer than 128 bytes.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let length = u8::try_from(value.len()).ok().filter(|length| *length < 128);
    let length = length.expect("names of pods in a bench are short");
    [&[number << 3 | 2, length], value].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_contains_pod_and_its_service_account() {
        let info = b"\x0a\x01a\x12\x07default\x1a\x01a";
        let workload = [b"\x0a\x01a\x12\x0f", &info[..]].concat();
        assert_eq!(add_workload("a"), [b"\x0a\x14", &workload[..]].concat());
    }
}
