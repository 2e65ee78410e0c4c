//! The message about one pod: a JSON object, with the pod's namespace and listeners attached.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use thiserror::Error;
use underpass_config::InterceptionOverlay;
use underpass_interception::{BoundListener, Namespace};

use crate::pods::facts::PodFacts;
use crate::pods::state::moving::MovedPod;

/// Why a message about a pod cannot be used.
#[derive(Debug, Error)]
pub(super) enum MessageError {
    #[error("the message is not a JSON object")]
    Shape,
    #[error("the message has no valid `{0}`")]
    Field(&'static str),
    #[error("the message has {0} descriptors, which do not fit its listeners")]
    Descriptors(usize),
    #[error("a descriptor is neither a network namespace nor a listener")]
    Descriptor,
}

/// A pod that was received.
#[derive(Debug)]
pub(super) struct ReceivedPod {
    pub(super) facts: PodFacts,
    pub(super) namespace: Namespace,
    /// `None` if the running process does not serve the pod.
    pub(super) listeners: Option<Vec<(String, BoundListener)>>,
    pub(super) has_certificate: bool,
}

/// The object of a pod. Its namespace is attached first, then its listeners.
pub(super) fn encode(pod: &MovedPod, has_certificate: bool) -> String {
    let facts = &pod.facts;
    let listeners = pod.listeners.as_ref().map(|listeners| {
        let names = listeners.iter().map(|(name, _)| *name);
        names.collect::<Vec<_>>()
    });
    json!({
        "uid": facts.uid.to_string(),
        "name": facts.name,
        "namespace": facts.namespace,
        "service_account": facts.service_account,
        "ips": facts.ips,
        "labels": facts.labels,
        "annotations": facts.annotations,
        "namespace_mode": facts.namespace_mode,
        "probe_ports": facts.probe_ports,
        "interception": facts.interception.as_ref().map(ToString::to_string),
        "listeners": listeners,
        "certificate": has_certificate,
    })
    .to_string()
}

/// Reads the object of a pod, and the attached descriptors.
pub(super) fn decode(
    text: &str,
    descriptors: Vec<std::os::fd::OwnedFd>,
) -> Result<ReceivedPod, MessageError> {
    let value: Value = serde_json::from_str(text).map_err(|_| MessageError::Shape)?;
    let object = value.as_object().ok_or(MessageError::Shape)?;
    let facts = facts(object)?;
    let names: Option<Vec<String>> = match object.get("listeners") {
        Some(Value::Null) => None,
        _ => Some(list(object, "listeners", |name| name.as_str().map(str::to_owned))?),
    };
    let count = descriptors.len();
    let mut attached = descriptors.into_iter();
    let namespace = attached.next().ok_or(MessageError::Descriptors(count))?;
    let namespace = Namespace::from_descriptor(namespace).map_err(|_| MessageError::Descriptor)?;
    if attached.len() != names.as_ref().map_or(0, Vec::len) {
        return Err(MessageError::Descriptors(count));
    }
    let listener = |(name, socket)| match BoundListener::try_from(socket) {
        Ok(listener) => Ok((name, listener)),
        Err(_) => Err(MessageError::Descriptor),
    };
    let listeners = names.map(|names| names.into_iter().zip(attached).map(listener).collect());
    let has_certificate = object.get("certificate").and_then(Value::as_bool);
    Ok(ReceivedPod {
        facts,
        namespace,
        listeners: listeners.transpose()?,
        has_certificate: has_certificate.ok_or(MessageError::Field("certificate"))?,
    })
}

fn facts(object: &Map<String, Value>) -> Result<PodFacts, MessageError> {
    let interception = match object.get("interception") {
        Some(Value::Null) => None,
        _ => {
            let overlay = InterceptionOverlay::parse("taken over", text(object, "interception")?);
            Some(overlay.map_err(|_| MessageError::Field("interception"))?)
        }
    };
    Ok(PodFacts {
        uid: text(object, "uid")?.parse().map_err(|_| MessageError::Field("uid"))?,
        name: text(object, "name")?.to_owned(),
        namespace: text(object, "namespace")?.to_owned(),
        service_account: text(object, "service_account")?.to_owned(),
        ips: list(object, "ips", |ip| ip.as_str()?.parse().ok())?,
        labels: string_map(object, "labels")?,
        annotations: string_map(object, "annotations")?,
        namespace_mode: match object.get("namespace_mode") {
            Some(Value::Null) => None,
            _ => Some(text(object, "namespace_mode")?.to_owned()),
        },
        probe_ports: match object.get("probe_ports") {
            Some(Value::Null) => None,
            _ => Some(list(object, "probe_ports", port)?.into_iter().collect()),
        },
        interception,
    })
}

fn port(value: &Value) -> Option<u16> {
    value.as_u64()?.try_into().ok()
}

fn text<'a>(object: &'a Map<String, Value>, key: &'static str) -> Result<&'a str, MessageError> {
    object.get(key).and_then(Value::as_str).ok_or(MessageError::Field(key))
}

fn list<T>(
    object: &Map<String, Value>,
    key: &'static str,
    item: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<T>, MessageError> {
    let items = object.get(key).and_then(Value::as_array).ok_or(MessageError::Field(key))?;
    items.iter().map(item).collect::<Option<_>>().ok_or(MessageError::Field(key))
}

fn string_map(
    object: &Map<String, Value>,
    key: &'static str,
) -> Result<BTreeMap<String, String>, MessageError> {
    let entries = object.get(key).and_then(Value::as_object).ok_or(MessageError::Field(key))?;
    let entry = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
    entries.iter().map(entry).collect::<Option<_>>().ok_or(MessageError::Field(key))
}
