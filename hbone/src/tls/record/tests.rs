//! Tests of received records: valid, malformed, split, padded, oversized, and out of order.

mod keys;
mod script;
mod vectors;
mod writing;

use std::io;
use std::pin::Pin;
use std::task::{Context, Waker};

use rustls::{AlertDescription, ContentType, Error, InvalidMessage, PeerMisbehaved};
use tokio::io::{AsyncRead as _, ReadBuf};

use super::peer::{MAX_BUFFERED, Peer, Wire, pair, pair_with, read_all};
use super::stream::TlsStream;
use super::{HEADER, MAX_BODY, MAX_CONTENT};

/// A limit that no key reaches.
const NO_LIMIT: u64 = u64::MAX;
const DATA: ContentType = ContentType::ApplicationData;
const HANDSHAKE: ContentType = ContentType::Handshake;
const ALERT: ContentType = ContentType::Alert;

/// A client's stream and a scripted server.
fn client() -> (TlsStream<Wire>, Peer) {
    pair(true, NO_LIMIT).unwrap()
}

/// A server's stream and a scripted client.
fn server() -> (TlsStream<Wire>, Peer) {
    pair(false, NO_LIMIT).unwrap()
}

fn numbered(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

fn ticket(length: usize) -> Vec<u8> {
    let [_, high, middle, low] = u32::try_from(length).unwrap().to_be_bytes();
    [&[4, high, middle, low][..], &vec![9; length]].concat()
}

fn tls_error(end: Option<io::Result<()>>) -> Error {
    let error = end.expect("the connection ended").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    error.get_ref().unwrap().downcast_ref::<Error>().unwrap().clone()
}

/// Asserts that the stream fails with `error` and stays failed, and that the peer receives `alert`.
fn assert_failed(
    (mut stream, mut peer): (TlsStream<Wire>, Peer),
    error: impl Into<Error>,
    alert: Option<AlertDescription>,
) {
    let error = error.into();
    let (read, end) = read_all(&mut stream, 100);
    assert!(read.is_empty());
    assert_eq!(tls_error(end), error);
    let alerts = alert.map(|alert| (ALERT, vec![2, u8::from(alert)]));
    assert_eq!(peer.received(), Vec::from_iter(alerts));
    peer.send(DATA, b"more");
    assert_eq!(tls_error(read_all(&mut stream, 100).1), error);
    assert_eq!(stream.buffered(), 0);
}

fn assert_misbehaved(pair: (TlsStream<Wire>, Peer), error: PeerMisbehaved) {
    assert_failed(pair, error, Some(AlertDescription::UnexpectedMessage));
}

#[test]
fn delivers_records_of_any_length_in_any_pieces() {
    for read in [1, 3, 1000, 16_384, usize::MAX] {
        for size in [1, 100, 16_384, 50_000] {
            let (mut stream, mut peer) = server();
            peer.wire.pipe().read = read;
            let mut sent = Vec::new();
            for length in [1, 0, 17, 9000, MAX_CONTENT, 3, MAX_CONTENT, MAX_CONTENT] {
                let content = numbered(length);
                peer.send(DATA, &content);
                sent.extend(content);
            }
            let (read, end) = read_all(&mut stream, size);
            assert!(read == sent && end.is_none());
            assert_eq!(stream.buffered(), 0, "a stream that waits holds nothing");
        }
    }
}

#[test]
fn one_read_returns_many_records() {
    let (mut stream, mut peer) = client();
    for _ in 0..8 {
        peer.send(DATA, &numbered(MAX_CONTENT));
    }
    assert_eq!(read_all(&mut stream, 1 << 17).0.len(), 8 * MAX_CONTENT);
    assert_eq!(peer.wire.pipe().calls, 1);
}

#[test]
fn record_that_does_not_fit_waits_for_next_read() {
    let (mut stream, mut peer) = client();
    peer.send(DATA, &numbered(256));
    peer.send(DATA, &numbered(MAX_CONTENT));
    let mut context = Context::from_waker(Waker::noop());
    let mut read = |size| {
        let mut buffer = vec![0; size];
        let mut buf = ReadBuf::new(&mut buffer);
        assert!(Pin::new(&mut stream).poll_read(&mut context, &mut buf).is_ready());
        buf.filled().len()
    };
    assert_eq!(read(8192), 256);
    assert_eq!(read(1000), 1000, "a reader with a small buffer gets a part");
    assert_eq!(read(20_000), MAX_CONTENT - 1000);
}

#[test]
fn waiting_stream_holds_at_most_one_partial_record() {
    let (mut stream, mut peer) = client();
    peer.send(DATA, b"before");
    let record = peer.seal(DATA, &numbered(MAX_CONTENT), 0);
    peer.send_raw(&record[..record.len() - 1]);
    assert_eq!(read_all(&mut stream, 100).0, b"before");
    assert!(stream.buffered() == record.len() - 1 && stream.buffered() <= MAX_BUFFERED);
    peer.send_raw(&record[record.len() - 1..]);
    assert!(read_all(&mut stream, 100).0 == numbered(MAX_CONTENT));
}

#[test]
fn opens_records_received_with_the_handshake_before_later_ones() {
    let (_, mut peer) = server();
    let (first, second) = (peer.seal(DATA, b"early", 0), peer.seal(DATA, b"split", 0));
    let (near, far) = second.split_at(9);
    let early = [&first, near].concat();
    // Both pairs have the same keys.
    let (mut stream, peer) = pair_with(false, NO_LIMIT, &early).unwrap();
    assert_eq!(read_all(&mut stream, 100).0, b"early");
    peer.wire.pipe().to_us.extend(far);
    assert_eq!(read_all(&mut stream, 100).0, b"split");
}

#[test]
fn strips_padding() {
    let (mut stream, mut peer) = client();
    peer.send_padded(DATA, b"padded", 1);
    peer.send_padded(DATA, b" to the full\0", MAX_CONTENT - 13);
    peer.send_padded(HANDSHAKE, &ticket(5), 300);
    assert_eq!(read_all(&mut stream, 20_000).0, b"padded to the full\0");
    assert_eq!(peer.tickets(), [[9; 5]]);
}

#[test]
fn rejects_records_without_a_type() {
    for inner in [0, 1, 500] {
        let (stream, mut peer) = client();
        // The record contains only padding, or only a tag.
        let mut record = peer.seal_inner(&vec![0; inner]);
        if inner == 0 {
            record = peer.seal_empty();
        }
        peer.send_raw(&record);
        assert_misbehaved((stream, peer), PeerMisbehaved::IllegalTlsInnerPlaintext);
    }
}

#[test]
fn rejects_oversized_records() {
    let overflow = Some(AlertDescription::RecordOverflow);
    // The length field alone is enough to reject the record.
    let (stream, mut peer) = client();
    let [high, low] = u16::try_from(MAX_BODY + 1).unwrap().to_be_bytes();
    peer.send_raw(&[23, 3, 3, high, low]);
    assert_failed((stream, peer), Error::PeerSentOversizedRecord, overflow);
    // Content or padding exceeds the limit.
    for (content, padding) in [(MAX_CONTENT + 1, 0), (1, MAX_CONTENT), (MAX_CONTENT, 1)] {
        let (stream, mut peer) = client();
        peer.send_padded(DATA, &numbered(content), padding);
        assert_failed((stream, peer), Error::PeerSentOversizedRecord, overflow);
    }
}

#[test]
fn rejects_changed_repeated_missing_or_reordered_records() {
    let bad_mac = Some(AlertDescription::BadRecordMac);
    for position in [1, 2, HEADER, HEADER + 4, HEADER + 20] {
        let (stream, mut peer) = client();
        let mut record = peer.seal(DATA, b"text", 0);
        record[position] ^= 1;
        peer.send_raw(&record);
        assert_failed((stream, peer), Error::DecryptError, bad_mac);
    }
    let (stream, mut peer) = client();
    peer.send_raw(&[23, 3, 3, 0, 15]);
    assert_failed((stream, peer), Error::DecryptError, bad_mac);
    let (mut stream, mut peer) = client();
    let record = peer.seal(DATA, b"once", 0);
    peer.send_raw(&record);
    assert_eq!(read_all(&mut stream, 100).0, b"once");
    peer.send_raw(&record);
    assert_failed((stream, peer), Error::DecryptError, bad_mac);
    let (stream, mut peer) = client();
    let _left_out = peer.seal(DATA, b"first", 0);
    peer.send(DATA, b"second");
    assert_failed((stream, peer), Error::DecryptError, bad_mac);
}

#[test]
fn delivers_records_before_a_violation() {
    let (mut stream, mut peer) = client();
    peer.send(DATA, b"good");
    peer.send_raw(&[23, 3, 3, 255, 255]);
    let (read, end) = read_all(&mut stream, 1000);
    assert_eq!(read, b"good");
    assert_eq!(tls_error(end), Error::PeerSentOversizedRecord);
}

#[test]
fn rejects_plaintext_records() {
    for (kind, content) in [
        (ALERT, &[1, 0][..]),
        (ContentType::ChangeCipherSpec, &[1]),
        (HANDSHAKE, &[24, 0, 0, 1, 0]),
    ] {
        let (stream, mut peer) = client();
        let length = u8::try_from(content.len()).unwrap();
        peer.send_raw(&[&[u8::from(kind), 3, 3, 0, length], content].concat());
        let error = Error::InappropriateMessage { expect_types: vec![DATA], got_type: kind };
        assert_failed((stream, peer), error, Some(AlertDescription::UnexpectedMessage));
    }
}

#[test]
fn rejects_sealed_records_of_other_types() {
    for kind in [ContentType::ChangeCipherSpec, ContentType::Heartbeat, ContentType::from(99)] {
        let (stream, mut peer) = server();
        peer.send(kind, &[1]);
        let expect_types = vec![DATA, HANDSHAKE];
        let error = Error::InappropriateMessage { expect_types, got_type: kind };
        assert_failed((stream, peer), error, Some(AlertDescription::UnexpectedMessage));
    }
}

#[test]
fn rejects_more_than_32_consecutive_empty_records() {
    let (mut stream, mut peer) = client();
    for _ in 0..2 {
        for padding in 0..32 {
            peer.send_padded(DATA, b"", padding);
        }
        peer.send(DATA, b".");
    }
    let (read, end) = read_all(&mut stream, 100);
    assert!(read == b".." && end.is_none());
    for _ in 0..33 {
        peer.send(DATA, b"");
    }
    assert_misbehaved((stream, peer), PeerMisbehaved::TooManyEmptyFragments);
}

#[test]
fn stores_tickets_that_span_records_or_share_one() {
    for read in [1, usize::MAX] {
        let (mut stream, mut peer) = client();
        peer.wire.pipe().read = read;
        for byte in ticket(7) {
            peer.send(HANDSHAKE, &[byte]);
        }
        peer.send(HANDSHAKE, &[ticket(3), ticket(0), ticket(40)[..3].to_vec()].concat());
        peer.send(HANDSHAKE, &[&ticket(40)[3..], &ticket(1)].concat());
        peer.send(DATA, b"data");
        assert_eq!(read_all(&mut stream, 100).0, b"data");
        assert_eq!(peer.tickets(), [7, 3, 0, 40, 1].map(|length| vec![9; length]));
    }
}

#[test]
fn accepts_ticket_of_maximum_length_and_rejects_longer_one() {
    let (mut stream, mut peer) = client();
    for part in ticket(0xffff).chunks(MAX_CONTENT) {
        peer.send(HANDSHAKE, part);
    }
    assert!(read_all(&mut stream, 100).1.is_none());
    assert_eq!(peer.tickets()[0].len(), 0xffff);
    peer.send(HANDSHAKE, &[4, 1, 0, 0]);
    let error = InvalidMessage::HandshakePayloadTooLarge;
    assert_failed((stream, peer), error, Some(AlertDescription::DecodeError));
}

#[test]
fn rejects_other_record_between_parts_of_a_message() {
    for (kind, content) in [(DATA, &b"data"[..]), (DATA, b""), (ALERT, &[1, 0])] {
        let (stream, mut peer) = client();
        peer.send(HANDSHAKE, &ticket(7)[..6]);
        peer.send(kind, content);
        assert_misbehaved((stream, peer), PeerMisbehaved::MessageInterleavedWithHandshakeMessage);
    }
}

#[test]
fn rejects_messages_of_the_handshake_at_their_first_byte() {
    use rustls::HandshakeType as Type;
    let refused = Some(AlertDescription::UnexpectedMessage);
    for kind in [Type::ClientHello, Type::CertificateRequest, Type::Finished, Type::from(77)] {
        let (stream, mut peer) = client();
        peer.send(HANDSHAKE, &[u8::from(kind)]);
        let expect_types = vec![Type::NewSessionTicket, Type::KeyUpdate];
        let error = Error::InappropriateHandshakeMessage { expect_types, got_type: kind };
        assert_failed((stream, peer), error, refused);
    }
    // A client must not send tickets.
    let (stream, mut peer) = server();
    peer.send(HANDSHAKE, &ticket(7));
    let (expect_types, got_type) = (vec![Type::KeyUpdate], Type::NewSessionTicket);
    let error = Error::InappropriateHandshakeMessage { expect_types, got_type };
    assert_failed((stream, peer), error, refused);
    let (stream, mut peer) = server();
    peer.send(HANDSHAKE, &[]);
    assert_failed((stream, peer), InvalidMessage::InvalidEmptyPayload, refused);
}

#[test]
fn rejects_more_than_32_consecutive_messages() {
    let (mut stream, mut peer) = client();
    for _ in 0..2 {
        for _ in 0..32 {
            peer.send(HANDSHAKE, &ticket(1));
        }
        peer.send(DATA, b".");
    }
    assert_eq!(read_all(&mut stream, 100).0, b"..");
    for _ in 0..33 {
        peer.send(HANDSHAKE, &ticket(1));
    }
    assert_misbehaved((stream, peer), PeerMisbehaved::TooManyKeyUpdateRequests);
    let (stream, mut peer) = client();
    for _ in 0..17 {
        // Empty records do not reset the limit.
        peer.send(DATA, b"");
        peer.send(HANDSHAKE, &[ticket(1), ticket(1)].concat());
    }
    assert_misbehaved((stream, peer), PeerMisbehaved::TooManyKeyUpdateRequests);
}

#[test]
fn ends_cleanly_at_close_notify() {
    for level in [1, 2] {
        let (mut stream, mut peer) = client();
        peer.send(DATA, b"last");
        peer.send(ALERT, &[level, 0]);
        peer.send(DATA, b"ignored");
        peer.send_raw(b"as is this");
        let (read, end) = read_all(&mut stream, 1000);
        assert_eq!(read, b"last");
        end.unwrap().unwrap();
        read_all(&mut stream, 1000).1.unwrap().unwrap();
        assert_eq!(stream.buffered(), 0);
    }
}

#[test]
fn end_without_close_notify_is_an_error() {
    for partial in [&b""[..], &[23, 3, 3, 0, 30, 1, 2]] {
        let (mut stream, mut peer) = client();
        peer.send(DATA, b"last");
        peer.send_raw(partial);
        peer.wire.pipe().ended = true;
        let (read, end) = read_all(&mut stream, 1000);
        assert_eq!(read, b"last");
        assert_eq!(end.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let again = read_all(&mut stream, 1000).1.unwrap();
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn fatal_alert_ends_connection_without_answer() {
    use AlertDescription as Alert;
    for (level, alert) in [
        (2, Alert::CertificateUnknown),
        (2, Alert::UserCanceled),
        (2, Alert::from(200)),
        // TLS 1.3 ignores the level.
        (1, Alert::AccessDenied),
    ] {
        let (stream, mut peer) = client();
        peer.send(ALERT, &[level, u8::from(alert)]);
        assert_failed((stream, peer), Error::AlertReceived(alert), None);
    }
}

#[test]
fn rejects_more_than_4_user_canceled_alerts() {
    let (mut stream, mut peer) = client();
    let canceled = [1, u8::from(AlertDescription::UserCanceled)];
    for _ in 0..4 {
        peer.send(ALERT, &canceled);
    }
    assert!(read_all(&mut stream, 100).1.is_none());
    peer.send(ALERT, &canceled);
    assert_misbehaved((stream, peer), PeerMisbehaved::TooManyWarningAlertsReceived);
}

#[test]
fn rejects_malformed_alerts() {
    for content in [&[][..], &[1], &[1, 0, 0]] {
        let (mut stream, mut peer) = client();
        peer.send(ALERT, content);
        assert!(matches!(tls_error(read_all(&mut stream, 100).1), Error::InvalidMessage(_)));
        let alert = vec![2, u8::from(AlertDescription::DecodeError)];
        assert_eq!(peer.received(), [(ALERT, alert)]);
    }
    let (stream, mut peer) = client();
    peer.send(ALERT, &[3, 0]);
    let error = Error::AlertReceived(AlertDescription::CloseNotify);
    assert_failed((stream, peer), error, Some(AlertDescription::IllegalParameter));
}
