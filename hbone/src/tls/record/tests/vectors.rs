//! Tests with the records after the handshake in RFC 8448 section 3.

use aws_lc_rs::aead::AES_128_GCM;
use rustls::ContentType;
use rustls::crypto::cipher::Iv;

use super::DATA;
use crate::tls::record::aead::RecordKey;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks(2).map(|pair| u8::try_from(pair[0] << 4 | pair[1]).unwrap()).collect()
}

fn key(key: &str, iv: &str, sequence: u64) -> RecordKey {
    let iv: [u8; 12] = hex(iv).try_into().unwrap();
    RecordKey::new(&AES_128_GCM, &hex(key), Iv::from(iv), sequence).unwrap()
}

fn client(sequence: u64) -> RecordKey {
    key("17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9", sequence)
}

fn server(sequence: u64) -> RecordKey {
    key("9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984", sequence)
}

const CLIENT_DATA: &str = "17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 \
    bc ab 3f 2b 98 19 a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb \
    21 69 49 15 e4";
const SERVER_DATA: &str = "17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa \
    1b 36 e3 0e fa f9 7d 90 e6 df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3 32 54 0d d0 32 e1 \
    67 c2 95 5d";
const CLIENT_CLOSE: &str =
    "17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3";
const SERVER_CLOSE: &str =
    "17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9";

fn check(mut sealing: RecordKey, mut opening: RecordKey, kind: ContentType, record: &str) {
    let record = hex(record);
    let content = if kind == DATA { (0..50).collect() } else { vec![1, 0] };
    let inner = [&content[..], &[u8::from(kind)]].concat();
    let sequence = sealing.sequence();
    let mut slot = vec![0; 100];
    let length = sealing.seal(kind, &content, &mut slot).unwrap();
    assert_eq!(slot[..length], record, "sealed out of place");
    assert_eq!(sealing.sequence(), sequence + 1);
    let mut plain = vec![0; inner.len()];
    opening.open_into(&record, &mut plain).unwrap();
    assert_eq!(plain, inner);
}

fn check_in_place(mut sealing: RecordKey, mut opening: RecordKey, kind: ContentType, record: &str) {
    let mut record = hex(record);
    let content = if kind == DATA { (0..50).collect() } else { vec![1, 0] };
    let mut slot = vec![0; 100];
    slot[5..5 + content.len()].copy_from_slice(&content);
    let length = sealing.seal_in_place(kind, content.len(), &mut slot).unwrap();
    assert_eq!(slot[..length], record);
    let opened = opening.open_in_place(&mut record).unwrap();
    assert_eq!(opened, [&content[..], &[u8::from(kind)]].concat());
}

#[test]
fn seals_and_opens_the_records_of_rfc_8448() {
    // The server's record 0 is its NewSessionTicket.
    for (key, sequence, kind, record) in [
        (client as fn(u64) -> RecordKey, 0, DATA, CLIENT_DATA),
        (client, 1, ContentType::Alert, CLIENT_CLOSE),
        (server, 1, DATA, SERVER_DATA),
        (server, 2, ContentType::Alert, SERVER_CLOSE),
    ] {
        check(key(sequence), key(sequence), kind, record);
        check_in_place(key(sequence), key(sequence), kind, record);
    }
}

#[test]
fn sequence_numbers_are_unique() {
    let mut key = client(u64::MAX - 1);
    let mut slot = [0; 100];
    key.seal(DATA, b"last", &mut slot).unwrap();
    for _ in 0..3 {
        key.seal(DATA, b"none", &mut slot).unwrap_err();
    }
}
