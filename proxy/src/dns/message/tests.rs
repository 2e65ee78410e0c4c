//! Tests of reading queries and responses.

use super::testing::{edns, query, record, response};
use super::*;

#[test]
fn reads_query_with_its_edns_record() {
    let message = query("WWW.example.com", RecordType::AAAA, &[&edns(4096, true, &[])]);
    let read = Query::read(&message).unwrap();
    assert_eq!((read.id, read.name.as_str(), read.name.labels()), (7, "www.example.com", 3));
    assert_eq!(read.edns, Some(Edns { payload: 4096, dnssec_ok: true, version: 0 }));
    assert!(read.is_plain && read.udp_limit() == 4096);
    let without = Query::read(&query("a", RecordType::A, &[])).unwrap();
    assert!(without.is_plain && without.udp_limit() == 512);
    let small = Query::read(&query("a", RecordType::A, &[&edns(100, false, &[])])).unwrap();
    assert_eq!(small.udp_limit(), 512, "RFC 6891: lower values mean 512");
}

#[test]
fn only_queries_without_special_parts_are_plain() {
    let cookie = [0, 10, 0, 2, 1, 2];
    let subnet = [0, 8, 0, 1, 0];
    for (options, is_plain) in [(&cookie[..], true), (&subnet[..], false)] {
        let message = query("a", RecordType::A, &[&edns(1232, false, options)]);
        assert_eq!(Query::read(&message).unwrap().is_plain, is_plain, "{options:?}");
    }
    let signed = query("a", RecordType::A, &[&record(250, 0, &[0])]);
    assert!(!Query::read(&signed).unwrap().is_plain);
}

#[test]
fn rejects_malformed_queries() {
    let good = query("a.b", RecordType::A, &[]);
    for length in 0..good.len() {
        let expected = match length {
            0..HEADER => Malformed::Ignored,
            _ => Malformed::Rejected(ResponseCode::FORMAT_ERROR),
        };
        assert_eq!(Query::read(&good[..length]).unwrap_err(), expected, "{length}");
    }
    let changed = |at: usize, to: u8| {
        let mut message = good.clone();
        message[at] = to;
        Query::read(&message).unwrap_err()
    };
    assert_eq!(changed(2, 0x80), Malformed::Ignored, "a response");
    let rejected = Malformed::Rejected;
    assert_eq!(changed(2, 0x28), rejected(ResponseCode::NOT_IMPLEMENTED), "an update");
    assert_eq!(changed(5, 2), rejected(ResponseCode::FORMAT_ERROR), "two questions");
    assert_eq!(changed(12, 0xc0), rejected(ResponseCode::FORMAT_ERROR), "compressed");
    assert_eq!(changed(18, 252), rejected(ResponseCode::NOT_IMPLEMENTED), "AXFR");
    let two = [&*edns(512, false, &[]), &*edns(512, false, &[])];
    let two = Query::read(&query("a", RecordType::A, &two)).unwrap_err();
    assert_eq!(two, rejected(ResponseCode::FORMAT_ERROR));
    let rejection = rejection(&good, ResponseCode::FORMAT_ERROR).unwrap();
    assert_eq!(rejection, [0, 7, 0x81, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn response_must_have_id_and_question_of_query() {
    let asked = query("a.b", RecordType::A, &[]);
    let query = Query::read(&asked).unwrap();
    let answer = response(&asked, 0, [&[record(1, 60, &[10, 0, 0, 1])], &[], &[]]);
    assert!(query.is_answered_by(&answer, 7) && !query.is_answered_by(&answer, 8));
    let upper = answer.iter().map(u8::to_ascii_uppercase).collect::<Vec<_>>();
    assert!(query.is_answered_by(&upper, 7), "some servers change the case");
    for at in [2, 13, 18, 20] {
        let mut wrong = answer.clone();
        wrong[at] ^= 0x87;
        assert!(!query.is_answered_by(&wrong, 7), "{at}");
    }
    for length in 0..answer.len() {
        assert!(!query.is_answered_by(&answer[..length], 7), "{length}");
    }
}

#[test]
fn layout_finds_records_and_negative_ttl() {
    let asked = query("a.b", RecordType::A, &[]);
    let soa =
        record(SOA, 900, &[0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 30]);
    let answer = response(&asked, 3, [&[], &[soa], &[edns(1232, false, &[])]]);
    let layout = Layout::read(&answer).unwrap();
    assert_eq!(layout.negative_ttl(&answer), Some(30));
    assert_eq!((layout.question, layout.end()), (asked.len(), answer.len()));
    assert!(layout.additionals[0].is_opt());
    let forward = response(&asked, 0, [&[vec![0xc0, 200, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]], &[], &[]]);
    assert_eq!(Layout::read(&forward), None, "a pointer to later bytes");
}
