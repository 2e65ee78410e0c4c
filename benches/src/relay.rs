//! The floor under any proxy in user space: a bare TCP relay, one blocking thread per direction, as `relay.c` of others.
//!
//! It runs in a process of its own, so that its CPU can be told apart: this very program, started with `--relay`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use underpass_interception::Namespace;

const BUFFER: usize = 128 * 1024;

/// A running relay process. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Relay(Child);

impl Relay {
    /// Starts a relay in `pod` from each first address to the second, and waits until it listens.
    pub(crate) fn start(pod: &Namespace, hops: &[(SocketAddr, SocketAddr)]) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let hops: Vec<_> = hops.iter().map(|(from, to)| format!("{from}={to}")).collect();
        let mut command = Command::new(program);
        command.arg("--relay").arg(hops.join(",")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let spawned = pod.run(|| command.spawn()).expect("the pod can be entered");
        let mut child = spawned.expect("the relay starts");
        let mut ready = [0];
        let stdout = child.stdout.as_mut().expect("it is piped");
        stdout.read_exact(&mut ready).expect("the relay listens");
        Self(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // One that has ended already needs no end.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Relays each `FROM=TO`, until standard input ends.
///
/// # Panics
/// An argument is not of that shape, or an address cannot be listened on.
pub fn relay(hops: &[String]) {
    for hop in hops {
        let (from, to) = hop.split_once('=').expect("FROM=TO");
        let listener = TcpListener::bind(from).expect("the address is free");
        let to: SocketAddr = to.parse().expect("TO is an address");
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("accept");
                thread::spawn(move || serve(client, to));
            }
        });
    }
    let mut stdout = io::stdout();
    stdout.write_all(b"!").and_then(|()| stdout.flush()).expect("the parent listens");
    // Its end is the parent's.
    io::copy(&mut io::stdin(), &mut io::sink()).ok();
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
    let up = thread::spawn(move || copy(&from, &to));
    copy(&server, &client);
    up.join().expect("copying does not panic");
}

/// Not `io::copy`: its buffer is smaller. An error ends the connection as an end does: it is a floor, not a proxy.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if buffer.get(..length).is_none_or(|data| to.write_all(data).is_err()) {
            break;
        }
    }
    to.shutdown(Shutdown::Write).ok();
}
