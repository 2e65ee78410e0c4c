//! The message about one pod: a JSON object, with the pod's namespace and listeners attached.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use underpass_interception::{BoundListener, Namespace};

use crate::pods::facts::PodFacts;
use crate::pods::facts::wire::{InvalidFact, WireFacts};
use crate::pods::state::moving::MovedPod;

/// Why a message about a pod cannot be used.
#[derive(Debug, Error)]
pub(super) enum MessageError {
    #[error("the message does not describe a pod")]
    Json(#[from] serde_json::Error),
    #[error("the message is invalid")]
    Facts(#[from] InvalidFact),
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

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    facts: WireFacts,
    /// The names of the attached listeners; `None` for a pod that is not served.
    listeners: Option<Vec<String>>,
    has_certificate: bool,
}

/// The object of a pod. Its namespace is attached first, then its listeners.
pub(super) fn encode(pod: &MovedPod, has_certificate: bool) -> serde_json::Result<String> {
    let names = pod.listeners.as_ref().map(|listeners| {
        let names = listeners.iter().map(|(name, _)| (*name).to_owned());
        names.collect()
    });
    let facts = WireFacts::from(&*pod.facts);
    serde_json::to_string(&Message { facts, listeners: names, has_certificate })
}

/// Reads the object of a pod, and the attached descriptors.
pub(super) fn decode(text: &str, descriptors: Vec<OwnedFd>) -> Result<ReceivedPod, MessageError> {
    let Message { facts, listeners, has_certificate } = serde_json::from_str(text)?;
    let count = descriptors.len();
    let mut attached = descriptors.into_iter();
    let namespace = attached.next().ok_or(MessageError::Descriptors(count))?;
    let namespace = Namespace::from_descriptor(namespace).map_err(|_| MessageError::Descriptor)?;
    if attached.len() != listeners.as_ref().map_or(0, Vec::len) {
        return Err(MessageError::Descriptors(count));
    }
    let listener = |(name, socket)| match BoundListener::try_from(socket) {
        Ok(listener) => Ok((name, listener)),
        Err(_) => Err(MessageError::Descriptor),
    };
    let listeners = listeners.map(|names| names.into_iter().zip(attached).map(listener).collect());
    let (facts, listeners) = (facts.try_into()?, listeners.transpose()?);
    Ok(ReceivedPod { facts, namespace, listeners, has_certificate })
}
