//! The source of pods that reads a folder with one file for each pod (`node.pods.directory`).
//!
//! A new file enrols a pod, and a removed file removes it. A file with a mistake is reported and
//! changes nothing: its pod keeps its last valid description.
//!
//! The config crate defines the file format, and reads and watches the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use serde_json::{Value, json};
use underpass_config::{
    ConfigErrors, FileWatcher, Hint as _, PodDocument, PodFile, PodFolder, PodUid,
    interval_at_multiples,
};
use underpass_interception::{InterceptionError, Namespace, NamespaceId};

use crate::error::chain;
use crate::pods::enrolment::EnrolError;
use crate::pods::facts::PodFacts;
use crate::pods::registry::PodRegistry;
use crate::pods::source::{PodSource, SourceContext, SourceHealth, SourceRun, SourceState};

/// The interval of checks of the namespaces' files. No event reports a deleted or replaced
/// namespace.
const NAMESPACE_POLL_INTERVAL: Duration = Duration::from_secs(5);

type OpenNamespace = dyn Fn(&Path) -> Result<Namespace, InterceptionError> + Send + Sync;

/// Follows the folder.
pub(crate) struct DirectorySource {
    folder: PodFolder,
    open_namespace: Box<OpenNamespace>,
    files: BTreeMap<PathBuf, KnownFile>,
    /// The error of the last read of the folder, to report it once.
    folder_error: Option<String>,
    /// Whether the registry has no other pods than those of the files.
    is_complete: bool,
}

/// A file of the folder.
#[derive(Debug)]
struct KnownFile {
    /// `None` before this process has read the file.
    fingerprint: Option<u64>,
    /// The pod according to the last valid version of the file.
    pod: Option<KnownPod>,
}

#[derive(Debug)]
struct KnownPod {
    uid: PodUid,
    netns: PathBuf,
    facts: PodFacts,
    /// The namespace with which the pod was added to the registry.
    added: Option<NamespaceId>,
    /// The last error, to report it once.
    error: Option<String>,
}

impl DirectorySource {
    /// Opens the folder.
    ///
    /// # Errors
    /// The folder does not exist, is unsafe, or cannot be watched.
    pub(crate) fn open(path: &Path, watcher: &FileWatcher) -> Result<Self, ConfigErrors> {
        let open_namespace = Box::new(|path: &Path| Namespace::open_secure_path(path));
        Self::with_namespaces(path, watcher, open_namespace)
    }

    fn with_namespaces(
        path: &Path,
        watcher: &FileWatcher,
        open_namespace: Box<OpenNamespace>,
    ) -> Result<Self, ConfigErrors> {
        let folder = PodFolder::open(path, watcher)?;
        let (files, folder_error) = (BTreeMap::new(), None);
        Ok(Self { folder, open_namespace, files, folder_error, is_complete: false })
    }

    async fn follow(mut self, context: SourceContext) -> ! {
        let SourceContext { registry, health, mut pauses, inherited } = context;
        let mut poll = interval_at_multiples(NAMESPACE_POLL_INTERVAL);
        // Without a state, the first read of the folder removes adopted pods that have no file.
        self.is_complete = inherited.is_some();
        self.inherit(&inherited.unwrap_or_default(), &registry);
        self.read_files(&registry, &health);
        loop {
            tokio::select! {
                () = self.folder.changed() => self.read_files(&registry, &health),
                _ = poll.tick() => self.follow_namespaces(&registry),
                request = pauses.next() => request.pause(self.state()).await,
            }
        }
    }

    /// The files and their pods. A file with a mistake still stands for the pod that it described.
    fn state(&self) -> SourceState {
        let known = self.files.iter().filter_map(|(path, file)| {
            let KnownPod { uid, netns, .. } = file.pod.as_ref()?;
            Some(json!([path.to_str()?, uid.to_string(), netns.to_str()?]))
        });
        let text = Value::from(known.collect::<Vec<_>>()).to_string();
        SourceState { text, descriptors: Vec::new() }
    }

    /// Continues with the files of the process that was taken over, as far as their pods are known.
    fn inherit(&mut self, state: &SourceState, registry: &PodRegistry) {
        let known: Vec<[String; 3]> = serde_json::from_str(&state.text).unwrap_or_default();
        for [path, uid, netns] in known {
            let known = uid.parse().ok().and_then(|uid| registry.known(&uid));
            let Some((facts, _)) = known else { continue };
            let (uid, netns) = (facts.uid.clone(), netns.into());
            let pod = Some(KnownPod { uid, netns, facts, added: None, error: None });
            self.files.insert(path.into(), KnownFile { fingerprint: None, pod });
        }
    }

    fn read_files(&mut self, registry: &PodRegistry, health: &SourceHealth) {
        let documents = self.folder.read();
        health.set_ready(documents.is_ok());
        match documents {
            Ok(documents) => {
                self.folder_error = None;
                self.forget_missing(&documents, registry);
                documents.into_iter().for_each(|document| self.read_file(document, registry));
                if !std::mem::replace(&mut self.is_complete, true) {
                    let pods = self.files.values().filter_map(|file| file.pod.as_ref());
                    registry.retain(&pods.map(|pod| pod.uid.clone()).collect());
                }
                self.follow_namespaces(registry);
            }
            Err(error) => self.report_folder(error.to_string()),
        }
    }

