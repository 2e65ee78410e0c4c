//! Tests of the messages between plugin and daemon.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use underpass_config::DnsPolicy;

use super::*;

/// The maximum length of a line of a connection (`Handover`), without the line break.
const LONGEST_LINE: usize = 4095;

fn attachment() -> impl Strategy<Value = Attachment> {
    ("[a-zA-Z0-9][a-zA-Z0-9_.-]{0,199}", "[a-z][a-z0-9.-]{0,14}")
        .prop_map(|(container, interface)| Attachment::new(&container, &interface).unwrap())
}

fn network() -> impl Strategy<Value = NetworkName> {
    "[a-z][a-z0-9_.-]{0,252}".prop_map(|name| NetworkName::new(&name).unwrap())
}

fn pod() -> impl Strategy<Value = Box<AttachedPod>> {
    let reference = ("[!-.0-~]{1,253}", "[!-.0-~]{1,253}", "[!-.0-~]{1,253}")
        .prop_map(|(namespace, name, uid)| PodReference::new(&namespace, &name, &uid).unwrap());
    let path = "/[ -~]{0,200}";
    let addresses = vec(any::<IpAddr>(), 0..=MAX_ADDRESSES);
    (attachment(), network(), reference, addresses, path, option::of(dns())).prop_map(
        |(attachment, network, pod, addresses, namespace_path, dns)| {
            Box::new(AttachedPod { attachment, network, pod, addresses, namespace_path, dns })
        },
    )
}

fn dns() -> impl Strategy<Value = PodDns> {
    let words = || vec("[a-z0-9._:-]{1,61}", 0..=4);
    (vec(any::<IpAddr>(), 1..=MAX_NAME_SERVERS), words(), words()).prop_map(
        |(nameservers, search, options)| {
            let policy = DnsPolicy::None;
            PodDns { policy, nameservers, search, options }
        },
    )
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        pod().prop_map(Request::Add),
        pod().prop_map(Request::Check),
        attachment().prop_map(Request::Delete),
        Just(Request::Status),
        (network(), vec(attachment(), 0..=ATTACHMENTS_PER_LINE), any::<bool>())
            .prop_map(|(network, valid, last)| Request::Collect { network, valid, last }),
    ]
}

proptest! {
    #[test]
    fn requests_are_unchanged_by_encoding_and_decoding(request in request()) {
        let line = request.encode();
        prop_assert!(line.len() <= LONGEST_LINE && !line.contains('\n'), "{} bytes", line.len());
        prop_assert_eq!(Request::decode(&line).unwrap(), request);
    }

    #[test]
    fn refusals_are_unchanged_by_encoding_and_decoding(code in any::<u32>(), message in ".{0,3000}", hint in ".{0,3000}") {
        let line = Answer::Refused(Refusal { code, message: message.clone(), hint }).encode();
        prop_assert!(line.len() <= LONGEST_LINE && !line.contains('\n'), "{} bytes", line.len());
        let Answer::Refused(decoded) = Answer::decode(&line).unwrap() else {
            panic!("not a refusal");
        };
        prop_assert_eq!(decoded.code, code);
        prop_assert!(decoded.message == printable(&message));
    }

    #[test]
    fn malformed_lines_are_errors_and_never_panic(line in ".{0,300}") {
        prop_assert!(Request::decode(&line).is_err());
        prop_assert!(Answer::decode(&line).is_err());
    }

    /// Replacing a value of a message gives an error or another message, never a panic.
    #[test]
    fn changed_messages_never_panic(request in request(), key in 0..8usize, value in ".{0,20}") {
        let mut message: Map<String, Value> = serde_json::from_str(&request.encode()).unwrap();
        let keys: Vec<_> = message.keys().cloned().collect();
        message.insert(keys[key % keys.len()].clone(), Value::String(value));
        let line = Value::Object(message).to_string();
        check_line(line.as_bytes());
    }
}

#[test]
fn malformed_request_field_is_named_in_the_error() {
    for (line, error) in [
        ("", "the message is not JSON"),
        ("[]", "the message is not an object"),
        ("{}", "the message has version null instead of 1"),
        (r#"{"version":2,"command":"status"}"#, "the message has version 2 instead of 1"),
        (r#"{"version":1}"#, "the message has no valid `command`"),
        (r#"{"version":1,"command":"drop"}"#, r#"the message has no command "drop""#),
        (r#"{"version":1,"command":"delete"}"#, "the message has no valid `container`"),
        (
            r#"{"version":1,"command":"delete","container":"../a","interface":"eth0"}"#,
            r#""../a" is not a container id: 1 to 200 letters, digits, `_`, `.` and `-`, a letter or digit first"#,
        ),
        (
            r#"{"version":1,"command":"collect","network":"n","valid":[["a"]],"last":true}"#,
            "the message has no valid `valid`",
        ),
    ] {
        assert_eq!(Request::decode(line).unwrap_err().to_string(), error, "{line}");
    }
}

#[test]
fn message_with_too_many_addresses_or_a_long_search_path_is_refused() {
    let pod = AttachedPod {
        attachment: Attachment::new("c", "eth0").unwrap(),
        network: NetworkName::new("n").unwrap(),
        pod: PodReference::new("default", "web", "u").unwrap(),
        addresses: vec![IpAddr::from([10, 0, 0, 1]); MAX_ADDRESSES + 1],
        namespace_path: "/run/netns/a".to_owned(),
        dns: None,
    };
    let error = |pod: &AttachedPod| {
        let request = Request::Add(Box::new(pod.clone()));
        Request::decode(&request.encode()).unwrap_err().to_string()
    };
    assert_eq!(error(&pod), "the message has no valid `addresses`");
    let dns = PodDns { search: vec!["a".repeat(MAX_DNS_BYTES)], ..PodDns::default() };
    let pod = AttachedPod { addresses: Vec::new(), dns: Some(dns), ..pod };
    assert_eq!(error(&pod), "the message has no valid `dns`");
}

#[test]
fn success_and_refusal_have_distinct_encodings() {
    assert_eq!(Answer::decode(&Answer::Done.encode()).unwrap(), Answer::Done);
    assert_eq!(Answer::Done.encode(), r#"{"done":true,"version":1}"#);
    Answer::decode(r#"{"version":1,"done":false}"#).unwrap_err();
    Answer::decode(r#"{"version":1,"code":-1,"message":"","hint":""}"#).unwrap_err();
}
