//! The served pods of the process by namespace and name: the possible destinations of a delivery on
//! the same node.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use underpass_config::Workload;

use crate::node::pod::{Pod, PodId};

/// The served pods. A pod is included from its first accept until its removal.
#[derive(Debug, Default)]
pub(crate) struct ServedPods(RwLock<ByNamespaceAndName>);

/// During a replacement, two pods have the same name.
type ByNamespaceAndName = HashMap<String, HashMap<String, Vec<Weak<Pod>>>>;

impl ServedPods {
    /// Adds `pod` unless it is already included.
    pub(crate) fn add(&self, pod: &Arc<Pod>) {
        let own = &pod.context.own;
        let mut pods = self.write();
        let of_namespace = pods.entry(own.namespace.clone()).or_default();
        let named = of_namespace.entry(own.name.clone()).or_default();
        named.retain(|other| other.strong_count() > 0);
        if !named.iter().any(|other| other.as_ptr() == Arc::as_ptr(pod)) {
            named.push(Arc::downgrade(pod));
        }
    }

    pub(crate) fn remove(&self, pod: PodId) {
        let mut pods = self.write();
        for of_namespace in pods.values_mut() {
            for named in of_namespace.values_mut() {
                named.retain(|other| other.upgrade().is_some_and(|other| other.id != pod));
            }
            of_namespace.retain(|_, named| !named.is_empty());
        }
        pods.retain(|_, of_namespace| !of_namespace.is_empty());
    }

    /// The newest pod that is `workload`: it has its namespace, name and network, proves its
    /// identity, and accepts inbound connections.
    pub(crate) fn proven(&self, workload: &Workload) -> Option<Arc<Pod>> {
        let pods = self.read();
        let named = pods.get(&*workload.namespace)?.get(&*workload.name)?;
        let mut newest_first = named.iter().rev().filter_map(Weak::upgrade);
        newest_first.find(|pod| {
            *pod.context.own.network == *workload.network
                && pod.credentials.as_ref().is_some_and(|own| own.issued().is_some())
                && pod.proves(workload)
                && !pod.closing.is_cancelled()
                && !pod.inbound_drain.refuses()
        })
    }

    /// All served pods, in no order.
    pub(crate) fn all(&self) -> Vec<Arc<Pod>> {
        let pods = self.read();
        pods.values().flat_map(HashMap::values).flatten().filter_map(Weak::upgrade).collect()
    }

    /// The number of open connections of all pods.
    pub(crate) fn connections(&self) -> usize {
        self.all().iter().map(|pod| pod.connections.open()).sum()
    }

    fn read(&self) -> RwLockReadGuard<'_, ByNamespaceAndName> {
        // No code panics while it holds the lock.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, ByNamespaceAndName> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Mesh;

    use super::*;
    use crate::node::testing::pod;

    fn count(pods: &ServedPods) -> usize {
        pods.read().values().flat_map(HashMap::values).map(Vec::len).sum()
    }

    #[tokio::test]
    async fn served_pod_is_listed_once_until_it_is_removed_or_dropped() {
        let (pods, one, other) = (ServedPods::default(), pod(&[]), pod(&[]));
        for added in [&one, &one, &other] {
            pods.add(added);
        }
        assert_eq!(count(&pods), 2, "both pods with the same name are listed");
        pods.remove(one.id);
        assert_eq!(count(&pods), 1);
        drop(other);
        pods.add(&one);
        assert_eq!(count(&pods), 1, "the dropped one is forgotten");
        pods.remove(one.id);
        assert!(pods.read().is_empty());
    }

    #[tokio::test]
    async fn pod_without_certificate_has_no_identity() {
        let (pods, pod) = (ServedPods::default(), pod(&[]));
        pods.add(&pod);
        let text = "workloads: [{name: server, workloadIps: [10.0.0.1]}]";
        let mesh = Mesh::from_text("mesh", text).unwrap();
        assert!(pods.proven(mesh.workloads()[0]).is_none());
    }
}
