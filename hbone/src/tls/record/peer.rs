//! A scripted TLS peer for tests and the fuzz target. It seals arbitrary records, and opens the
//! records of the tested stream. It shares only the AEAD with the record layer.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use aws_lc_rs::aead::AES_128_GCM;
use rustls::crypto::cipher::Iv;
use rustls::{ContentType, Error};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::aead::RecordKey;
use super::keys::{KeySchedule, Keys};
use super::stream::TlsStream;
use super::{HEADER, TAG, TRAILER};

/// The first octet of all keys from the peer to the tested stream.
const KEY_FROM_PEER: u8 = 0x20;
const KEY_TO_PEER: u8 = 0x40;

/// The keys of one direction. Each key update advances the generation.
#[derive(Debug)]
struct KeyGenerations {
    direction: u8,
    generation: u8,
}

impl KeyGenerations {
    fn key(&self) -> Result<RecordKey, Error> {
        let key = [self.direction ^ self.generation; 16];
        RecordKey::new(&AES_128_GCM, &key, Iv::from([self.direction; 12]), 0)
    }

    fn next(&mut self) -> Result<RecordKey, Error> {
        self.generation = self.generation.wrapping_add(1);
        self.key()
    }
}

/// A deterministic key schedule that replaces rustls.
struct TestKeySchedule {
    sealing: KeyGenerations,
    opening: KeyGenerations,
    is_client: bool,
    tickets: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl KeySchedule for TestKeySchedule {
    fn next_sealing(&mut self) -> Result<RecordKey, Error> {
        self.sealing.next()
    }

    fn next_opening(&mut self) -> Result<RecordKey, Error> {
        self.opening.next()
    }

    fn keep_ticket(&mut self, message: &[u8]) -> Result<(), Error> {
        lock(&self.tickets).push(message.to_vec());
        Ok(())
    }

    fn takes_tickets(&self) -> bool {
        self.is_client
    }
}

/// The transport between the tested stream and the peer.
#[derive(Debug, Clone, Default)]
pub(super) struct Wire(Arc<Mutex<Pipe>>);

/// The bytes in flight, and the limits of each call.
#[derive(Debug)]
pub(super) struct Pipe {
    pub(super) to_us: VecDeque<u8>,
    pub(super) from_us: Vec<u8>,
    pub(super) ended: bool,
    /// The maximum number of bytes of one read, and of one write.
    pub(super) read: usize,
    pub(super) write: usize,
    /// The number of bytes that the transport accepts before writes are pending.
    pub(super) room: usize,
    /// The number of completed reads and writes.
    pub(super) calls: usize,
}

impl Default for Pipe {
    fn default() -> Self {
        let (to_us, from_us) = (VecDeque::new(), Vec::new());
        let all = usize::MAX;
        Self { to_us, from_us, ended: false, read: all, write: all, room: all, calls: 0 }
    }
}

impl Wire {
    pub(super) fn pipe(&self) -> MutexGuard<'_, Pipe> {
        lock(&self.0)
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut pipe = self.pipe();
        let length = pipe.to_us.len().min(buf.remaining()).min(pipe.read);
        if length == 0 && !pipe.ended {
            return Poll::Pending;
        }
        let bytes: Vec<u8> = pipe.to_us.drain(..length).collect();
        buf.put_slice(&bytes);
        pipe.calls += 1;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut pipe = self.pipe();
        let length = buf.len().min(pipe.write).min(pipe.room);
        if length == 0 {
            return Poll::Pending;
        }
        pipe.from_us.extend_from_slice(buf.get(..length).unwrap_or_default());
        pipe.room -= length;
        pipe.calls += 1;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The scripted end of a [`TlsStream`].
pub(super) struct Peer {
    pub(super) wire: Wire,
    to_us: KeyGenerations,
    from_us: KeyGenerations,
    sealing: RecordKey,
    opening: RecordKey,
    #[cfg(test)]
    tickets: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// Creates a client's or a server's stream, and its peer.
pub(super) fn pair(is_client: bool, limit: u64) -> Result<(TlsStream<Wire>, Peer), Error> {
    pair_with(is_client, limit, &[])
}

/// Like [`pair`], with bytes that were read after the handshake.
pub(super) fn pair_with(
    is_client: bool,
    limit: u64,
    leftover: &[u8],
) -> Result<(TlsStream<Wire>, Peer), Error> {
    let to_us = || KeyGenerations { direction: KEY_FROM_PEER, generation: 0 };
    let from_us = || KeyGenerations { direction: KEY_TO_PEER, generation: 0 };
    let (wire, tickets) = (Wire::default(), Arc::<Mutex<Vec<_>>>::default());
    let peer = Peer {
        wire: wire.clone(),
        to_us: to_us(),
        from_us: from_us(),
        sealing: to_us().key()?,
        opening: from_us().key()?,
        #[cfg(test)]
        tickets: Arc::clone(&tickets),
    };
    let keys = Keys {
        sealing: from_us().key()?,
        opening: to_us().key()?,
        schedule: Box::new(TestKeySchedule {
            sealing: from_us(),
            opening: to_us(),
            is_client,
            tickets,
        }),
        limit,
    };
    Ok((TlsStream::new(wire, keys, leftover), peer))
}

impl Peer {
    /// Sends a record of any type.
    pub(super) fn send(&mut self, kind: ContentType, content: &[u8]) {
        self.send_padded(kind, content, 0);
    }

