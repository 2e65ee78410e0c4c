//! The state of the cluster according to the API server.

use std::collections::BTreeMap;
use std::sync::Arc;

use underpass_config::PodUid;

use super::objects::{ClusterNamespace, ClusterPod};

/// The pods of this node, and the namespaces of the cluster.
#[derive(Debug, Clone, Default)]
pub(crate) struct ClusterView {
    pods: Option<BTreeMap<PodUid, Arc<ClusterPod>>>,
    /// The dataplane mode of each namespace.
    namespaces: Option<BTreeMap<String, Option<String>>>,
    /// The reasons why changes of pods and of namespaces do not arrive.
    problems: [Option<String>; 2],
}

/// A kind of objects that the daemon watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Pods,
    Namespaces,
}

/// An object of one of the kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    Pod(Arc<ClusterPod>),
    Namespace(ClusterNamespace),
}

impl ClusterView {
    /// Whether all pods and namespaces have been listed once.
    pub(crate) fn is_complete(&self) -> bool {
        self.pods.is_some() && self.namespaces.is_some()
    }

    /// The reason why changes do not arrive, so that the facts may be old.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.problems.iter().flatten().map(String::as_str).next()
    }

    pub(crate) fn pod(&self, uid: &PodUid) -> Option<&Arc<ClusterPod>> {
        self.pods.as_ref()?.get(uid)
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = &Arc<ClusterPod>> {
        self.pods.iter().flat_map(BTreeMap::values)
    }

    /// The dataplane mode of a namespace; `None` if the namespace is unknown.
    pub(crate) fn mode_of(&self, namespace: &str) -> Option<Option<&str>> {
        Some(self.namespaces.as_ref()?.get(namespace)?.as_deref())
    }

    /// Sets the reason why changes of a kind do not arrive; `None` if they do. Returns whether it
    /// is new.
    pub(super) fn set_problem(&mut self, kind: Kind, problem: Option<String>) -> bool {
        let [pods, namespaces] = &mut self.problems;
        let of_kind = match kind {
            Kind::Pods => pods,
            Kind::Namespaces => namespaces,
        };
        let is_new = *of_kind != problem;
        *of_kind = problem;
        is_new
    }

    /// Replaces all objects of a kind. Returns whether any object has changed.
    pub(super) fn replace(&mut self, kind: Kind, objects: Vec<Object>) -> bool {
        let mut new = Self::default();
        match kind {
            Kind::Pods => new.pods = Some(BTreeMap::new()),
            Kind::Namespaces => new.namespaces = Some(BTreeMap::new()),
        }
        for object in objects {
            new.apply(object);
        }
        match kind {
            Kind::Pods => replace(&mut self.pods, new.pods),
            Kind::Namespaces => replace(&mut self.namespaces, new.namespaces),
        }
    }

    /// Adds or changes an object. Returns whether it has changed.
    pub(super) fn apply(&mut self, object: Object) -> bool {
        match object {
            Object::Pod(pod) => {
                let pods = self.pods.get_or_insert_default();
                let known = pods.get(&pod.uid);
                if pod.has_static_uid && known.is_some_and(|known| !known.is_same_pod(&pod)) {
                    // An annotation with the uid of another pod must not replace that pod.
                    return false;
                }
                let is_new = known.is_none_or(|known| *known != pod);
                if is_new {
                    pods.insert(pod.uid.clone(), pod);
                }
                is_new
            }
            Object::Namespace(ClusterNamespace { name, dataplane_mode }) => {
                let namespaces = self.namespaces.get_or_insert_default();
                let before = namespaces.insert(name, dataplane_mode.clone());
                before != Some(dataplane_mode)
            }
        }
    }

    /// Removes an object. Returns whether it was known.
    pub(super) fn remove(&mut self, object: &Object) -> bool {
        match object {
            Object::Pod(pod) => {
                let is_known = self.pod(&pod.uid).is_some_and(|known| known.is_same_pod(pod));
                is_known && self.pods.as_mut().is_some_and(|pods| pods.remove(&pod.uid).is_some())
            }
            Object::Namespace(namespace) => {
                let namespaces = self.namespaces.as_mut();
                namespaces.is_some_and(|namespaces| namespaces.remove(&namespace.name).is_some())
            }
        }
    }
}

fn replace<T: PartialEq>(old: &mut T, new: T) -> bool {
    let is_new = *old != new;
    *old = new;
    is_new
}
