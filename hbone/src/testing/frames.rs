//! Raw HTTP/2 frames and a TLS client that sends them, for input that h2 would not send.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

use super::{ADDRESS, CLIENT, HOUR, SERVER, authority, credentials, id, identity};
use crate::tls::TlsStream;
use crate::tunnel::io::Io;
use crate::tunnel::server::{Acceptor, ServerTunnel};
use crate::tunnel::settings::ServerSettings;

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const END_HEADERS: u8 = 4;

/// The header of a frame with `length` bytes of payload.
pub(crate) fn head(length: usize, kind: u8, flags: u8, stream: u32) -> Vec<u8> {
    let [_, high, middle, low] = u32::try_from(length).unwrap().to_be_bytes();
    [&[high, middle, low, kind, flags][..], &stream.to_be_bytes()].concat()
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&head(payload.len(), kind, flags, stream), payload].concat()
}

/// A HEADERS frame with a CONNECT request to 10.0.0.1:80.
pub(crate) fn connect(stream: u32) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [(":method", "CONNECT"), (":authority", "10.0.0.1:80")] {
        // A literal header field without indexing (RFC 7541 section 6.2.2).
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// A TLS client with a certificate that sends arbitrary bytes.
pub(crate) struct RawClient {
    io: TlsStream<Io>,
}

impl RawClient {
    /// Connects a client with a certificate that is valid for an hour. Returns the client and the
    /// server's end.
    pub(crate) async fn new(settings: ServerSettings) -> (Self, ServerTunnel) {
        let authority = authority("td");
        let server = credentials(&identity(&authority, SERVER));
        let acceptor = Acceptor::new(server.fixed(), settings);
        let client = credentials(&identity(&authority, CLIENT));
        let (near, far) = duplex(4 << 20);
        let expected = [id(SERVER)];
        let connect = async {
            let handshake = client.client().connect(Box::new(near), ADDRESS, &expected);
            let mut client = Self { io: handshake.await.unwrap().0 };
            client.send(PREFACE).await;
            client
        };
        let (client, server) = tokio::join!(connect, acceptor.accept(far, HOUR));
        (client, server.unwrap())
    }

    /// Like [`new`](Self::new), and sends SETTINGS.
    pub(crate) async fn new_with_settings_sent(settings: ServerSettings) -> (Self, ServerTunnel) {
        let (mut client, server) = Self::new(settings).await;
        client.send(&frame(SETTINGS, 0, 0, &[])).await;
        (client, server)
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        assert!(self.try_send(bytes).await);
    }

    /// Sends bytes. Returns true if the server accepts them.
    pub(crate) async fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.io.write_all(bytes).await.is_ok() && self.io.flush().await.is_ok()
    }

    /// Receives frames (type, stream, payload) until the server closes, or until a frame of type
    /// `until`.
    pub(crate) async fn receive(&mut self, until: Option<u8>) -> Vec<(u8, u32, Vec<u8>)> {
        let mut frames = Vec::new();
        loop {
            let mut head = [0; 9];
            if self.io.read_exact(&mut head).await.is_err() {
                return frames;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let mut payload = vec![0; length as usize];
            if self.io.read_exact(&mut payload).await.is_err() {
                return frames;
            }
            frames.push((head[3], stream, payload));
            if Some(head[3]) == until {
                return frames;
            }
        }
    }

    /// Receives until the server closes. Returns the error code of the last GOAWAY.
    pub(crate) async fn goaway(&mut self) -> Option<u32> {
        let frames = self.receive(None).await;
        let goaways = frames.iter().rev().filter(|(kind, ..)| *kind == GOAWAY);
        let code = |payload: &[u8]| u32::from_be_bytes(payload[4..8].try_into().unwrap());
        goaways.map(|(.., payload)| code(payload)).next()
    }
}
