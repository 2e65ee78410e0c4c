//! The messages between the CNI plugin and the daemon: JSON objects, one on each line.
//!
//! ```text
//! plugin → daemon  {"version":1,"command":"add","container":"9f…",…}  + descriptor
//! daemon → plugin  {"version":1,"done":true}
//!                  {"version":1,"code":11,"message":"…","hint":"…"}
//! ```
//!
//! Each request has one answer. The version comes first, and both sides refuse any other version:
//! plugin and daemon are the same binary, except during an upgrade.
//! The descriptor of `add` and `check` is the pod's network namespace (`SCM_RIGHTS`, unix(7)).
//! The daemon's store contains the same objects.

use std::net::IpAddr;

use serde::Deserialize as _;
use serde_json::{Map, Value, json};
use thiserror::Error;
use underpass_config::{MAX_NAME_SERVERS, PodDns};

use super::attachment::{AttachedPod, Attachment, InvalidName, NetworkName, PodReference};
use crate::pods::facts::PodFacts;
use crate::pods::facts::wire::{InvalidFact, WireDns, WireFacts};

const VERSION: u64 = 1;
/// The maximum number of addresses of a pod.
const MAX_ADDRESSES: usize = 16;
/// In bytes, for the path of a namespace, so that a message fits its line.
const MAX_PATH_BYTES: usize = 1024;
/// In bytes, for the texts of a refusal, so that a message fits its line.
const MAX_TEXT_BYTES: usize = 900;
/// In bytes, for the search path and the options of a resolver, so that a message fits its line.
const MAX_DNS_BYTES: usize = 512;
/// The number of attachments that fit one line, whatever their length.
pub(crate) const ATTACHMENTS_PER_LINE: usize = 12;

/// A request of the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// Enrols the pod whose namespace is the descriptor.
    Add(Box<AttachedPod>),
    /// Verifies the listeners and the rules of a pod.
    Check(Box<AttachedPod>),
    /// Removes an attachment. Succeeds also if it is unknown.
    Delete(Attachment),
    /// Asks whether pods can be added.
    Status,
    /// Removes the attachments of a network that are not listed. A long list has several messages.
    Collect {
        network: NetworkName,
        /// The attachments that are kept.
        valid: Vec<Attachment>,
        /// Whether this message ends the list.
        last: bool,
    },
}

/// The daemon's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Refused(Refusal),
}

/// A CNI error with its code and a hint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: u32,
    pub(crate) message: String,
    pub(crate) hint: String,
}

/// Error codes: up to 99 from CNI's specification, above that our own.
pub(crate) mod code {
    pub(crate) const UNKNOWN_CONTAINER: u32 = 3;
    /// A temporary failure: the runtime retries.
    pub(crate) const TRY_AGAIN: u32 = 11;
    /// The daemon cannot add pods at present.
    pub(crate) const NOT_READY: u32 = 50;
    /// `CHECK` failed: the pod's listeners or rules are wrong.
    pub(crate) const CHECK_FAILED: u32 = 100;
    /// The network namespace cannot be a pod's.
    pub(crate) const INVALID_NAMESPACE: u32 = 101;
}

/// A pod in the daemon's store, with the identity of its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredPod {
    pub(crate) pod: AttachedPod,
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// The last facts about it; `None` if they were never known.
    pub(crate) facts: Option<PodFacts>,
}

