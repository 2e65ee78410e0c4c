//! The attachments of the node: which pod each belongs to, and what a call changes.
//!
//! A pod is in the registry as long as it has an attachment. The store has the attachments whose
//! addition has been answered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use underpass_config::{Hint as _, PodUid};
use underpass_interception::{Namespace, NamespaceId};

use super::attachment::{AttachedPod, Attachment, NetworkName};
use super::facts::{FactFinder, FactProblem};
use super::namespace_file::OpenNamespace;
use super::protocol::{Refusal, StoredPod, code};
use super::store::Store;
use crate::error::chain;
use crate::pods::enrolment::EnrolError;
use crate::pods::registry::{PodRegistry, Removal};
use crate::pods::status::PodState;

/// The attachments of the node.
#[derive(Debug)]
pub(super) struct Ledger {
    registry: PodRegistry,
    facts: FactFinder,
    store: Store,
    open: OpenNamespace,
    /// Never locked across an await.
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    entries: BTreeMap<Attachment, Entry>,
    next_call: u64,
}

/// An attachment.
#[derive(Debug)]
struct Entry {
    /// The addition that made it. A later one of the same attachment takes it over.
    call: u64,
    progress: Progress,
    uid: PodUid,
    network: NetworkName,
    namespace: NamespaceId,
    /// The namespace's file; `None` if this process cannot see it.
    path: Option<Box<Path>>,
}

/// How far an attachment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// The plugin waits for its answer.
    Adding,
    /// Stored.
    Enrolled,
}

/// The remedy for a namespace that this process cannot see.
const MOUNT_HINT: &str = "mount the runtime's folder of namespaces, such as /run/netns, with HostToContainer propagation";

/// A successful addition, which is undone unless the plugin gets the answer.
#[derive(Debug)]
#[must_use]
pub(super) struct Addition<'a> {
    ledger: &'a Ledger,
    /// `None` for an exempt pod, and once it is kept.
    undo: Option<(Attachment, u64)>,
}

impl Addition<'_> {
    /// Keeps the pod enrolled.
    pub(super) fn keep(mut self) {
        self.undo = None;
    }
}

impl Drop for Addition<'_> {
    fn drop(&mut self) {
        if let Some((attachment, call)) = self.undo.take() {
            self.ledger.undo(&attachment, call);
        }
    }
}

impl Ledger {
    pub(super) fn new(
        registry: PodRegistry,
        facts: FactFinder,
        store: Store,
        open: OpenNamespace,
    ) -> Self {
        Self { registry, facts, store, open, known: Mutex::default() }
    }

