//! Interprets bytes as actions of a peer, and compares the stream with a model. For the fuzz target
//! and a property test.
//!
//! A script is a list of steps: one octet for the action, two for its size. The model predicts the
//! delivered bytes and the end of the stream, until a step sends arbitrary bytes or messages. After
//! that step, only delivery of the earlier data and memory use are checked.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use rustls::ContentType;
use tokio::io::AsyncWrite;

use super::MAX_CONTENT;
use super::peer::{MAX_BUFFERED, Peer, Wire, pair, read_all};
use super::stream::TlsStream;

/// The number of records per key. Small, so that scripts reach it.
const LIMIT: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    None,
    Clean,
    Failed,
    /// The model makes no prediction.
    Any,
}

struct ScriptRun {
    stream: TlsStream<Wire>,
    peer: Peer,
    expected: Vec<u8>,
    delivered: Vec<u8>,
    written: Vec<u8>,
    end: End,
    empty: u8,
    consecutive_messages: u8,
    warnings: u8,
    is_client: bool,
}

/// Runs a script. Panics if the record layer differs from the model.
pub(crate) fn run(script: &[u8]) {
    let Some((setup, mut rest)) = script.split_first() else { return };
    let is_client = setup & 1 == 0;
    let Ok((stream, peer)) = pair(is_client, LIMIT) else { return };
    {
        let mut pipe = peer.wire.pipe();
        pipe.read = select(setup >> 1, [usize::MAX, 1, 7, 4096]);
        pipe.write = select(setup >> 3, [usize::MAX, 1, 1000, 40_000]);
    }
    let mut run = ScriptRun {
        stream,
        peer,
        expected: Vec::new(),
        delivered: Vec::new(),
        written: Vec::new(),
        end: End::None,
        empty: 0,
        consecutive_messages: 0,
        warnings: 0,
        is_client,
    };
    let size = select(setup >> 5, [20_000, 1, 100, 140_000]);
    while let Some((&[kind, high, low], after)) = rest.split_first_chunk::<3>() {
        rest = run.step(kind, usize::from(u16::from_be_bytes([high, low])), after);
        run.check(size);
    }
}

/// Selects by the two low bits.
fn select(bits: u8, [first, second, third, fourth]: [usize; 4]) -> usize {
    match bits & 3 {
        0 => first,
        1 => second,
        2 => third,
        _ => fourth,
    }
}

