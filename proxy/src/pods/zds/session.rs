//! The protocol of one ZDS connection, without I/O.
//!
//! ```text
//! proxy                          agent
//! ZdsHello              ──>
//!                       <──      Add (pod, descriptor of its namespace)  ┐ all pods
//!                       <──      Keep (pod, the agent has no descriptor) ┘ of the node
//!                       <──      SnapshotSent: other pods have ended
//!                       <──      Add, Del: changes
//! Ack                   ──>      exactly one per request, before the agent sends the next
//! ```
//!
//! An `Ack` does not name its request. A missing, late or extra `Ack` would be attributed to
//! another request.

use std::collections::{BTreeMap, BTreeSet};

use prost::{DecodeError, Message as _};
use serde_json::json;
use thiserror::Error;
use underpass_config::{PodDns, PodUid, PodUidError};

use crate::pods::facts::{FactsError, PodFacts};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod script;

use crate::pods::zds::messages::{
    Ack, AddWorkload, DelWorkload, KeepWorkload, Payload, Response, V1, WorkloadInfo,
    WorkloadRequest, WorkloadResponse, ZdsHello,
};

/// The maximum length of the reason in a response, in bytes. istio-cni reads at most 1024 bytes.
const MAX_REASON_BYTES: usize = 900;

/// The state of a connection.
#[derive(Debug)]
pub(super) struct Session {
    /// The pods that the agent has named; `None` after the snapshot.
    named: Option<BTreeSet<PodUid>>,
}

/// A valid request. `D` is the descriptor of a namespace.
#[derive(Debug)]
pub(super) enum Command<D> {
    Add {
        facts: Box<PodFacts>,
        namespace: D,
    },
    /// Keeps a pod. Its namespace is unknown, unless an earlier connection passed it.
    Keep(PodUid),
    Remove(PodUid),
    /// Ends the snapshot: pods that are not in it have ended.
    Retain(BTreeSet<PodUid>),
}

