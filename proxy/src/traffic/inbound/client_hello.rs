//! Waits until a client has sent its ClientHello, without reading it: a connection that is silent
//! costs no more than itself.

use std::io;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What is looked at. A ClientHello has a few hundred bytes, with post-quantum keys some 2 KiB; the
/// rest of a longer one is left to the handshake.
const LOOK: usize = 4096;
/// RFC 8446 section 5.1: type, version (2), length (2).
const RECORD_HEAD: usize = 5;
/// The type of a record with a handshake message.
const HANDSHAKE: u8 = 22;

/// Waits until the first record has arrived, or the first bytes are no ClientHello, or the client has
/// closed the connection. In the last two cases the handshake fails at once.
pub(super) async fn client_hello(stream: &TcpStream) -> io::Result<()> {
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        // To say WouldBlock makes tokio wait for more bytes than those that were seen.
        match stream.try_io(Interest::READABLE, || peek(stream)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            seen => return seen,
        }
        // No more will come, and an end is never forgotten by tokio.
        if ready.is_read_closed() {
            return Ok(());
        }
    }
}

fn peek(stream: &TcpStream) -> io::Result<()> {
    let mut bytes = [0; LOOK];
    let (count, _) = recv(stream, &mut bytes, RecvFlags::PEEK)?;
    let seen = bytes.get(..count).unwrap_or_default();
    if is_whole(seen) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
}

/// Whether waiting for more bytes could change nothing.
fn is_whole(seen: &[u8]) -> bool {
    match seen {
        // The end of the connection.
        [] => true,
        [HANDSHAKE, _, _, high, low, ..] => {
            let record = RECORD_HEAD + usize::from(u16::from_be_bytes([*high, *low]));
            seen.len() >= record.min(LOOK)
        }
        [kind, ..] => *kind != HANDSHAKE,
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};

    use futures_util::FutureExt as _;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    /// Whether it still waits after the runtime has seen what was sent.
    async fn waits<F: Future>(mut future: Pin<&mut F>, server: &TcpStream, sent: usize) -> bool {
        let mut bytes = [0; LOOK];
        while server.peek(&mut bytes).await.unwrap() < sent {}
        (&mut future).now_or_never().is_none()
    }

    #[tokio::test]
    async fn waits_for_the_whole_first_record() {
        let (mut client, server) = pair().await;
        let mut hello = pin!(client_hello(&server));
        assert!((&mut hello).now_or_never().is_none(), "a silent client");
        client.write_all(&[HANDSHAKE]).await.unwrap();
        assert!(waits(hello.as_mut(), &server, 1).await);
        client.write_all(&[3, 1, 0, 2, 1]).await.unwrap();
        assert!(waits(hello.as_mut(), &server, 6).await);
        client.write_all(&[0]).await.unwrap();
        hello.await.unwrap();
        let mut bytes = [0; LOOK];
        assert_eq!(server.peek(&mut bytes).await.unwrap(), 7, "nothing was read");
    }

    #[tokio::test]
    async fn does_not_wait_for_what_is_no_client_hello_or_too_long() {
        let longest = [&[HANDSHAKE, 3, 1, 0x40, 0][..], &[0; LOOK]].concat();
        for bytes in [&b"GET / HTTP/1.1"[..], &longest] {
            let (mut client, server) = pair().await;
            client.write_all(bytes).await.unwrap();
            client_hello(&server).await.unwrap();
        }
    }

    #[tokio::test]
    async fn ends_with_the_connection() {
        for begun in [&[][..], &[HANDSHAKE, 3, 1]] {
            let (mut client, server) = pair().await;
            client.write_all(begun).await.unwrap();
            client.shutdown().await.unwrap();
            client_hello(&server).await.unwrap();
        }
    }
}
