//! Tests of responses: sizes, truncation, EDNS, stored responses.

use super::*;
use crate::dns::message::testing::{edns, query, record, response};

const A: RecordType = RecordType::A;

fn read(message: &[u8]) -> Query {
    Query::read(message).unwrap()
}

fn addresses(count: u32) -> Vec<IpAddr> {
    (0..count).map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes())).collect()
}

/// Flags TC and the numbers of answers and additional records, after a check of the layout.
fn shape(message: &[u8]) -> (bool, usize, usize) {
    let layout = Layout::read(message).unwrap();
    assert_eq!(layout.end(), message.len(), "no bytes after the last record");
    let truncated = message::flags(message) & TC != 0;
    (truncated, layout.answers.len(), layout.additionals.len())
}

fn stored(sections: [&[Vec<u8>]; 3], flags: u16) -> StoredResponse {
    let asked = query("a.b", A, &[]);
    StoredResponse::new(response(&asked, flags, sections)).unwrap()
}

#[test]
fn addresses_that_do_not_fit_set_tc() {
    let plain = read(&query("large.com", A, &[]));
    let with_edns = |payload| read(&query("large.com", A, &[&edns(payload, false, &[])]));
    // 12 bytes of header, 15 of the question, 16 for each answer, 11 of an OPT record.
    for (query, transport, expected) in [
        (&plain, Transport::Udp, (true, 30, 0)),
        (&plain, Transport::Tcp, (false, 256, 0)),
        (&with_edns(1232), Transport::Udp, (true, 74, 1)),
        (&with_edns(512), Transport::Udp, (true, 29, 1)),
        (&with_edns(8192), Transport::Udp, (false, 256, 1)),
    ] {
        let message = of_addresses(query, None, &addresses(256), transport);
        assert_eq!(shape(&message), expected, "{query:?}");
        assert!(message.len() <= transport.limit(query));
    }
    let exact = of_addresses(&plain, None, &addresses(30), Transport::Udp);
    assert_eq!(shape(&exact), (false, 30, 0));
}

#[test]
fn alias_is_cname_to_first_labels() {
    let query = read(&query("www.example.com.ns1.svc.cluster.local", A, &[]));
    let message = of_addresses(&query, Some(3), &addresses(1), Transport::Udp);
    let layout = Layout::read(&message).unwrap();
    let cname = &layout.answers[0];
    assert_eq!(&message[cname.data.clone()], b"\x03www\x07example\x03com\0");
    let owner = u16::from_be_bytes(message[layout.answers[1].start..][..2].try_into().unwrap());
    assert_eq!(usize::from(owner & 0x3fff), cname.data.start, "the address belongs to the target");
    let none = of_addresses(&query, Some(3), &[], Transport::Udp);
    assert_eq!(shape(&none), (false, 0, 0));
}

#[test]
fn unknown_edns_version_is_refused() {
    let mut opt = edns(1232, true, &[]);
    opt[6] = 1;
    let message = unsupported_version(&read(&query("a", A, &[&opt]))).unwrap();
    assert_eq!(shape(&message), (false, 0, 1));
    let layout = Layout::read(&message).unwrap();
    assert_eq!(layout.additionals[0].ttl.to_be_bytes(), [BAD_VERSION, 0, 0x80, 0]);
}

#[test]
fn truncation_keeps_whole_answers_and_opt_record() {
    let asked = query("a.b", A, &[&edns(512, false, &[])]);
    let answers: Vec<_> = (0..100).map(|n| record(1, 60, &[10, 0, 0, n])).collect();
    let opt = edns(4096, false, &[0, 15, 0, 2, 0, 1]);
    let large =
        response(&asked, AA, [&answers, &[record(2, 60, &[0])], std::slice::from_ref(&opt)]);
    let client = read(&asked);
    let small = truncate(large.clone(), &client, Transport::Udp);
    assert_eq!(shape(&small), (true, 29, 1));
    assert!(small.len() <= 512 && small.ends_with(&opt));
    assert_eq!(message::flags(&small), message::flags(&large) | TC);
    assert_eq!(truncate(large.clone(), &client, Transport::Tcp), large);
}

