//! Property tests: parsers reject or accept arbitrary input without panics, and written values are
//! read back unchanged.

use std::net::{IpAddr, SocketAddr};

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use underpass_config::{Name, WorkloadType};

use super::*;

/// Text that is similar to the headers, so that parsers read more than its first character.
fn similar_text() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("00-").boxed(),
        Just("ff").boxed(),
        Just("4bf92f3577b34da6a3ce929d0e0e4736").boxed(),
        Just("00f067aa0ba902b7").boxed(),
        Just("0000000000000000").boxed(),
        Just("k8s.cluster.name=").boxed(),
        Just("k8s.job.name").boxed(),
        Just("service.name").boxed(),
        Just("for=").boxed(),
        Just("host=\"").boxed(),
        Just("[::1]:80").boxed(),
        Just("10.0.0.1:8080").boxed(),
        Just("%2").boxed(),
        Just("%0A").boxed(),
        Just("\\").boxed(),
        Just("\"").boxed(),
        Just("-").boxed(),
        Just("=").boxed(),
        Just(",").boxed(),
        Just(";").boxed(),
        Just(" ").boxed(),
        Just("é\u{2028}").boxed(),
    ];
    let word =
        prop_oneof![4 => word.prop_map(str::to_owned), 1 => any::<char>().prop_map(String::from)];
    vec(word, 0..24).prop_map(|words| words.concat())
}

/// A value without control characters.
fn value() -> impl Strategy<Value = Name> {
    prop_oneof!["[a-z0-9.-]{0,20}", "[ -~]{0,20}", "\\PC{0,20}"].prop_map(Name::from)
}

fn traceparent() -> impl Strategy<Value = TraceParent> {
    (1..=u128::MAX, 1..=u64::MAX, any::<bool>()).prop_map(|(trace, parent, sampled)| {
        format!("00-{trace:032x}-{parent:016x}-{:02x}", u8::from(sampled)).parse().unwrap()
    })
}

fn baggage() -> impl Strategy<Value = Baggage> {
    let kind = prop::sample::select(WorkloadType::ALL.to_vec());
    let name = value().prop_filter("a workload has a name", |name| !name.is_empty());
    let names = (value(), value(), value(), value(), value(), value());
    (names, option::of((kind, name))).prop_map(|(names, workload)| {
        let (cluster, namespace, service, version, region, zone) = names;
        Baggage { cluster, namespace, workload, service, version, region, zone }
    })
}

fn forwarded() -> impl Strategy<Value = Forwarded> {
    let host = option::of(prop_oneof!["[a-zA-Z0-9.*-]{1,40}(:[0-9]{1,5})?", ".{0,20}"]);
    (any::<IpAddr>(), any::<u16>(), host)
        .prop_map(|(ip, port, host)| Forwarded::new(SocketAddr::new(ip, port), host.as_deref()))
}

/// Returns true if a parsed value is safe to log.
fn is_clean(value: &str) -> bool {
    !value.contains(char::is_control)
}

fn all_are_clean(headers: &RequestHeaders) -> bool {
    let baggage = headers.baggage.clone().unwrap_or_default();
    let Baggage { cluster, namespace, workload, service, version, region, zone } = baggage;
    let workload = workload.map(|(_, name)| name).unwrap_or_default();
    let values = [cluster, namespace, workload, service, version, region, zone];
    let host = headers.forwarded.as_ref().and_then(|forwarded| forwarded.host().map(str::to_owned));
    let network = headers.network.as_deref();
    values.iter().map(|value| &**value).chain(host.as_deref()).chain(network).all(is_clean)
}

/// Returns true if every HTTP/2 peer accepts the value: visible ASCII without surrounding spaces.
fn is_printable_ascii(value: &HeaderValue) -> bool {
    value.as_bytes().iter().all(u8::is_ascii_graphic)
}

