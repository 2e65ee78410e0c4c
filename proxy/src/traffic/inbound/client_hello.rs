//! Waits for a client's ClientHello without reading it, so that a silent connection holds no
//! handshake state.

use std::io;

use tokio::io::Interest;
use tokio::net::TcpStream;
use underpass_interception::peek;

/// The number of bytes to peek at. A ClientHello has a few hundred bytes, or about 2 KiB with
/// post-quantum keys. The handshake reads the rest of a longer one.
const PEEK_BYTES: usize = 4096;
/// RFC 8446 section 5.1: type, version (2), length (2).
const RECORD_HEAD: usize = 5;
/// The type of a record with a handshake message.
const HANDSHAKE: u8 = 22;

/// Waits until the first record is complete, the first bytes are no ClientHello, or the client has
/// closed the connection. The latter two fail the handshake at once.
pub(super) async fn client_hello(stream: &TcpStream) -> io::Result<()> {
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        // WouldBlock makes tokio wait for more bytes than it has seen.
        match stream.try_io(Interest::READABLE, || peek_record(stream)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            seen => return seen,
        }
        // The client has sent FIN, so no more bytes will arrive.
        if ready.is_read_closed() {
            return Ok(());
        }
    }
}

fn peek_record(stream: &TcpStream) -> io::Result<()> {
    let mut bytes = [0; PEEK_BYTES];
    let count = peek(stream, &mut bytes)?;
    let seen = bytes.get(..count).unwrap_or_default();
    if is_record_complete(seen) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
}

/// Whether more bytes would not change the result.
fn is_record_complete(seen: &[u8]) -> bool {
    match seen {
        // The end of the connection.
        [] => true,
        [HANDSHAKE, _, _, high, low, ..] => {
            let record = RECORD_HEAD + usize::from(u16::from_be_bytes([*high, *low]));
            seen.len() >= record.min(PEEK_BYTES)
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

    /// Whether the future is still pending after the runtime has seen the sent bytes.
    async fn waits<F: Future>(mut future: Pin<&mut F>, server: &TcpStream, sent: usize) -> bool {
        let mut bytes = [0; PEEK_BYTES];
        while server.peek(&mut bytes).await.unwrap() < sent {}
        (&mut future).now_or_never().is_none()
    }

    #[tokio::test]
    async fn waits_for_entire_first_record() {
        let (mut client, server) = pair().await;
        let mut hello = pin!(client_hello(&server));
        assert!((&mut hello).now_or_never().is_none(), "a silent client");
        client.write_all(&[HANDSHAKE]).await.unwrap();
        assert!(waits(hello.as_mut(), &server, 1).await);
        client.write_all(&[3, 1, 0, 2, 1]).await.unwrap();
        assert!(waits(hello.as_mut(), &server, 6).await);
        client.write_all(&[0]).await.unwrap();
        hello.await.unwrap();
        let mut bytes = [0; PEEK_BYTES];
        assert_eq!(server.peek(&mut bytes).await.unwrap(), 7, "nothing was read");
    }

    #[tokio::test]
    async fn wait_for_client_hello_ends_at_other_data_and_overlong_record() {
        let longest = [&[HANDSHAKE, 3, 1, 0x40, 0][..], &[0; PEEK_BYTES]].concat();
        for bytes in [&b"GET / HTTP/1.1"[..], &longest] {
            let (mut client, server) = pair().await;
            client.write_all(bytes).await.unwrap();
            client_hello(&server).await.unwrap();
        }
    }

    #[tokio::test]
    async fn wait_for_client_hello_ends_with_connection() {
        for begun in [&[][..], &[HANDSHAKE, 3, 1]] {
            let (mut client, server) = pair().await;
            client.write_all(begun).await.unwrap();
            client.shutdown().await.unwrap();
            client_hello(&server).await.unwrap();
        }
    }
}
