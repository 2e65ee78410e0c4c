//! A minimal TCP relay with one blocking thread per direction: the lower bound for a userspace
//! proxy.
//!
//! One mode copies, like a proxy that processes the bytes. The other one splices (splice(2))
//! through a pipe, so that the bytes stay in the kernel. An error ends a connection like FIN.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::net::listen;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use underpass_interception::Namespace;

use crate::child_process::{ChildProcess, ready, wait_for_parent};
use crate::server::BACKLOG;

/// The size of a read, and of the pipe.
const BUFFER: usize = 128 * 1024;

/// How bytes are forwarded.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RelayMode {
    Copy,
    Splice,
}

/// Starts a relay in `pod` from each first address to the second, and waits until it listens.
pub(crate) fn start(
    pod: &Namespace,
    mode: RelayMode,
    hops: &[(SocketAddr, SocketAddr)],
) -> ChildProcess {
    let mode = match mode {
        RelayMode::Copy => "copy",
        RelayMode::Splice => "splice",
    };
    let hops: Vec<_> = hops.iter().map(|(from, to)| format!("{from}={to}")).collect();
    ChildProcess::start(pod, &["relay".to_owned(), mode.to_owned(), hops.join(",")])
}

/// Relays each `FROM=TO` until standard input ends.
pub(crate) fn run(mode: &str, hops: &str) {
    let mode = if mode == "splice" { RelayMode::Splice } else { RelayMode::Copy };
    for hop in hops.split(',') {
        let (from, to) = hop.split_once('=').expect("FROM=TO");
        let listener = TcpListener::bind(from).expect("the address is free");
        listen(&listener, BACKLOG).expect("it listens already");
        let to: SocketAddr = to.parse().expect("TO is an address");
        thread::spawn(move || accept(&listener, mode, to));
    }
    ready();
    while wait_for_parent() {}
}

fn accept(listener: &TcpListener, mode: RelayMode, to: SocketAddr) {
    loop {
        let served = listener.accept().and_then(|(client, _)| {
            thread::Builder::new().spawn(move || serve(client, mode, to)).map(drop)
        });
        if served.is_err() {
            // Out of files or threads: wait for other connections to end.
            thread::park_timeout(Duration::from_millis(1));
        }
    }
}

fn serve(client: TcpStream, mode: RelayMode, to: SocketAddr) {
    let Ok(server) = TcpStream::connect(to) else {
        return;
    };
    for end in [&client, &server] {
        end.set_nodelay(true).expect("TCP_NODELAY");
    }
    let (client, server) = (Arc::new(client), Arc::new(server));
    let (from, to) = (client.clone(), server.clone());
    let up = thread::Builder::new().spawn(move || pump(&from, &to, mode));
    if up.is_ok() {
        pump(&server, &client, mode);
    }
}

fn pump(from: &TcpStream, to: &TcpStream, mode: RelayMode) {
    // The error is irrelevant: the connection has ended.
    match mode {
        RelayMode::Copy => copy_bytes(from, to).ok(),
        RelayMode::Splice => splice_bytes(from, to).ok(),
    };
    to.shutdown(Shutdown::Write).ok();
}

/// Copies in user space. `io::copy` would splice.
fn copy_bytes(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = from.read(&mut buffer)?;
        match buffer.get(..length) {
            Some(data @ [_, ..]) => to.write_all(data)?,
            _ => return Ok(()),
        }
    }
}

fn splice_bytes(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
    // The pipe stays smaller if the user exceeds their limit.
    fcntl_setpipe_size(&into, BUFFER).ok();
    loop {
        let mut held = splice(from, None, &into, None, BUFFER, SpliceFlags::MOVE)?;
        if held == 0 {
            return Ok(());
        }
        while held > 0 {
            held -= splice(&out, None, to, None, held, SpliceFlags::MOVE)?;
        }
    }
}
