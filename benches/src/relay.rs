//! The floor under any proxy in user space: a bare TCP relay, one blocking thread per direction. One kind copies, as whoever has to
//! see the bytes must; the other splices (splice(2)) through a pipe, and the bytes stay in the kernel.
//!
//! An error ends a connection as an end does: it is a floor, not a proxy.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::net::listen;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use underpass_interception::Namespace;

use crate::part::{Part, ready, told};
use crate::server::BACKLOG;

/// What is moved at once, and what a pipe holds.
const BUFFER: usize = 128 * 1024;

/// How bytes are moved.
#[derive(Debug, Clone, Copy)]
pub(crate) enum How {
    Copy,
    Splice,
}

/// Starts a relay in `pod` from each first address to the second, and waits until it listens.
pub(crate) fn start(pod: &Namespace, how: How, hops: &[(SocketAddr, SocketAddr)]) -> Part {
    let how = match how {
        How::Copy => "copy",
        How::Splice => "splice",
    };
    let hops: Vec<_> = hops.iter().map(|(from, to)| format!("{from}={to}")).collect();
    Part::start(pod, &["relay".to_owned(), how.to_owned(), hops.join(",")])
}

/// Relays each `FROM=TO`, until standard input ends.
pub(crate) fn run(how: &str, hops: &str) {
    let how = if how == "splice" { How::Splice } else { How::Copy };
    for hop in hops.split(',') {
        let (from, to) = hop.split_once('=').expect("FROM=TO");
        let listener = TcpListener::bind(from).expect("the address is free");
        listen(&listener, BACKLOG).expect("it listens already");
        let to: SocketAddr = to.parse().expect("TO is an address");
        thread::spawn(move || accept(&listener, how, to));
    }
    ready();
    while told() {}
}

fn accept(listener: &TcpListener, how: How, to: SocketAddr) {
    loop {
        let served = listener.accept().and_then(|(client, _)| {
            thread::Builder::new().spawn(move || serve(client, how, to)).map(drop)
        });
        if served.is_err() {
            // No more files or threads: others will end.
            thread::park_timeout(Duration::from_millis(1));
        }
    }
}

fn serve(client: TcpStream, how: How, to: SocketAddr) {
    let Ok(server) = TcpStream::connect(to) else {
        return;
    };
    for end in [&client, &server] {
        end.set_nodelay(true).expect("TCP_NODELAY");
    }
    let (client, server) = (Arc::new(client), Arc::new(server));
    let (from, to) = (client.clone(), server.clone());
    let up = thread::Builder::new().spawn(move || pump(&from, &to, how));
    if up.is_ok() {
        pump(&server, &client, how);
    }
}

fn pump(from: &TcpStream, to: &TcpStream, how: How) {
    // What went wrong is not told: the connection has ended.
    match how {
        How::Copy => copy_bytes(from, to).ok(),
        How::Splice => splice_bytes(from, to).ok(),
    };
    to.shutdown(Shutdown::Write).ok();
}

/// Not `io::copy`, which splices if it can.
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
    // A user with many pipes gets smaller ones.
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