fn headers_of(lines: &[(HeaderName, Vec<u8>)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in lines {
        // HTTP/2 rejects other values before the parser.
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    }
    headers
}

fn lines() -> impl Strategy<Value = Vec<(HeaderName, Vec<u8>)>> {
    let name = prop::sample::select(vec![TRACEPARENT, BAGGAGE, FORWARDED, NETWORK]);
    let value = prop_oneof![
        2 => similar_text().prop_map(String::into_bytes),
        1 => vec(any::<u8>(), 0..80),
        1 => vec(32_u8..127, 55),
    ];
    vec((name, value), 0..6)
}

proptest! {
    #[test]
    fn arbitrary_headers_are_parsed_or_ignored(lines in lines()) {
        let read = RequestHeaders::read(&headers_of(&lines));
        prop_assert!(all_are_clean(&read), "{read:?}");
        // Parsed values must be valid when they are forwarded.
        let written = read.clone().into_header_map();
        prop_assert!(written.values().all(is_printable_ascii), "{written:?}");
        prop_assert_eq!(RequestHeaders::read(&written), read);
    }

    #[test]
    fn parsers_never_panic(text in prop_oneof![similar_text(), any::<String>()]) {
        let traceparent = text.parse::<TraceParent>();
        if let Ok(traceparent) = traceparent {
            prop_assert_eq!(traceparent.to_string().parse(), Ok(traceparent));
        }
        let baggage: Baggage = text.parse().unwrap_or_default();
        prop_assert_eq!(baggage.to_string().parse(), Ok(baggage));
        let forwarded: Forwarded = text.parse().unwrap_or_default();
        prop_assert_eq!(forwarded.to_string().parse(), Ok(forwarded));
    }

    #[test]
    fn written_headers_are_read_back(
        traceparent in option::of(traceparent()),
        baggage in option::of(baggage().prop_filter("has a value", |baggage| !baggage.is_empty())),
        forwarded in option::of(forwarded()),
        network in option::of("[!-~]{0,253}".prop_map(Name::from)),
    ) {
        let headers = RequestHeaders { traceparent, baggage, forwarded, network };
        let written = headers.clone().into_header_map();
        prop_assert!(written.values().all(is_printable_ascii), "{written:?}");
        prop_assert_eq!(RequestHeaders::read(&written), headers);
    }

    #[test]
    fn baggage_value_cannot_inject_a_member(cluster in any::<String>(), service in any::<String>()) {
        let (cluster, service) = (Name::from(cluster), Name::from(service));
        let expected_members = usize::from(!cluster.is_empty() && is_clean(&cluster))
            + usize::from(!service.is_empty() && is_clean(&service));
        let baggage = Baggage { cluster, service, ..Baggage::default() };
        let written = baggage.to_string();
        prop_assert_eq!(written.split(',').filter(|member| !member.is_empty()).count(), expected_members);
        prop_assert!(written.bytes().all(|c| c.is_ascii_graphic()), "{written}");
        prop_assert!(!written.contains([';', '"', '\\']), "{written}");
    }

    #[test]
    fn traceparent_is_readable_for_ztunnel(text in similar_text()) {
        let traceparent = text.parse().unwrap_or_else(|_| TraceParent::new());
        let header = traceparent.to_header();
        let fields: Vec<_> = header.to_str().unwrap().split('-').map(str::len).collect();
        prop_assert_eq!(fields, [2, 32, 16, 2]);
    }
}

#[test]
fn empty_headers_are_omitted() {
    let headers = RequestHeaders {
        baggage: Some(Baggage::default()),
        forwarded: Some(Forwarded::default()),
        traceparent: None,
        network: None,
    };
    assert!(headers.into_header_map().is_empty());
    assert_eq!(RequestHeaders::read(&HeaderMap::new()), RequestHeaders::default());
}

#[test]
fn invalid_header_does_not_affect_others() {
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
    let mut headers = headers_of(&[
        (TRACEPARENT, trace.into()),
        (BAGGAGE, vec![b'a'; 9000]),
        (FORWARDED, b"for=\"10.0.0.1:2\"".to_vec()),
    ]);
    let read = RequestHeaders::read(&headers);
    assert_eq!(read.traceparent.unwrap().to_string(), trace);
    assert_eq!(read.baggage, None);
    assert_eq!(read.forwarded.unwrap().source(), Some("10.0.0.1:2".parse().unwrap()));
    // Two values are ambiguous, so the parser ignores both.
    headers.append(TRACEPARENT, trace.parse().unwrap());
    assert_eq!(RequestHeaders::read(&headers).traceparent, None);
}