/// The reason for rejecting a request.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    #[error("the message is not a WorkloadRequest: the agent may speak another protocol")]
    Malformed(#[source] DecodeError),
    #[error("the kind of request is unknown: the agent may be newer")]
    Unknown,
    #[error("the uid {uid:?} is invalid")]
    Uid { uid: String, source: PodUidError },
    #[error(transparent)]
    Facts(#[from] FactsError),
    #[error("AddWorkload has no workload_info")]
    NoWorkloadInfo,
    #[error("AddWorkload needs one descriptor, the pod's network namespace, and has {0}")]
    Descriptors(usize),
    #[error("only AddWorkload may carry a descriptor")]
    UnexpectedDescriptor,
    #[error("KeepWorkload is not allowed after SnapshotSent")]
    KeepAfterSnapshot,
    #[error("SnapshotSent was received before on this connection")]
    SecondSnapshot,
}

impl RequestError {
    /// Whether later messages cannot be parsed either. After other errors the next request is
    /// independent, because each is one datagram.
    pub(super) fn ends_connection(&self) -> bool {
        matches!(self, Self::Malformed(_))
    }
}

impl Session {
    pub(super) fn new() -> Self {
        Self { named: Some(BTreeSet::new()) }
    }

    /// Whether the agent has sent all pods.
    pub(super) fn has_snapshot(&self) -> bool {
        self.named.is_none()
    }

    /// The state, from which another process continues: the pods that the agent has named before
    /// the end of the snapshot.
    pub(super) fn state(&self) -> String {
        let named = self.named.as_ref();
        let named = named.map(|named| named.iter().map(PodUid::to_string).collect::<Vec<_>>());
        json!(named).to_string()
    }

    /// Continues from a [`state`](Self::state); `None` if it is malformed.
    pub(super) fn resume(state: &str) -> Option<Self> {
        let named: Option<Vec<String>> = serde_json::from_str(state).ok()?;
        let uids = |named: Vec<String>| {
            named.iter().map(|uid| uid.parse().ok()).collect::<Option<BTreeSet<PodUid>>>()
        };
        match named.map(uids) {
            None => Some(Self { named: None }),
            Some(named) => Some(Self { named: Some(named?) }),
        }
    }

    /// Interprets a datagram. Drops, and so closes, the descriptors of a rejected request.
    ///
    /// # Errors
    /// The request is rejected. The snapshot then still contains its pod, so that a
    /// mistake of the agent removes no pod.
    pub(super) fn receive<D>(
        &mut self,
        bytes: &[u8],
        descriptors: Vec<D>,
    ) -> Result<Command<D>, RequestError> {
        let request = WorkloadRequest::decode(bytes).map_err(RequestError::Malformed)?;
        let payload = request.payload.ok_or(RequestError::Unknown)?;
        match payload {
            Payload::Add(add) => self.add(add, descriptors),
            Payload::Keep(keep) => self.keep(keep, &descriptors),
            Payload::Del(del) => self.remove(del, &descriptors),
            Payload::SnapshotSent(_) => self.end_snapshot(&descriptors),
        }
    }

    fn add<D>(
        &mut self,
        add: AddWorkload,
        descriptors: Vec<D>,
    ) -> Result<Command<D>, RequestError> {
        let uid = uid(add.uid)?;
        if let Some(named) = &mut self.named {
            named.insert(uid.clone());
        }
        let [namespace] = <[D; 1]>::try_from(descriptors)
            .map_err(|descriptors| RequestError::Descriptors(descriptors.len()))?;
        let info = add.workload_info.ok_or(RequestError::NoWorkloadInfo)?;
        let facts = Box::new(facts(uid, info));
        facts.check()?;
        Ok(Command::Add { facts, namespace })
    }

    fn keep<D>(&mut self, keep: KeepWorkload, attached: &[D]) -> Result<Command<D>, RequestError> {
        let uid = uid(keep.uid)?;
        self.named.as_mut().ok_or(RequestError::KeepAfterSnapshot)?.insert(uid.clone());
        refuse_descriptors(attached)?;
        Ok(Command::Keep(uid))
    }

    fn remove<D>(&mut self, del: DelWorkload, attached: &[D]) -> Result<Command<D>, RequestError> {
        refuse_descriptors(attached)?;
        let uid = uid(del.uid)?;
        if let Some(named) = &mut self.named {
            named.remove(&uid);
        }
        Ok(Command::Remove(uid))
    }

    fn end_snapshot<D>(&mut self, attached: &[D]) -> Result<Command<D>, RequestError> {
        refuse_descriptors(attached)?;
        self.named.take().map(Command::Retain).ok_or(RequestError::SecondSnapshot)
    }
}

fn uid(text: String) -> Result<PodUid, RequestError> {
    text.parse().map_err(|source| RequestError::Uid { uid: text, source })
}

/// The facts of ZDS. Labels are missing, because the agent has already selected the pods.
fn facts(uid: PodUid, info: WorkloadInfo) -> PodFacts {
    PodFacts {
        uid,
        name: info.name,
        namespace: info.namespace,
        service_account: info.service_account,
        ips: Vec::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        namespace_mode: None,
        probe_ports: None,
        interception: None,
        dns: PodDns::default(),
    }
}

fn refuse_descriptors<D>(attached: &[D]) -> Result<(), RequestError> {
    if attached.is_empty() { Ok(()) } else { Err(RequestError::UnexpectedDescriptor) }
}

/// The first message of the proxy.
pub(super) fn hello() -> Vec<u8> {
    ZdsHello { version: V1 }.encode_to_vec()
}

/// A response: success, or the reason of the failure.
pub(super) fn response(failure: Option<&str>) -> Vec<u8> {
    let error = match failure {
        None => "",
        // The agent would read an empty reason as success.
        Some("") => "unknown error",
        Some(reason) => {
            reason.get(..reason.floor_char_boundary(MAX_REASON_BYTES)).unwrap_or_default()
        }
    };
    let ack = Ack { error: error.to_owned() };
    WorkloadResponse { payload: Some(Response::Ack(ack)) }.encode_to_vec()
}

#[cfg(test)]
mod tests;
