//! The body of the fuzz target and the property test: interprets bytes as requests of an agent, and
//! compares the session with a model.
//!
//! A script is a list of steps: one octet each for the request, the pod and the number of
//! descriptors. A step can also be an arbitrary message, whose length is its first octet.

use std::collections::BTreeSet;

use prost::Message as _;
use underpass_config::PodUid;

use super::{Command, RequestError, Session};
use crate::pods::zds::messages::{
    AddWorkload, DelWorkload, KeepWorkload, Payload, SnapshotSent, WorkloadInfo, WorkloadRequest,
};

/// Runs `script`. Panics if the session differs from the model.
pub(crate) fn run(script: &[u8]) {
    let mut model = Model { session: Session::new(), named: Some(BTreeSet::new()) };
    let mut rest = script;
    while let [kind, pod, count, after @ ..] = rest {
        rest = after;
        // Pods 0 to 6 are valid; pod 7 is not.
        let pod = if pod % 8 == 7 { "a/b".to_owned() } else { format!("pod-{}", pod % 8) };
        let count = usize::from(count % 3);
        match kind % 6 {
            0 | 1 => model.add(&pod, count),
            2 => model.keep(&pod, count),
            3 => model.remove(&pod, count),
            4 => model.end_snapshot(count),
            _ => {
                let (message, after) = rest.split_at(usize::from(*kind).min(rest.len()));
                rest = after;
                arbitrary(message, count);
            }
        }
    }
}

/// The session, and the pods that it should have recorded.
struct Model {
    session: Session,
    named: Option<BTreeSet<PodUid>>,
}

impl Model {
    fn receive(&mut self, bytes: &[u8], count: usize) -> Result<Command<()>, RequestError> {
        self.session.receive(bytes, vec![(); count])
    }

    fn name(&mut self, uid: &str) {
        if let (Ok(uid), Some(named)) = (uid.parse(), &mut self.named) {
            named.insert(uid);
        }
    }

    fn add(&mut self, uid: &str, count: usize) {
        self.name(uid);
        let result = self.receive(&add(uid), count);
        assert_eq!(result.is_ok(), count == 1 && uid.parse::<PodUid>().is_ok(), "{result:?}");
    }

    fn keep(&mut self, uid: &str, count: usize) {
        self.name(uid);
        let allowed = count == 0 && self.named.is_some() && uid.parse::<PodUid>().is_ok();
        let result = self.receive(&keep(uid), count);
        assert_eq!(result.is_ok(), allowed, "{result:?}");
    }

    fn remove(&mut self, uid: &str, count: usize) {
        let result = self.receive(&del(uid), count);
        let parsed = uid.parse::<PodUid>();
        assert_eq!(result.is_ok(), count == 0 && parsed.is_ok(), "{result:?}");
        if let (Ok(_), Ok(uid), Some(named)) = (result, parsed, &mut self.named) {
            named.remove(&uid);
        }
    }

    fn end_snapshot(&mut self, count: usize) {
        let result = self.receive(&snapshot_sent(), count);
        let expected = if count == 0 { self.named.take() } else { None };
        assert_eq!(result.is_ok(), expected.is_some(), "{result:?}");
        if let (Ok(Command::Retain(named)), Some(expected)) = (result, expected) {
            assert_eq!(named, expected);
        }
    }
}

/// Sends any message. Only a message with exactly one descriptor may add a pod.
fn arbitrary(message: &[u8], count: usize) {
    if let Ok(Command::Add { facts, .. }) = Session::new().receive(message, vec![(); count]) {
        assert_eq!(count, 1, "{facts:?}");
        assert_eq!(facts.check(), Ok(()), "only possible pods are added");
    }
}

pub(in crate::pods::zds) fn encode(payload: Payload) -> Vec<u8> {
    WorkloadRequest { payload: Some(payload) }.encode_to_vec()
}

pub(in crate::pods::zds) fn info() -> WorkloadInfo {
    WorkloadInfo {
        name: "web-1".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "web".to_owned(),
    }
}

pub(in crate::pods::zds) fn add(uid: &str) -> Vec<u8> {
    encode(Payload::Add(AddWorkload { uid: uid.to_owned(), workload_info: Some(info()) }))
}

pub(in crate::pods::zds) fn keep(uid: &str) -> Vec<u8> {
    encode(Payload::Keep(KeepWorkload { uid: uid.to_owned() }))
}

pub(in crate::pods::zds) fn del(uid: &str) -> Vec<u8> {
    encode(Payload::Del(DelWorkload { uid: uid.to_owned() }))
}

pub(in crate::pods::zds) fn snapshot_sent() -> Vec<u8> {
    encode(Payload::SnapshotSent(SnapshotSent {}))
}
