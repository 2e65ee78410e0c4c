//! Lists the inodes of the sockets that listen in a network namespace. They show whether a listener
//! of the proxy is still open in any process.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, ErrorKind};

use crate::namespace::Entered;

/// The tables of the thread's namespace. Without IPv6 the second one does not exist.
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
/// `TCP_LISTEN` (include/net/tcp_states.h).
const LISTEN: &str = "0A";

/// The inodes of the listening TCP sockets.
pub(crate) fn listening(_: &Entered) -> io::Result<BTreeSet<u64>> {
    let mut inodes = BTreeSet::new();
    for table in TABLES {
        let file = match File::open(table) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            file => file?,
        };
        // Skip the header. The kernel lists the listening sockets first (net/ipv4/tcp_ipv4.c,
        // `TCP_SEQ_STATE_LISTENING`), so the connections are not read.
        for line in BufReader::new(file).lines().skip(1) {
            match inode(&line?) {
                Some(inode) => inodes.insert(inode),
                None => break,
            };
        }
    }
    Ok(inodes)
}

/// The inode in a line of a listening socket:
/// `sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode …`.
fn inode(line: &str) -> Option<u64> {
    let mut fields = line.split_whitespace().skip(3);
    if fields.next() != Some(LISTEN) {
        return None;
    }
    fields.nth(5)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::sockets::listener::BoundListener;

    #[test]
    fn listener_is_found_until_it_is_shut_down_or_closed() {
        let here = Entered::current().unwrap();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let bound = BoundListener::from(listener.try_clone().unwrap());
            let is_open = || listening(&here).unwrap().contains(&bound.inode().unwrap());
            assert!(is_open(), "{address}");
            TcpStream::from(OwnedFd::from(listener)).shutdown(Shutdown::Both).unwrap();
            assert!(!is_open(), "{address}");
        }
    }

    #[test]
    fn lines_of_connections_have_no_inode() {
        let line = |state: &str| {
            format!(
                "   0: 00000000:3A99 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 4711 1"
            )
        };
        assert_eq!(inode(&line("0A")), Some(4711));
        for other in [&*line("01"), "", "0: x"] {
            assert_eq!(inode(other), None, "{other}");
        }
    }
}
