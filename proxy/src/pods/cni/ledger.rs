//! Tracks the attachments of the node, and the pod of each.
//!
//! A pod is in the registry as long as it has an attachment. The store has the attachments whose
//! `ADD` was answered with success. `follow` keeps the facts about the pods current.

mod follow;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use underpass_config::{Hint as _, PodUid};
use underpass_interception::{Namespace, NamespaceId};

use super::attachment::{AttachedPod, Attachment, NetworkName};
use super::facts::{FactFinder, FactProblem};
use super::namespace_file::OpenNamespace;
use super::protocol::{Refusal, StoredPod, code};
use super::store::Store;
use crate::error::chain;
use crate::pods::enrolment::EnrolError;
use crate::pods::facts::PodFacts;
use crate::pods::registry::{PodRegistry, Removal};
use crate::pods::status::PodState;

/// The attachments of the node. Shared by the calls of the plugin.
#[derive(Debug)]
pub(super) struct Ledger {
    registry: PodRegistry,
    facts: FactFinder,
    store: Store,
    open: OpenNamespace,
    /// Never locked across an await. Locked before the facts if both are needed.
    known: Mutex<Known>,
    /// Wakes [`Ledger::follow_facts`] after a change of the attachments.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Known {
    entries: BTreeMap<Attachment, Entry>,
    next_call: u64,
}

impl Known {
    /// Whether the pod has an attachment.
    fn has(&self, uid: &PodUid) -> bool {
        self.entries.values().any(|entry| entry.pod.pod.uid == *uid)
    }
}

/// The state of one attachment.
#[derive(Debug)]
struct Entry {
    /// The number of the `ADD` call that created it, or of a later call for the same attachment.
    call: u64,
    progress: Progress,
    pod: AttachedPod,
    namespace: NamespaceId,
    /// Whether this process can open the namespace's file.
    is_visible: bool,
    facts: EntryFacts,
    /// The reason why facts are unknown or not applied, to log it once.
    problem: Option<String>,
}

/// The facts about the pod of an attachment.
#[derive(Debug, Default)]
struct EntryFacts {
    /// Those that the registry has; `None` until they are known after a restart.
    current: Option<PodFacts>,
    /// Those that an earlier process has stored, until `current` is known.
    stored: Option<PodFacts>,
}

/// The progress of an `ADD` call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// The plugin waits for the answer.
    Adding,
    /// The pod is served and stored.
    Enrolled,
}

impl EntryFacts {
    fn of(current: PodFacts) -> Self {
        Self { current: Some(current), stored: None }
    }
}

impl Entry {
    fn to_store(&self) -> StoredPod {
        let (pod, facts) = (self.pod.clone(), self.facts.current.clone());
        let (device, inode) = (self.namespace.device(), self.namespace.inode());
        StoredPod { pod, device, inode, facts }
    }
}

/// The hint for a namespace whose file this process cannot open.
const MOUNT_HINT: &str = "mount the runtime's folder of namespaces, such as /run/netns, with HostToContainer propagation";

/// A successful `ADD`. Dropping it undoes the addition, unless the plugin was answered.
#[derive(Debug)]
#[must_use]
pub(super) struct Addition<'a> {
    ledger: &'a Ledger,
    /// The attachment and its call; `None` for an exempt pod, and after the answer.
    undo: Option<(Attachment, u64)>,
}

/// An addition whose answer was sent to the plugin. Dropping it keeps the pod enrolled.
#[derive(Debug)]
pub(super) struct AnsweredAddition<'a> {
    ledger: &'a Ledger,
    undo: Option<(Attachment, u64)>,
}

impl<'a> Addition<'a> {
    /// Keeps the pod enrolled after the drop, because the plugin may have the answer.
    pub(super) fn answered(mut self) -> AnsweredAddition<'a> {
        let undo = self.undo.take();
        AnsweredAddition { ledger: self.ledger, undo }
    }
}