    pub(super) fn send_padded(&mut self, kind: ContentType, content: &[u8], padding: usize) {
        let record = self.seal(kind, content, padding);
        self.wire.pipe().to_us.extend(record);
    }

    /// Seals a record without sending it. Content and padding may exceed the limits of the
    /// protocol.
    pub(super) fn seal(&mut self, kind: ContentType, content: &[u8], padding: usize) -> Vec<u8> {
        let mut inner = content.to_vec();
        let kind = u8::from(kind);
        inner.push(kind);
        inner.resize(inner.len() + padding, 0);
        self.seal_inner(&inner)
    }

    /// Seals an inner plaintext: content, type and padding.
    pub(super) fn seal_inner(&mut self, inner: &[u8]) -> Vec<u8> {
        // `RecordKey::seal` appends the content type, so the last octet of the inner plaintext is
        // passed as the type.
        let (last, content) = inner.split_last().unwrap_or((&0, &[]));
        let mut record = vec![0; HEADER + content.len() + TRAILER];
        let sealed = self.sealing.seal(ContentType::from(*last), content, &mut record);
        record.truncate(sealed.unwrap_or_default());
        record
    }

    /// Seals an empty inner plaintext with sequence number 0.
    #[cfg(test)]
    pub(super) fn seal_empty(&self) -> Vec<u8> {
        use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce, UnboundKey};
        let key = UnboundKey::new(&AES_128_GCM, &[KEY_FROM_PEER; 16]).unwrap();
        let nonce = Nonce::assume_unique_for_key([KEY_FROM_PEER; 12]);
        let header = [23, 3, 3, 0, 16];
        let sealed =
            LessSafeKey::new(key).seal_in_place_separate_tag(nonce, Aad::from(header), &mut []);
        [&header[..], sealed.unwrap().as_ref()].concat()
    }

    pub(super) fn send_raw(&mut self, bytes: &[u8]) {
        self.wire.pipe().to_us.extend(bytes);
    }

    /// Changes to the peer's next key for sending.
    pub(super) fn update(&mut self) {
        if let Ok(key) = self.to_us.next() {
            self.sealing = key;
        }
    }

    /// Opens all received records. Returns type and content of each, and follows key updates.
    pub(super) fn received(&mut self) -> Vec<(ContentType, Vec<u8>)> {
        let mut rest = std::mem::take(&mut self.wire.pipe().from_us);
        let mut records = Vec::new();
        while let Some(&[_, _, _, high, low]) = rest.first_chunk::<HEADER>() {
            let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
            if length > rest.len() {
                break;
            }
            let mut record: Vec<u8> = rest.drain(..length).collect();
            let Ok(inner) = self.opening.open_in_place(&mut record) else { break };
            let Some((kind, content)) = inner.split_last() else { break };
            let kind = ContentType::from(*kind);
            if kind == ContentType::Handshake
                && let Ok(key) = self.from_us.next()
            {
                self.opening = key;
            }
            records.push((kind, content.to_vec()));
        }
        // A pending write may have sent a part of a record.
        self.wire.pipe().from_us.extend(rest);
        records
    }

    /// The tickets that the tested stream has stored.
    #[cfg(test)]
    pub(super) fn tickets(&self) -> Vec<Vec<u8>> {
        lock(&self.tickets).clone()
    }
}

/// Reads `size` bytes at a time until the stream is pending or at its end.
pub(super) fn read_all(
    stream: &mut TlsStream<Wire>,
    size: usize,
) -> (Vec<u8>, Option<io::Result<()>>) {
    let mut context = Context::from_waker(Waker::noop());
    let (mut all, mut buffer) = (Vec::new(), vec![0; size.max(1)]);
    loop {
        let mut buf = ReadBuf::new(&mut buffer);
        match Pin::new(&mut *stream).poll_read(&mut context, &mut buf) {
            Poll::Pending => return (all, None),
            Poll::Ready(Ok(())) if buf.filled().is_empty() => return (all, Some(Ok(()))),
            Poll::Ready(Ok(())) => all.extend_from_slice(buf.filled()),
            Poll::Ready(Err(error)) => return (all, Some(Err(error))),
        }
    }
}

/// The maximum memory of a pending stream's receive side: one incomplete record.
pub(super) const MAX_BUFFERED: usize = HEADER + super::MAX_BODY + TAG;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