impl ScriptRun {
    /// Performs one step. Returns the rest of the script.
    fn step<'a>(&mut self, kind: u8, size: usize, script: &'a [u8]) -> &'a [u8] {
        match kind % 9 {
            0 => self.data(size % (MAX_CONTENT + 300), usize::from(kind)),
            1 => self.data(0, size % 40),
            2 => self.key_update(size),
            3 => self.ticket(size),
            4 => self.alert(size),
            5 => {
                let (bytes, after) = script.split_at(script.len().min(size % 64));
                self.peer.send_raw(bytes);
                if !bytes.is_empty() {
                    self.stop_predicting();
                }
                return after;
            }
            6 => {
                let (inner, after) = script.split_at(script.len().min(size % 64));
                let record = self.peer.seal_inner(inner);
                self.peer.send_raw(&record);
                self.stop_predicting();
                return after;
            }
            7 => self.write(size * 4),
            _ => self.send_damaged(size),
        }
        script
    }

    fn data(&mut self, length: usize, padding: usize) {
        let content: Vec<u8> = (0..=u8::MAX).cycle().skip(padding).take(length).collect();
        self.peer.send_padded(ContentType::ApplicationData, &content, padding);
        if self.end != End::None {
            return;
        }
        if length + padding > MAX_CONTENT {
            self.end = End::Failed;
            return;
        }
        self.expected.extend(content);
        if length > 0 {
            (self.empty, self.consecutive_messages) = (0, 0);
        } else {
            self.empty += 1;
            self.expect_failure_if(self.empty > 32);
        }
    }

    /// Sends a message in one record or in two.
    fn message(&mut self, message: &[u8], split: usize) {
        let (first, second) = message.split_at(split % message.len());
        for part in [first, second] {
            if !part.is_empty() {
                self.peer.send(ContentType::Handshake, part);
            }
        }
        self.consecutive_messages = self.consecutive_messages.saturating_add(1);
        self.expect_failure_if(self.consecutive_messages > 32);
    }

    fn key_update(&mut self, size: usize) {
        let request = u8::from(size.is_multiple_of(2));
        self.message(&[24, 0, 0, 1, request], size / 2);
        self.peer.update();
    }

    fn ticket(&mut self, size: usize) {
        let length = size % (MAX_CONTENT - 4);
        let [_, high, middle, low] = u32::try_from(length).unwrap_or_default().to_be_bytes();
        let mut message = vec![4, high, middle, low];
        message.resize(message.len() + length, 7);
        let is_client = self.is_client;
        self.expect_failure_if(!is_client);
        self.message(&message, size);
    }

    fn alert(&mut self, size: usize) {
        let [level, description] = u16::try_from(size).unwrap_or_default().to_be_bytes();
        self.peer.send(ContentType::Alert, &[level, description]);
        match (level, description, self.end) {
            (1 | 2, 0, End::None) => self.end = End::Clean,
            (1, 90, _) => {
                self.warnings = self.warnings.saturating_add(1);
                self.expect_failure_if(self.warnings > 4);
            }
            _ => self.expect_failure_if(true),
        }
    }

    fn write(&mut self, length: usize) {
        let content: Vec<u8> = (1..=u8::MAX).cycle().take(length).collect();
        let mut context = Context::from_waker(Waker::noop());
        let mut left = content.as_slice();
        while !left.is_empty() {
            match Pin::new(&mut self.stream).poll_write(&mut context, left) {
                Poll::Ready(Ok(written)) => {
                    assert!(written > 0, "a write takes something or is pending");
                    let (taken, rest) = left.split_at(written);
                    self.written.extend_from_slice(taken);
                    left = rest;
                }
                Poll::Ready(Err(_)) => {
                    assert!(
                        matches!(self.end, End::Failed | End::Any),
                        "a write fails only after a failure"
                    );
                    return;
                }
                Poll::Pending => unreachable!("the transport accepts all bytes"),
            }
        }
        let flushed = Pin::new(&mut self.stream).poll_flush(&mut context);
        assert!(matches!(flushed, Poll::Ready(Ok(()))));
    }

    /// Sends a record with one flipped bit.
    fn send_damaged(&mut self, size: usize) {
        let mut record = self.peer.seal(ContentType::ApplicationData, &[5; 50], 0);
        let bit = size % (record.len() * 8);
        if let Some(byte) = record.get_mut(bit / 8) {
            *byte ^= 1 << (bit % 8);
        }
        self.peer.send_raw(&record);
        // If the length field grew, the stream waits for more bytes instead of failing.
        if matches!(bit / 8, 3 | 4) { self.stop_predicting() } else { self.expect_failure_if(true) }
    }

    fn expect_failure_if(&mut self, fails: bool) {
        if fails && self.end == End::None {
            self.end = End::Failed;
        }
    }

    fn stop_predicting(&mut self) {
        if self.end == End::None {
            self.end = End::Any;
        }
    }

    fn check(&mut self, size: usize) {
        let (read, end) = read_all(&mut self.stream, size);
        self.delivered.extend(read);
        if self.end != End::Any {
            assert!(self.delivered == self.expected, "the delivered data equals the sealed data");
        } else {
            assert!(self.delivered.starts_with(&self.expected));
            // An arbitrary inner plaintext may have been valid application data.
            self.expected.clone_from(&self.delivered);
        }
        match self.end {
            End::None => assert!(end.is_none(), "the connection stays open: {end:?}"),
            End::Clean => assert!(matches!(end, Some(Ok(())))),
            End::Failed => assert!(matches!(end, Some(Err(_)))),
            End::Any => {}
        }
        assert!(self.stream.buffered() <= MAX_BUFFERED);
        let records = self.peer.received();
        let data = records.iter().filter(|(kind, _)| *kind == ContentType::ApplicationData);
        let data: Vec<u8> = data.flat_map(|(_, content)| content).copied().collect();
        assert!(self.written == data, "the sealed data equals the written data");
        self.written.clear();
        for (kind, content) in records {
            assert!(content.len() <= MAX_CONTENT);
            assert!(kind != ContentType::Alert || content.len() == 2);
        }
    }
}
