//! A minimal TCP relay: the lower bound for the cost of a userspace proxy. An error ends a
//! connection like FIN.
//!
//! One mode copies with one blocking thread per direction, like a proxy that processes the bytes.
//! The other mode moves the bytes inside the kernel with the crate tokio-splice2: one task per
//! connection, on all CPUs, and a pipe of 1 MiB per direction.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::net::listen;
use tokio_splice2::copy_bidirectional;
use underpass_interception::Namespace;

use crate::child_process::{ChildProcess, ready, wait_for_parent};
use crate::server::BACKLOG;

/// The size of a read.
const BUFFER: usize = 128 * 1024;

/// The method of forwarding.
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
        match mode {
            RelayMode::Copy => thread::spawn(move || accept(&listener, to)),
            RelayMode::Splice => thread::spawn(move || splice_connections(listener, to)),
        };
    }
    ready();
    while wait_for_parent() {}
}

fn accept(listener: &TcpListener, to: SocketAddr) {
    loop {
        let served = listener.accept().and_then(|(client, _)| {
            thread::Builder::new().spawn(move || serve(client, to)).map(drop)
        });
        if served.is_err() {
            // No file descriptor or thread is left: wait for other connections to end.
            thread::park_timeout(Duration::from_millis(1));
        }
    }
}

fn serve(client: TcpStream, to: SocketAddr) {
    let Ok(server) = TcpStream::connect(to) else {
        return;
    };
    for end in [&client, &server] {
        end.set_nodelay(true).expect("TCP_NODELAY");
    }
    let (client, server) = (Arc::new(client), Arc::new(server));
    let (from, to) = (client.clone(), server.clone());
    let up = thread::Builder::new().spawn(move || pump(&from, &to));
    if up.is_ok() {
        pump(&server, &client);
    }
}

fn pump(from: &TcpStream, to: &TcpStream) {
    // The error is irrelevant: the connection has ended.
    copy_bytes(from, to).ok();
    to.shutdown(Shutdown::Write).ok();
}

/// Serves the connections of a listener.
fn splice_connections(listener: TcpListener, to: SocketAddr) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("the runtime starts").block_on(async {
        listener.set_nonblocking(true).expect("O_NONBLOCK");
        let listener = tokio::net::TcpListener::from_std(listener).expect("it is registered");
        loop {
            match listener.accept().await {
                Ok((client, _)) => drop(tokio::spawn(splice_connection(client, to))),
                // No file descriptor is left: wait for other connections to end.
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    });
}

async fn splice_connection(mut client: tokio::net::TcpStream, to: SocketAddr) {
    let Ok(mut server) = tokio::net::TcpStream::connect(to).await else {
        return;
    };
    for end in [&client, &server] {
        end.set_nodelay(true).expect("TCP_NODELAY");
    }
    // The error is irrelevant: the connection has ended.
    copy_bidirectional(&mut client, &mut server).await.ok();
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
