//! Tests of key updates in both directions: requested, unrequested, and before a key reaches its
//! limit.

use rustls::{AlertDescription, InvalidMessage, PeerMisbehaved};

use super::writing::write;
use super::*;

const UPDATE: &[u8] = &[24, 0, 0, 1, 0];
const UPDATE_REQUESTED: &[u8] = &[24, 0, 0, 1, 1];

fn update(request: bool) -> (ContentType, Vec<u8>) {
    let message = if request { UPDATE_REQUESTED } else { UPDATE };
    (HANDSHAKE, message.to_vec())
}

fn data(content: &[u8]) -> (ContentType, Vec<u8>) {
    (DATA, content.to_vec())
}

#[test]
fn opens_with_the_next_key_after_a_key_update() {
    for (split, read) in [(0, 1), (1, usize::MAX), (4, 3)] {
        let (mut stream, mut peer) = server();
        peer.wire.pipe().read = read;
        for generation in 0..20 {
            peer.send(DATA, &[generation]);
            let (first, second) = UPDATE.split_at(split);
            if split > 0 {
                peer.send(HANDSHAKE, first);
            }
            peer.send(HANDSHAKE, second);
            peer.update();
        }
        let (read, end) = read_all(&mut stream, 100);
        assert!(read == Vec::from_iter(0..20) && end.is_none());
        write(&mut stream, b"ours");
        assert_eq!(peer.received(), [data(b"ours")], "the peer requested no update");
    }
}

#[test]
fn answers_key_update_requests_once_before_next_data() {
    let (mut stream, mut peer) = client();
    write(&mut stream, b"first");
    for _ in 0..3 {
        peer.send(HANDSHAKE, UPDATE_REQUESTED);
        peer.update();
    }
    peer.send(DATA, b"data");
    assert_eq!(read_all(&mut stream, 100).0, b"data");
    assert_eq!(peer.received(), [data(b"first")]);
    write(&mut stream, b"second");
    write(&mut stream, b"third");
    assert_eq!(peer.received(), [update(false), data(b"second"), data(b"third")]);
}

#[test]
fn rejects_the_old_key_after_a_key_update() {
    let (stream, mut peer) = client();
    peer.send(HANDSHAKE, UPDATE);
    peer.send(DATA, b"data");
    let alert = Some(AlertDescription::BadRecordMac);
    assert_failed((stream, peer), Error::DecryptError, alert);
}

#[test]
fn rejects_malformed_key_updates() {
    let (stream, mut peer) = client();
    peer.send(HANDSHAKE, &[24, 0, 0, 1, 2]);
    let alert = Some(AlertDescription::IllegalParameter);
    assert_failed((stream, peer), InvalidMessage::InvalidKeyUpdate, alert);
    for message in [&[24, 0, 0, 0][..], &[24, 0, 0, 2], &[24, 0, 1, 1, 0]] {
        let (stream, mut peer) = server();
        peer.send(HANDSHAKE, message);
        let alert = Some(AlertDescription::DecodeError);
        assert_failed((stream, peer), InvalidMessage::HandshakePayloadTooLarge, alert);
    }
}

#[test]
fn rejects_message_after_key_update_in_same_record() {
    for after in [&[24][..], UPDATE] {
        let (stream, mut peer) = client();
        peer.send(HANDSHAKE, &[UPDATE, after].concat());
        assert_misbehaved((stream, peer), PeerMisbehaved::KeyEpochWithPendingFragment);
    }
}

#[test]
fn rejects_a_flood_of_key_updates() {
    let (stream, mut peer) = server();
    for _ in 0..33 {
        peer.send(HANDSHAKE, UPDATE_REQUESTED);
        peer.update();
    }
    assert_misbehaved((stream, peer), PeerMisbehaved::TooManyKeyUpdateRequests);
}

#[test]
fn key_is_updated_after_its_last_allowed_record() {
    let (mut stream, mut peer) = pair(true, 4).unwrap();
    let mut expected = Vec::new();
    for number in 0..20 {
        write(&mut stream, &[number]);
        if number > 0 && number % 3 == 0 {
            expected.push(update(false));
        }
        expected.push(data(&[number]));
    }
    assert_eq!(peer.received(), expected);
}

#[test]
fn key_is_updated_within_one_write() {
    let (mut stream, mut peer) = pair(true, 3).unwrap();
    let sent = numbered(7 * MAX_CONTENT);
    write(&mut stream, &sent);
    let records = peer.received();
    let kinds: Vec<_> = records.iter().map(|(kind, _)| *kind).collect();
    let expected = [DATA, DATA, HANDSHAKE, DATA, DATA, HANDSHAKE, DATA, DATA, HANDSHAKE, DATA];
    assert_eq!(kinds, expected);
}

#[test]
fn requests_key_update_at_limit_of_peer_key() {
    let (mut stream, mut peer) = pair(false, 4).unwrap();
    for _ in 0..6 {
        peer.send(DATA, b".");
    }
    assert_eq!(read_all(&mut stream, 100).0, b"......");
    write(&mut stream, b"a");
    write(&mut stream, b"b");
    assert_eq!(peer.received(), [update(true), data(b"a"), data(b"b")], "requests once");
    peer.send(HANDSHAKE, UPDATE);
    peer.update();
    for _ in 0..4 {
        peer.send(DATA, b",");
    }
    assert_eq!(read_all(&mut stream, 100).0, b",,,,");
    write(&mut stream, b"c");
    assert_eq!(peer.received(), [update(true), data(b"c")]);
}

#[test]
fn peer_that_updates_its_key_in_time_gets_no_request() {
    let (mut stream, mut peer) = pair(false, 4).unwrap();
    for _ in 0..4 {
        peer.send(DATA, b".");
    }
    peer.send(HANDSHAKE, UPDATE);
    peer.update();
    assert_eq!(read_all(&mut stream, 100).0, b"....");
    write(&mut stream, b"a");
    assert_eq!(peer.received(), [update(false), data(b"a")]);
}
