//! The messages of Istio's authorization policies (`istio.security`), and the fields of each, so
//! that a field of a later version is detected. Written by hand with the field numbers of the
//! protocol.

use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, decode_key, decode_varint, skip_field};
use prost::{Message, Oneof};

/// The message `Authorization`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Authorization {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) namespace: String,
    #[prost(int32, tag = "3")]
    pub(super) scope: i32,
    #[prost(int32, tag = "4")]
    pub(super) action: i32,
    #[prost(message, repeated, tag = "5")]
    pub(super) groups: Vec<Group>,
    #[prost(bool, tag = "6")]
    pub(super) dry_run: bool,
}

/// The message `Group`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Group {
    #[prost(message, repeated, tag = "1")]
    pub(super) rules: Vec<Rules>,
}

/// The message `Rules`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Rules {
    #[prost(message, repeated, tag = "2")]
    pub(super) matches: Vec<Match>,
}

/// The message `Match`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Match {
    #[prost(message, repeated, tag = "1")]
    pub(super) namespaces: Vec<StringMatch>,
    #[prost(message, repeated, tag = "2")]
    pub(super) not_namespaces: Vec<StringMatch>,
    #[prost(message, repeated, tag = "3")]
    pub(super) principals: Vec<StringMatch>,
    #[prost(message, repeated, tag = "4")]
    pub(super) not_principals: Vec<StringMatch>,
    #[prost(message, repeated, tag = "5")]
    pub(super) source_ips: Vec<Range>,
    #[prost(message, repeated, tag = "6")]
    pub(super) not_source_ips: Vec<Range>,
    #[prost(message, repeated, tag = "7")]
    pub(super) destination_ips: Vec<Range>,
    #[prost(message, repeated, tag = "8")]
    pub(super) not_destination_ips: Vec<Range>,
    #[prost(uint32, repeated, tag = "9")]
    pub(super) destination_ports: Vec<u32>,
    #[prost(uint32, repeated, tag = "10")]
    pub(super) not_destination_ports: Vec<u32>,
    #[prost(message, repeated, tag = "11")]
    pub(super) service_accounts: Vec<ServiceAccountMatch>,
    #[prost(message, repeated, tag = "12")]
    pub(super) not_service_accounts: Vec<ServiceAccountMatch>,
}

/// `Address`: a range.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Range {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) address: Bytes,
    #[prost(uint32, tag = "2")]
    pub(super) length: u32,
}

/// The message `ServiceAccountMatch`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ServiceAccountMatch {
    #[prost(string, tag = "1")]
    pub(super) namespace: String,
    #[prost(string, tag = "2")]
    pub(super) service_account: String,
}

/// The message `StringMatch`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct StringMatch {
    #[prost(oneof = "MatchType", tags = "1, 2, 3, 4")]
    pub(super) kind: Option<MatchType>,
}

/// The choices `MatchType`.
#[derive(Clone, PartialEq, Oneof)]
pub(super) enum MatchType {
    #[prost(string, tag = "1")]
    Exact(String),
    #[prost(string, tag = "2")]
    Prefix(String),
    #[prost(string, tag = "3")]
    Suffix(String),
    #[prost(message, tag = "4")]
    Presence(Empty),
}

/// `google.protobuf.Empty`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Empty {}

/// The fields of a message: number, and the message that it contains.
struct Fields(&'static [(u32, Option<&'static Self>)]);

const EMPTY: Fields = Fields(&[]);
const STRING_MATCH: Fields = Fields(&[(1, None), (2, None), (3, None), (4, Some(&EMPTY))]);
const PAIR: Fields = Fields(&[(1, None), (2, None)]);
/// Without the extensions (13), which may narrow a match.
const MATCH: Fields = Fields(&[
    (1, Some(&STRING_MATCH)),
    (2, Some(&STRING_MATCH)),
    (3, Some(&STRING_MATCH)),
    (4, Some(&STRING_MATCH)),
    (5, Some(&PAIR)),
    (6, Some(&PAIR)),
    (7, Some(&PAIR)),
    (8, Some(&PAIR)),
    (9, None),
    (10, None),
    (11, Some(&PAIR)),
    (12, Some(&PAIR)),
]);
const RULES: Fields = Fields(&[(2, Some(&MATCH))]);
const GROUP: Fields = Fields(&[(1, Some(&RULES))]);
/// With the extensions (7), which have no effect here.
const AUTHORIZATION: Fields =
    Fields(&[(1, None), (2, None), (3, None), (4, None), (5, Some(&GROUP)), (6, None), (7, None)]);

/// The number of the first field that this version does not know and [`Message::decode`] skips: it
/// may narrow the matches of the policy. `policy` must be a valid message.
pub(super) fn unknown_field(policy: &[u8]) -> Option<u32> {
    unknown_in(policy, &AUTHORIZATION)
}

fn unknown_in(mut message: &[u8], fields: &Fields) -> Option<u32> {
    while message.has_remaining() {
        let (number, wire_type) = decode_key(&mut message).ok()?;
        let Some((_, nested)) = fields.0.iter().find(|(known, _)| *known == number) else {
            return Some(number);
        };
        match nested {
            Some(nested) => {
                let length = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
                let (content, rest) = message.split_at_checked(length)?;
                if let Some(unknown) = unknown_in(content, nested) {
                    return Some(unknown);
                }
                message = rest;
            }
            None => {
                skip_field(wire_type, number, &mut message, DecodeContext::default()).ok()?;
            }
        }
    }
    None
}
