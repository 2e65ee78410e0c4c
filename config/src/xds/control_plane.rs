//! The mesh of one control plane: applies its responses, and answers them.

use bytes::Bytes;
use prost::Message as _;

use super::convert::{Rejection, addresses_of, policy, service, service_key, substitute, workload};
use super::message::{DeltaRequest, DeltaResponse, Node};
use super::session::{Item, ResourceType, Session, SessionError};
use super::workload::{Address, AddressType};
use crate::mesh::names::Set;
use crate::mesh::store::MeshStore;
use crate::mesh::{Mesh, Name, WorkloadDraft};

/// The number of changes after which unused interned values are dropped.
const CHANGES_PER_CLEANUP: usize = 1 << 16;

/// The mesh of a control plane, without I/O.
#[derive(Debug)]
pub struct ControlPlane {
    session: Session,
    store: MeshStore,
    local: LocalWorkloads,
    /// The policies of which no version was accepted, so that a substitute denies instead.
    substitutes: Set<Name>,
    changes: usize,
}

/// The workloads that this process serves. Their changes take effect at once.
#[derive(Debug, Clone, Default)]
pub struct LocalWorkloads {
    /// The node of the process, if all workloads of the node are local.
    pub node: Option<String>,
    /// The namespace and the name of the workload, if the process serves only one.
    pub named: Option<(String, String)>,
}

/// The result of a response.
#[derive(Debug)]
pub struct Applied {
    /// The answer to the control plane.
    pub answer: DeltaRequest,
    /// The type of the resources.
    pub kind: ResourceType,
    /// The number of resources that were added or changed.
    pub set: usize,
    /// The number of resources that were removed.
    pub removed: usize,
    /// The rejected resources.
    pub rejected: Vec<(Name, Rejection)>,
    /// Whether the change must take effect at once: it concerns policies or local workloads.
    pub is_urgent: bool,
}

impl ControlPlane {
    /// Creates a client with this node id and these local workloads.
    pub fn new(node: Node, local: LocalWorkloads) -> Self {
        Self {
            session: Session::new(node),
            store: MeshStore::default(),
            local,
            substitutes: Set::default(),
            changes: 0,
        }
    }

    /// The same client without state.
    #[must_use]
    pub fn renewed(&self) -> Self {
        Self::new(self.session.node().clone(), self.local.clone())
    }

    /// The first requests of a new stream.
    pub fn open(&mut self) -> Vec<DeltaRequest> {
        self.session.open()
    }

    /// Whether the first state is complete.
    pub fn is_synced(&self) -> bool {
        self.session.is_synced()
    }

    /// Applies a response to the next snapshot.
    ///
    /// # Errors
    /// The control plane violates the protocol. The response was not applied; close the
    /// stream.
    pub fn receive(&mut self, response: DeltaResponse) -> Result<Applied, SessionError> {
        let update = self.session.receive(response)?;
        let (kind, set, removed) = (update.kind, update.resources.len(), update.removed.len());
        let mut is_urgent = kind == ResourceType::Authorization;
        for name in &update.removed {
            self.remove(kind, name);
        }
        let mut rejected = Vec::new();
        for Item { name, content, .. } in &update.resources {
            let applied = match (content, kind) {
                (Ok(content), ResourceType::Address) => self.address(name, content),
                (Ok(content), ResourceType::Authorization) => self.policy(name, content),
                (Err(rejection), _) => {
                    self.reject(kind, name, &Bytes::new());
                    Err(rejection.clone())
                }
            };
            match applied {
                Ok(is_local) => is_urgent |= is_local,
                Err(rejection) => rejected.push((name.clone(), rejection)),
            }
        }
        self.changes += set + removed;
        if self.changes > CHANGES_PER_CLEANUP {
            self.changes = 0;
            self.store.drop_unused();
        }
        let answer = self.session.finish(update, &rejected);
        Ok(Applied { answer, kind, set, removed, rejected, is_urgent })
    }

    /// The mesh after all responses.
    pub fn snapshot(&mut self) -> Mesh {
        self.store.snapshot()
    }

    /// Applies a workload or a service. Returns whether it is a local workload.
    fn address(&mut self, name: &Name, content: &Bytes) -> Result<bool, Rejection> {
        let applied = self.try_address(name, content);
        if applied.is_err() {
            self.reject(ResourceType::Address, name, content);
        }
        applied
    }

    fn try_address(&mut self, name: &Name, content: &Bytes) -> Result<bool, Rejection> {
        let shared = self.store.shared();
        match Address::decode(content.clone())?.kind.ok_or(Rejection::Type)? {
            AddressType::Workload(given) => {
                let draft = workload(name.clone(), &given, shared)?;
                let is_local = self.local.contain(&draft);
                if let Some(key) = service_key(name) {
                    self.store.remove_service(&key);
                }
                self.store.set_workload(draft);
                Ok(is_local)
            }
            AddressType::Service(given) => {
                let service = service(name, &given, shared)?;
                self.store.remove_workload(name);
                self.store.set_service(service);
                Ok(false)
            }
        }
    }

    fn policy(&mut self, name: &Name, content: &Bytes) -> Result<bool, Rejection> {
        match policy(name, content, self.store.shared()) {
            Ok(policy) => {
                self.substitutes.remove(name);
                self.store.set_policy(name.clone(), policy);
                Ok(true)
            }
            Err(rejection) => {
                self.reject(ResourceType::Authorization, name, content);
                Err(rejection)
            }
        }
    }

    /// Keeps the accepted version of a rejected resource. Without one, connections that the
    /// resource may forbid are refused.
    fn reject(&mut self, kind: ResourceType, name: &Name, content: &Bytes) {
        match kind {
            ResourceType::Address => {
                let is_service =
                    || service_key(name).is_some_and(|key| self.store.has_service(&key));
                if !self.store.has_workload(name) && !is_service() {
                    let addresses = addresses_of(content, self.store.shared());
                    self.store.withhold(name.clone(), addresses);
                }
            }
            ResourceType::Authorization => {
                let is_accepted = self.store.has_policy(name) && !self.substitutes.contains(name);
                if !is_accepted && let Some(policy) = substitute(name, content) {
                    self.substitutes.insert(name.clone());
                    self.store.set_policy(name.clone(), policy);
                }
            }
        }
    }

    fn remove(&mut self, kind: ResourceType, name: &str) {
        match kind {
            ResourceType::Address => {
                if !self.store.remove_workload(name)
                    && let Some(key) = service_key(name)
                {
                    self.store.remove_service(&key);
                }
            }
            ResourceType::Authorization => {
                self.substitutes.remove(name);
                self.store.remove_policy(name);
            }
        }
    }
}

impl LocalWorkloads {
    fn contain(&self, WorkloadDraft { workload, .. }: &WorkloadDraft) -> bool {
        let is_on_node = self.node.as_ref().is_some_and(|node| **node == *workload.node);
        let named = self.named.as_ref();
        is_on_node
            || named.is_some_and(|(namespace, name)| {
                **namespace == *workload.namespace && **name == *workload.name
            })
    }
}

#[cfg(test)]
mod tests;