impl AnsweredAddition<'_> {
    /// Undoes the addition: the plugin has ended without reading the answer.
    pub(super) fn undo(self) {
        if let Some((attachment, call)) = self.undo {
            self.ledger.undo(&attachment, call);
        }
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
        let (known, changed) = (Mutex::default(), Notify::new());
        Self { registry, facts, store, open, known, changed }
    }

    /// Enrols a pod, and returns once it is served. Dropping the future or its result undoes this.
    pub(super) async fn add(
        &self,
        pod: AttachedPod,
        namespace: Namespace,
    ) -> Result<Addition<'_>, Refusal> {
        if self.facts.is_exempt(&pod.pod.namespace) {
            let pod = format!("{}/{}", pod.pod.namespace, pod.pod.name);
            tracing::info!(pod, "pod not enrolled: its namespace is in node.exempt_namespaces");
            return Ok(Addition { ledger: self, undo: None });
        }
        let facts = self.facts.wait_for(&pod).await.map_err(Refusal::from)?;
        let call =
            self.begin(&pod, namespace.id(), Progress::Adding, EntryFacts::of(facts.clone()));
        let addition = Addition { ledger: self, undo: Some((pod.attachment.clone(), call)) };
        let enrolment = self.registry.add(facts, namespace.clone());
        enrolment.first_outcome().await.map_err(|error| Refusal::from(&error))?;
        self.complete(&pod.attachment, call)?;
        Ok(addition)
    }

    fn begin(
        &self,
        pod: &AttachedPod,
        namespace: NamespaceId,
        progress: Progress,
        facts: EntryFacts,
    ) -> u64 {
        let is_visible = leads_to(Path::new(&pod.namespace_path), namespace);
        if !is_visible {
            tracing::warn!(
                path = pod.namespace_path, attachment = %pod.attachment, hint = MOUNT_HINT,
                "the daemon cannot see a pod's namespace: it cannot enrol the pod again after a restart"
            );
        }
        let mut known = self.known();
        let call = known.next_call;
        known.next_call += 1;
        let (pod, problem) = (pod.clone(), None);
        let attachment = pod.attachment.clone();
        let entry = Entry { call, progress, pod, namespace, is_visible, facts, problem };
        known.entries.insert(attachment, entry);
        self.changed.notify_one();
        call
    }

    /// Stores a pod that is served.
    fn complete(&self, attachment: &Attachment, call: u64) -> Result<(), Refusal> {
        let mut known = self.known();
        let entry = known.entries.get_mut(attachment).filter(|entry| entry.call == call);
        let Some(entry) = entry else {
            return Err(Refusal::from(&EnrolError::Removed));
        };
        self.store.save(&entry.to_store()).map_err(|error| Refusal {
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

    /// Removes an attachment, and the pod with its last one. Returns `None` if no pod has to be
    /// drained.
    pub(super) fn delete(&self, attachment: &Attachment) -> Option<Removal> {
        self.remove_locked(&mut self.known(), attachment)
    }

    fn remove_locked(&self, known: &mut Known, attachment: &Attachment) -> Option<Removal> {
        if let Err(error) = self.store.remove(attachment) {
            tracing::error!(%error, %attachment, "cannot remove a stored pod");
        }
        let removed = known.entries.remove(attachment)?;
        self.changed.notify_one();
        let uid = &removed.pod.pod.uid;
        (!known.has(uid)).then(|| self.registry.remove(uid))
    }

    /// Verifies a pod's listeners and rules.
    pub(super) async fn check(
        &self,
        pod: &AttachedPod,
        namespace: NamespaceId,
    ) -> Result<(), Refusal> {
        if self.facts.is_exempt(&pod.pod.namespace) {
            return Ok(());
        }
        let known = self.known().entries.get(&pod.attachment).map(|entry| entry.namespace);
        match known {
            None => return Err(unknown_refusal(&pod.attachment)),
            Some(enrolled) if enrolled != namespace => {
                return Err(other_namespace_refusal(enrolled));
            }
            Some(_) => {}
        }
        match self.registry.check(&pod.pod.uid).await {
            Err(_) if self.is_pod_exempt(&pod.pod.uid) => Ok(()),
            Err(error) => Err(Refusal { code: code::CHECK_FAILED, ..Refusal::from(&error) }),
            Ok(()) => Ok(()),
        }
    }

    fn is_pod_exempt(&self, uid: &PodUid) -> bool {
        let status = self.registry.status();
        let mut own = status.iter().filter(|pod| pod.uid == *uid);
        own.any(|pod| matches!(pod.state, PodState::Exempt(_)))
    }

    /// Removes the attachments of a network that are not in `valid`.
    pub(super) fn collect(&self, network: &NetworkName, valid: &BTreeSet<Attachment>) {
        self.remove_where(|attachment, entry| {
            entry.pod.network == *network && !valid.contains(attachment)
        });
    }

    /// Removes the pods whose namespace no longer exists. Not every runtime calls GC, and a DEL
    /// gets lost while the daemon restarts.
    pub(super) fn sweep(&self) {
        self.remove_where(|_, entry| {
            let (device, inode) = (entry.namespace.device(), entry.namespace.inode());
            entry.is_visible && is_stale(Path::new(&entry.pod.namespace_path), device, inode)
        });
    }

    fn remove_where(&self, is_gone: impl Fn(&Attachment, &Entry) -> bool) {
        let mut known = self.known();
        // An `ADD` in progress is not removed here: it completes or undoes itself.
        let entries = known.entries.iter();
        let enrolled = entries.filter(|(_, entry)| entry.progress == Progress::Enrolled);
        let gone = enrolled.filter(|(attachment, entry)| is_gone(attachment, entry));
        let gone: Vec<Attachment> = gone.map(|(attachment, _)| attachment.clone()).collect();
        for attachment in gone {
            tracing::info!(%attachment, "removing a pod that the runtime has deleted");
            self.remove_locked(&mut known, &attachment);
        }
    }

    /// Loads the pods of an earlier process, which [`Ledger::follow_facts`] enrols again.
    pub(super) fn resume(&self) -> io::Result<()> {
        for StoredPod { pod, device, inode, facts: stored } in self.store.load()? {
            let path = Path::new(&pod.namespace_path);
            if let Some((facts, namespace)) = self.registry.known(&pod.pod.uid)
                && (namespace.device(), namespace.inode()) == (device, inode)
            {
                // Adopted from the process that was taken over.
                self.begin(&pod, namespace, Progress::Enrolled, EntryFacts::of(facts));
                continue;
            }
            let namespace = match (self.open)(path) {
                Ok(found) if (found.id().device(), found.id().inode()) == (device, inode) => found,
                Err(error) if !is_stale(path, device, inode) => {
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
                        "removing a stored pod: its namespace no longer exists"
                    );
                    self.store.remove(&pod.attachment)?;
                    continue;
                }
            };
            let facts = EntryFacts { current: None, stored };
            self.begin(&pod, namespace.id(), Progress::Enrolled, facts);
        }
        let known = self.known();
        let pods = known.entries.values().map(|entry| entry.pod.pod.uid.clone());
        self.registry.retain(&pods.collect());
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // No code panics while it holds the lock.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the path is stale: its file is missing, or belongs to another namespace. Other errors do
/// not count.
fn is_stale(path: &Path, device: u64, inode: u64) -> bool {
    match fs::metadata(path) {
        Ok(file) => (file.dev(), file.ino()) != (device, inode),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Whether the file at `path` is that of `namespace`.
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
            EnrolError::NamespaceInUse(_) | EnrolError::ForeignNamespace(_) => {
                code::INVALID_NAMESPACE
            }
            _ => code::TRY_AGAIN,
        };
        let message = format!("the pod is not enrolled: {}", chain(error));
        Self { code, message, hint: error.hint().unwrap_or_default().into_owned() }
    }
}

fn unknown_refusal(attachment: &Attachment) -> Refusal {
    Refusal {
        code: code::UNKNOWN_CONTAINER,
        message: format!("the daemon has no attachment {attachment}"),
        hint: "create the pod again: the runtime added it without the plugin, or the daemon could not enrol it again after a restart"
            .to_owned(),
    }
}

fn other_namespace_refusal(enrolled: NamespaceId) -> Refusal {
    Refusal {
        code: code::INVALID_NAMESPACE,
        message: format!("the pod is enrolled in {enrolled}, which is not CNI_NETNS"),
        hint: "create the pod again".to_owned(),
    }
}

#[cfg(test)]
mod tests;