#[test]
fn truncation_replaces_hostile_opt_record() {
    let (plain, with_edns) = (query("a.b", A, &[]), query("a.b", A, &[&edns(512, true, &[])]));
    let own = message::opt(true, 0);
    let answers: Vec<_> = (0..100).map(|n| record(1, 60, &[10, 0, 0, n])).collect();
    let large = edns(4096, false, &[&[0, 15, 3, 0][..], &[0; 768]].concat());
    let [_, fields @ ..] = &own;
    // A pointer to the last answer, which is left out.
    let pointer = 12 + 9 + 99 * 16;
    let pointer = u16::try_from(pointer).unwrap() | 0xc000;
    let with_pointer = [&pointer.to_be_bytes(), &fields[..]].concat();
    for opt in [large, with_pointer] {
        for (asked, expected) in [(&plain, (true, 30, 0)), (&with_edns, (true, 30, 1))] {
            let message = response(asked, 0, [&answers, &[], std::slice::from_ref(&opt)]);
            let small = truncate(message, &read(asked), Transport::Udp);
            assert_eq!(shape(&small), expected);
            assert!(small.len() <= 512 && small.ends_with(&own) == (expected.2 == 1));
        }
    }
}

#[test]
fn stored_response_serves_other_clients() {
    let answers = [record(1, 60, &[10, 0, 0, 1])];
    let opt = [edns(1232, false, &[0, 10, 0, 1, 9])];
    let stored = stored([&answers, &[], &opt], AA | AD);
    let mut other = query("A.B", A, &[&edns(4096, true, &[])]);
    other[..2].copy_from_slice(&[1, 2]);
    let message = stored.to(&read(&other), Age::Fresh(Duration::from_secs(20)), Transport::Udp);
    assert_eq!(shape(&message), (false, 1, 1));
    assert_eq!((&message[..2], &message[12..17]), (&[1, 2][..], &b"\x01A\x01B\0"[..]));
    assert_eq!(message::flags(&message) & (AA | AD | RD), AD | RD);
    let layout = Layout::read(&message).unwrap();
    assert_eq!((layout.answers[0].ttl, layout.additionals[0].data.len()), (40, 0));

    let old = stored.to(&read(&query("a.b", A, &[])), Age::Stale, Transport::Udp);
    assert_eq!(shape(&old), (false, 1, 0), "no EDNS in the query: none in the response");
    assert_eq!(Layout::read(&old).unwrap().answers[0].ttl, STALE_TTL);
    assert_eq!(message::flags(&old) & AD, 0);
}

#[test]
fn stored_response_is_truncated_for_small_clients() {
    let answers: Vec<_> = (0..100).map(|n| record(1, 60, &[10, 0, 0, n])).collect();
    let stored = stored([&answers, &[], &[]], 0);
    let asked = read(&query("a.b", A, &[]));
    let age = Age::Fresh(Duration::ZERO);
    assert_eq!(shape(&stored.to(&asked, age, Transport::Udp)), (true, 30, 0));
    assert_eq!(shape(&stored.to(&asked, age, Transport::Tcp)), (false, 100, 0));
}

#[test]
fn ttl_is_the_smallest_and_of_negative_answers_that_of_soa() {
    let soa = |ttl| record(6, ttl, &[[0; 20].as_slice(), &[0, 0, 0, 30]].concat());
    let a = |ttl| record(1, ttl, &[10, 0, 0, 1]);
    let cname = |ttl| record(5, ttl, &[0]);
    let ttl = |answers: &[Vec<u8>], authorities: &[Vec<u8>], flags| {
        stored([answers, authorities, &[]], flags).ttl(A)
    };
    assert_eq!(ttl(&[a(60), a(50)], &[record(2, 40, &[0])], 0), Some(40));
    assert_eq!(ttl(&[], &[soa(900)], 3), Some(30));
    assert_eq!(ttl(&[], &[soa(10)], 0), Some(10));
    assert_eq!(ttl(&[cname(5)], &[soa(900)], 0), Some(5), "an alias without address");
    assert_eq!(ttl(&[], &[], 3), None, "NXDOMAIN without SOA");
    assert_eq!(ttl(&[a(60)], &[], TC), None, "truncated");
    assert_eq!(ttl(&[], &[soa(900)], 2), None, "SERVFAIL");
}

#[test]
fn response_with_error_of_edns_is_not_stored() {
    let asked = query("a.b", A, &[]);
    let mut bad = edns(1232, false, &[]);
    bad[5] = BAD_VERSION;
    let stored =
        |additionals: &[Vec<u8>]| StoredResponse::new(response(&asked, 0, [&[], &[], additionals]));
    assert!(stored(&[bad]).is_none());
    assert!(stored(&[edns(1232, false, &[]), record(1, 60, &[10, 0, 0, 1])]).is_none());
    assert!(stored(&[edns(1232, false, &[]), edns(1232, false, &[])]).is_none());
}