    /// Enrols a pod. Returns once it is served. Undone if the future or its result is dropped.
    pub(super) async fn add(
        &self,
        pod: AttachedPod,
        namespace: Namespace,
    ) -> Result<Addition<'_>, Refusal> {
        if self.facts.is_exempt(&pod.pod) {
            let pod = format!("{}/{}", pod.pod.namespace, pod.pod.name);
            tracing::info!(pod, "pod left alone: node.exempt_namespaces has its namespace");
            return Ok(Addition { ledger: self, undo: None });
        }
        let facts = self.facts.find(&pod).map_err(Refusal::from)?;
        let call = self.begin(&pod, namespace.id(), Progress::Adding);
        let addition = Addition { ledger: self, undo: Some((pod.attachment.clone(), call)) };
        let enrolment = self.registry.add(facts, namespace.clone());
        enrolment.first_outcome().await.map_err(|error| Refusal::from(&error))?;
        self.complete(&pod, namespace.id(), call)?;
        Ok(addition)
    }

    fn begin(&self, pod: &AttachedPod, namespace: NamespaceId, progress: Progress) -> u64 {
        let path = Path::new(&pod.namespace_path);
        let path = leads_to(path, namespace).then(|| path.into());
        if path.is_none() {
            tracing::warn!(
                path = pod.namespace_path, attachment = %pod.attachment, hint = MOUNT_HINT,
                "the daemon cannot see a pod's namespace: it cannot enrol the pod again after a restart"
            );
        }
        let (uid, network) = (pod.pod.uid.clone(), pod.network.clone());
        let mut known = self.known();
        let call = known.next_call;
        known.next_call += 1;
        let entry = Entry { call, progress, uid, network, namespace, path };
        known.entries.insert(pod.attachment.clone(), entry);
        call
    }

    /// Stores a pod that is served.
    fn complete(
        &self,
        pod: &AttachedPod,
        namespace: NamespaceId,
        call: u64,
    ) -> Result<(), Refusal> {
        let mut known = self.known();
        let Some(entry) = known.entries.get_mut(&pod.attachment).filter(|entry| entry.call == call)
        else {
            return Err(Refusal::from(&EnrolError::Removed));
        };
        self.store.save(pod, namespace).map_err(|error| Refusal {
            code: code::TRY_AGAIN,
            message: format!("the daemon cannot store the pod: {error}"),
            hint: "free space in the folder of the daemon's socket; the runtime tries again"
                .to_owned(),
        })?;
        entry.progress = Progress::Enrolled;
        Ok(())
    }

    fn undo(&self, attachment: &Attachment, call: u64) {
        let mut known = self.known();
        if known.entries.get(attachment).is_some_and(|entry| entry.call == call) {
            tracing::info!(%attachment, "an addition by the CNI plugin failed or was abandoned");
            self.remove_locked(&mut known, attachment);
        }
    }

    /// Removes a pod. `None` if nothing has to end.
    pub(super) fn delete(&self, attachment: &Attachment) -> Option<Removal> {
        self.remove_locked(&mut self.known(), attachment)
    }

    fn remove_locked(&self, known: &mut Known, attachment: &Attachment) -> Option<Removal> {
        if let Err(error) = self.store.remove(attachment) {
            tracing::error!(%error, %attachment, "cannot remove a stored pod");
        }
        let removed = known.entries.remove(attachment)?;
        let is_shared = known.entries.values().any(|entry| entry.uid == removed.uid);
        (!is_shared).then(|| self.registry.remove(&removed.uid))
    }

    /// Verifies a pod's listeners and rules.
    pub(super) async fn check(
        &self,
        pod: &AttachedPod,
        namespace: NamespaceId,
    ) -> Result<(), Refusal> {
        if self.facts.is_exempt(&pod.pod) {
            return Ok(());
        }
        let known = self.known().entries.get(&pod.attachment).map(|entry| entry.namespace);
        match known {
            None => return Err(unknown(&pod.attachment)),
            Some(enrolled) if enrolled != namespace => return Err(other_namespace(enrolled)),
            Some(_) => {}
        }
        match self.registry.check(&pod.pod.uid).await {
            Err(_) if self.is_left_alone(&pod.pod.uid) => Ok(()),
            Err(error) => Err(Refusal { code: code::CHECK_FAILED, ..Refusal::from(&error) }),
            Ok(()) => Ok(()),
        }
    }

    fn is_left_alone(&self, uid: &PodUid) -> bool {
        let status = self.registry.status();
        let mut own = status.iter().filter(|pod| pod.uid == *uid);
        own.any(|pod| matches!(pod.state, PodState::LeftAlone(_)))
    }

    /// Removes the attachments of a network that are not `valid`.
    pub(super) fn collect(&self, network: &NetworkName, valid: &BTreeSet<Attachment>) {
        self.remove_where(|attachment, entry| {
            entry.network == *network && !valid.contains(attachment)
        });
    }

    /// Removes the pods whose namespace the runtime has removed. Not every runtime calls GC, and
    /// a DEL finds no daemon while it restarts.
    pub(super) fn sweep(&self) {
        self.remove_where(|_, entry| {
            let (device, inode) = (entry.namespace.device(), entry.namespace.inode());
            entry.path.as_ref().is_some_and(|path| has_left(path, device, inode))
        });
    }

    fn remove_where(&self, is_gone: impl Fn(&Attachment, &Entry) -> bool) {
        let mut known = self.known();
        // An addition ends by itself.
        let entries = known.entries.iter();
        let enrolled = entries.filter(|(_, entry)| entry.progress == Progress::Enrolled);
        let gone = enrolled.filter(|(attachment, entry)| is_gone(attachment, entry));
        let gone: Vec<Attachment> = gone.map(|(attachment, _)| attachment.clone()).collect();
        for attachment in gone {
            tracing::info!(%attachment, "removing a pod that the runtime has deleted");
            self.remove_locked(&mut known, &attachment);
        }
    }

    /// Enrols the pods of an earlier process again. Returns those whose facts are missing.
    pub(super) fn resume(&self) -> io::Result<Vec<AttachedPod>> {
        let mut incomplete = Vec::new();
        for StoredPod { pod, device, inode } in self.store.load()? {
            let path = Path::new(&pod.namespace_path);
            let namespace = match (self.open)(path) {
                Ok(found) if (found.id().device(), found.id().inode()) == (device, inode) => found,
                Err(error) if !has_left(path, device, inode) => {
                    // The file stays for the next start.
                    tracing::error!(
                        error = chain(&error),
                        hint = error.hint().as_deref(),
                        attachment = %pod.attachment,
                        "cannot open the namespace of a stored pod: the pod is not enrolled again"
                    );
                    continue;
                }
                Ok(_) | Err(_) => {
                    tracing::info!(
                        attachment = %pod.attachment, path = pod.namespace_path,
                        "a stored pod has ended: its namespace is gone"
                    );
                    self.store.remove(&pod.attachment)?;
                    continue;
                }
            };
            self.begin(&pod, namespace.id(), Progress::Enrolled);
            match self.facts.find(&pod) {
                // The registry tries again for as long as it fails.
                Ok(facts) => drop(self.registry.add(facts, namespace)),
                Err(_) => incomplete.push(pod),
            }
        }
        Ok(incomplete)
    }

    /// Enrols a pod of an earlier process once the mesh has its facts. Ends with the attachment.
    pub(super) async fn resume_late(&self, pod: AttachedPod) {
        let mut mesh = self.facts.mesh();
        let mut logged = None;
        loop {
            mesh.mark_unchanged();
            let known = self.known().entries.get(&pod.attachment).map(|entry| entry.namespace);
            let Some(namespace) = known else { return };
            match self.facts.find(&pod) {
                Ok(facts) => {
                    match (self.open)(pod.namespace_path.as_ref()) {
                        Ok(found) if found.id() == namespace => {
                            drop(self.registry.add(facts, found));
                        }
                        // The sweep removes the pod.
                        Ok(_) => {}
                        Err(error) => {
                            let (uid, error) = (&pod.pod.uid, chain(&error));
                            tracing::error!(%uid, error, "cannot enrol a pod again");
                        }
                    }
                    return;
                }
                Err(problem) if logged.as_ref() != Some(&problem) => {
                    let (uid, hint) = (&pod.pod.uid, problem.hint());
                    let hint = hint.as_deref();
                    tracing::error!(%uid, error = %problem, hint, "cannot enrol a pod again");
                    logged = Some(problem);
                }
                Err(_) => {}
            }
            if mesh.changed().await.is_err() {
                return;
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // No code panics while it holds the lock.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the namespace is no longer at the path: there is no file, or that of another namespace.
/// After other errors it may still be there.
fn has_left(path: &Path, device: u64, inode: u64) -> bool {
    match fs::metadata(path) {
        Ok(file) => (file.dev(), file.ino()) != (device, inode),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Whether the file is that of the namespace.
fn leads_to(path: &Path, namespace: NamespaceId) -> bool {
    let same =
        |file: fs::Metadata| (file.dev(), file.ino()) == (namespace.device(), namespace.inode());
    fs::metadata(path).is_ok_and(same)
}

impl From<FactProblem> for Refusal {
    fn from(problem: FactProblem) -> Self {
        let hint = problem.hint().unwrap_or_default().into_owned();
        Self { code: code::TRY_AGAIN, message: problem.to_string(), hint }
    }
}

impl From<&EnrolError> for Refusal {
    fn from(error: &EnrolError) -> Self {
        let code = match error {
            EnrolError::NamespaceInUse(_) | EnrolError::ForeignNamespace(_) => code::NAMESPACE,
            _ => code::TRY_AGAIN,
        };
        let message = format!("the pod is not enrolled: {}", chain(error));
        Self { code, message, hint: error.hint().unwrap_or_default().into_owned() }
    }
}

fn unknown(attachment: &Attachment) -> Refusal {
    Refusal {
        code: code::UNKNOWN_CONTAINER,
        message: format!("the daemon has no attachment {attachment}"),
        hint: "create the pod again: the runtime added it without the plugin, or the daemon could not enrol it again after a restart"
            .to_owned(),
    }
}

fn other_namespace(enrolled: NamespaceId) -> Refusal {
    Refusal {
        code: code::NAMESPACE,
        message: format!("the pod is enrolled in {enrolled}, which is not CNI_NETNS"),
        hint: "create the pod again".to_owned(),
    }
}

#[cfg(test)]
mod tests;