/// A message that does not follow the protocol.
#[derive(Debug, Error)]
pub(crate) enum ProtocolError {
    #[error("the message is not JSON")]
    Json(#[from] serde_json::Error),
    #[error("the message is not an object")]
    Shape,
    #[error("the message has version {0} instead of {VERSION}")]
    Version(Value),
    #[error("the message has no command {0:?}")]
    Command(String),
    #[error("the message has no valid `{0}`")]
    Field(&'static str),
    #[error(transparent)]
    Name(#[from] InvalidName),
    #[error(transparent)]
    Facts(#[from] InvalidFact),
}

impl Request {
    pub(crate) fn encode(&self) -> String {
        let mut message = match self {
            Self::Add(pod) => encode_pod("add", pod),
            Self::Check(pod) => encode_pod("check", pod),
            Self::Delete(attachment) => json!({
                "command": "delete",
                "container": attachment.container(),
                "interface": attachment.interface(),
            }),
            Self::Status => json!({ "command": "status" }),
            Self::Collect { network, valid, last } => {
                let valid = valid.iter().map(|one| json!([one.container(), one.interface()]));
                let valid: Vec<_> = valid.collect();
                json!({
                    "command": "collect", "network": network.as_str(), "valid": valid, "last": last,
                })
            }
        };
        add_version(&mut message);
        message.to_string()
    }

    pub(crate) fn decode(line: &str) -> Result<Self, ProtocolError> {
        let message = decode_object(line)?;
        match text(&message, "command")? {
            "add" => Ok(Self::Add(Box::new(decode_pod(&message)?))),
            "check" => Ok(Self::Check(Box::new(decode_pod(&message)?))),
            "delete" => Ok(Self::Delete(decode_attachment(&message)?)),
            "status" => Ok(Self::Status),
            "collect" => Ok(Self::Collect {
                network: NetworkName::new(text(&message, "network")?)?,
                valid: decode_valid(&message)?,
                last: message
                    .get("last")
                    .and_then(Value::as_bool)
                    .ok_or(ProtocolError::Field("last"))?,
            }),
            other => Err(ProtocolError::Command(other.to_owned())),
        }
    }
}

impl Answer {
    pub(crate) fn encode(&self) -> String {
        let mut message = match self {
            Self::Done => json!({ "done": true }),
            Self::Refused(Refusal { code, message, hint }) => {
                json!({ "code": code, "message": printable(message), "hint": printable(hint) })
            }
        };
        add_version(&mut message);
        message.to_string()
    }

    pub(crate) fn decode(line: &str) -> Result<Self, ProtocolError> {
        let message = decode_object(line)?;
        if message.get("done") == Some(&Value::Bool(true)) {
            return Ok(Self::Done);
        }
        let code =
            message.get("code").and_then(Value::as_u64).and_then(|code| code.try_into().ok());
        Ok(Self::Refused(Refusal {
            code: code.ok_or(ProtocolError::Field("code"))?,
            message: text(&message, "message")?.to_owned(),
            hint: text(&message, "hint")?.to_owned(),
        }))
    }
}

impl StoredPod {
    pub(crate) fn encode(&self) -> String {
        let Self { pod, device, inode, facts } = self;
        let mut stored = encode_pod("stored", pod);
        if let Some(stored) = stored.as_object_mut() {
            stored.insert("device".to_owned(), (*device).into());
            stored.insert("inode".to_owned(), (*inode).into());
            stored.insert("facts".to_owned(), json!(facts.as_ref().map(WireFacts::from)));
        }
        add_version(&mut stored);
        stored.to_string()
    }

    pub(crate) fn decode(text: &str) -> Result<Self, ProtocolError> {
        let stored = decode_object(text)?;
        let number = |key: &'static str| {
            stored.get(key).and_then(Value::as_u64).ok_or(ProtocolError::Field(key))
        };
        let (device, inode) = (number("device")?, number("inode")?);
        let facts = stored.get("facts").cloned().unwrap_or_default();
        let facts = Option::<WireFacts>::deserialize(facts)?.map(PodFacts::try_from).transpose()?;
        Ok(Self { pod: decode_pod(&stored)?, device, inode, facts })
    }
}

fn add_version(message: &mut Value) {
    if let Some(message) = message.as_object_mut() {
        message.insert("version".to_owned(), VERSION.into());
    }
}

fn encode_pod(command: &str, pod: &AttachedPod) -> Value {
    let AttachedPod { attachment, network, pod, addresses, namespace_path, dns } = pod;
    json!({
        "command": command,
        "container": attachment.container(),
        "interface": attachment.interface(),
        "network": network.as_str(),
        "pod": { "namespace": pod.namespace, "name": pod.name, "uid": pod.uid.as_str() },
        "addresses": addresses,
        "namespace_path": namespace_path,
        "dns": dns.clone().map(WireDns::from),
    })
}

fn decode_object(line: &str) -> Result<Map<String, Value>, ProtocolError> {
    let Value::Object(message) = serde_json::from_str(line)? else {
        return Err(ProtocolError::Shape);
    };
    match message.get("version") {
        Some(version) if version.as_u64() == Some(VERSION) => Ok(message),
        other => Err(ProtocolError::Version(other.cloned().unwrap_or_default())),
    }
}

fn decode_attachment(message: &Map<String, Value>) -> Result<Attachment, ProtocolError> {
    Ok(Attachment::new(text(message, "container")?, text(message, "interface")?)?)
}

fn decode_pod(message: &Map<String, Value>) -> Result<AttachedPod, ProtocolError> {
    let pod = message.get("pod").and_then(Value::as_object).ok_or(ProtocolError::Field("pod"))?;
    let path = text(message, "namespace_path")?;
    if path.len() > MAX_PATH_BYTES {
        return Err(ProtocolError::Field("namespace_path"));
    }
    Ok(AttachedPod {
        attachment: decode_attachment(message)?,
        network: NetworkName::new(text(message, "network")?)?,
        pod: PodReference::new(text(pod, "namespace")?, text(pod, "name")?, text(pod, "uid")?)?,
        addresses: decode_addresses(message)?,
        namespace_path: path.to_owned(),
        dns: decode_dns(message)?,
    })
}

fn decode_dns(message: &Map<String, Value>) -> Result<Option<PodDns>, ProtocolError> {
    let dns = message.get("dns").cloned().unwrap_or_default();
    let dns = Option::<WireDns>::deserialize(dns)?.map(PodDns::try_from).transpose()?;
    match dns {
        Some(dns) if !dns_fits_line(&dns) => Err(ProtocolError::Field("dns")),
        dns => Ok(dns),
    }
}

/// Whether resolver settings fit a message.
pub(crate) fn dns_fits_line(dns: &PodDns) -> bool {
    let words = dns.search.iter().chain(&dns.options);
    // With quotes and a comma.
    let bytes: usize = words.map(|word| word.len() + 3).sum();
    dns.nameservers.len() <= MAX_NAME_SERVERS && bytes <= MAX_DNS_BYTES
}

fn decode_addresses(message: &Map<String, Value>) -> Result<Vec<IpAddr>, ProtocolError> {
    let invalid = || ProtocolError::Field("addresses");
    let addresses = list(message, "addresses", MAX_ADDRESSES)?;
    let address = |value: &Value| value.as_str()?.parse().ok();
    addresses.iter().map(|value| address(value).ok_or_else(invalid)).collect()
}

fn decode_valid(message: &Map<String, Value>) -> Result<Vec<Attachment>, ProtocolError> {
    let names = |value: &Value| match value.as_array().map(Vec::as_slice) {
        Some([Value::String(container), Value::String(interface)]) => {
            Ok(Attachment::new(container, interface)?)
        }
        _ => Err(ProtocolError::Field("valid")),
    };
    list(message, "valid", ATTACHMENTS_PER_LINE)?.iter().map(names).collect()
}

fn list<'a>(
    message: &'a Map<String, Value>,
    key: &'static str,
    longest: usize,
) -> Result<&'a [Value], ProtocolError> {
    let list = message.get(key).and_then(Value::as_array).filter(|list| list.len() <= longest);
    list.map(Vec::as_slice).ok_or(ProtocolError::Field(key))
}

fn text<'a>(message: &'a Map<String, Value>, key: &'static str) -> Result<&'a str, ProtocolError> {
    message.get(key).and_then(Value::as_str).ok_or(ProtocolError::Field(key))
}

/// Decodes a line, and panics if the message changes when it is encoded and decoded again.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn check_line(line: &[u8]) {
    let Ok(line) = std::str::from_utf8(line) else { return };
    if let Ok(request) = Request::decode(line) {
        assert_eq!(Request::decode(&request.encode()).ok(), Some(request));
    }
    if let Ok(answer) = Answer::decode(line) {
        // Encoding shortens texts.
        let line = answer.encode();
        assert_eq!(Answer::decode(&line).ok().map(|again| again.encode()), Some(line));
    }
    if let Ok(stored) = StoredPod::decode(line) {
        assert_eq!(StoredPod::decode(&stored.encode()).ok().as_ref(), Some(&stored));
    }
}

/// The text without control characters, cut to the length that fits a message.
fn printable(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.get(..text.floor_char_boundary(MAX_TEXT_BYTES)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