    fn report_folder(&mut self, error: String) {
        if self.folder_error.as_ref() != Some(&error) {
            let hint = "the pods stay as they are until the folder can be read again";
            tracing::error!(error, hint, "cannot read the folder of pods");
            self.folder_error = Some(error);
        }
    }

    /// Removes the pods whose files are missing.
    fn forget_missing(&mut self, documents: &[PodDocument], registry: &PodRegistry) {
        let present: BTreeSet<&Path> =
            documents.iter().map(|document| document.path.as_path()).collect();
        let gone = self.files.extract_if(.., |path, _| !present.contains(path.as_path()));
        let gone: Vec<_> = gone.collect();
        if gone.is_empty() {
            return;
        }
        for pod in gone.into_iter().filter_map(|(_, file)| file.pod) {
            // The removal continues after its handle is dropped.
            drop(registry.remove(&pod.uid));
        }
        // The removed file may have caused the mistake of another one: the same uid. Read that file
        // again.
        self.files.retain(|_, file| file.pod.is_some());
    }

    fn read_file(&mut self, document: PodDocument, registry: &PodRegistry) {
        let known = self.files.get(&document.path);
        let fingerprint = Some(document.fingerprint);
        if known.is_some_and(|known| known.fingerprint == fingerprint) {
            return;
        }
        let before = self.files.remove(&document.path).and_then(|known| known.pod);
        let pod = match self.parse(&document) {
            Ok(pod) => Some(after_change(before, pod, registry)),
            Err(error) => {
                let file = document.path.display();
                let hint = match &before {
                    Some(_) => "correct the file; until then the pod stays as it is",
                    None => "correct the file; until then the pod is not enrolled",
                };
                tracing::error!(%file, error, hint, "cannot use the file of a pod");
                before
            }
        };
        self.files.insert(document.path, KnownFile { fingerprint, pod });
    }

    fn parse(&self, document: &PodDocument) -> Result<KnownPod, String> {
        let file = document.parse().map_err(|errors| errors.to_string())?;
        let same = |known: &KnownFile| known.pod.as_ref().is_some_and(|pod| pod.uid == file.uid);
        match self.files.iter().find(|(_, known)| same(known)) {
            Some((other, _)) => {
                Err(format!("uid {} is already used by the file {}", file.uid, other.display()))
            }
            None => Ok(file.into()),
        }
    }

    /// Adds pods to the registry, and removes those whose namespace is missing.
    fn follow_namespaces(&mut self, registry: &PodRegistry) {
        for pod in self.files.values_mut().filter_map(|file| file.pod.as_mut()) {
            match (self.open_namespace)(&pod.netns) {
                Ok(namespace) => pod.add(namespace, registry),
                Err(error) => pod.fail(EnrolError::Namespace(Arc::new(error)), registry),
            }
        }
    }
}

/// The state of a pod after its file has changed from `before` to `now`.
fn after_change(before: Option<KnownPod>, now: KnownPod, registry: &PodRegistry) -> KnownPod {
    match before {
        Some(before) if before.uid != now.uid => {
            drop(registry.remove(&before.uid));
            now
        }
        Some(before) if before.facts == now.facts => KnownPod { netns: now.netns, ..before },
        _ => now,
    }
}

impl KnownPod {
    /// Adds the pod, unless the registry has it.
    fn add(&mut self, namespace: Namespace, registry: &PodRegistry) {
        let id = namespace.id();
        if self.added == Some(id) {
            return;
        }
        // A pending outcome counts as success: the registry may need no attempt.
        match registry.add(self.facts.clone(), namespace).first_outcome().now_or_never() {
            Some(Err(error)) => self.fail(error, registry),
            _ => {
                self.added = Some(id);
                self.error = None;
            }
        }
    }

    /// Releases the namespace, and makes the registry report why the pod is not served.
    fn fail(&mut self, error: EnrolError, registry: &PodRegistry) {
        let text = chain(&error).to_string();
        if self.error.as_ref() == Some(&text) {
            return;
        }
        let (pod, uid, hint) = (self.facts.full_name(), &self.uid, error.hint());
        let netns = self.netns.display();
        tracing::error!(pod, %uid, %netns, error = text, hint = hint.as_deref(), "cannot add the pod");
        registry.fail(self.facts.clone(), error);
        self.added = None;
        self.error = Some(text);
    }
}

impl From<PodFile> for KnownPod {
    fn from(file: PodFile) -> Self {
        let PodFile { uid, netns, name, namespace, service_account, .. } = file;
        let (ips, labels, annotations) = (file.ips, file.labels, file.annotations);
        let facts = PodFacts {
            uid: uid.clone(),
            name,
            namespace,
            service_account,
            ips,
            labels,
            annotations,
            namespace_mode: None,
            probe_ports: None,
            interception: file.interception,
            dns: file.dns,
        };
        Self { uid, netns, facts, added: None, error: None }
    }
}

impl PodSource for DirectorySource {
    fn run(self: Box<Self>, context: SourceContext) -> SourceRun {
        Box::pin(async move { self.follow(context).await })
    }
}

impl fmt::Debug for DirectorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectorySource")
            .field("folder", &self.folder.path())
            .field("files", &self.files.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
