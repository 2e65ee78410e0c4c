//! The mesh of one control plane: applies its responses, and answers them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message as _;

use super::convert::{Rejection, addresses_of, policy, service, service_key, substitute, workload};
use super::message::{DeltaRequest, DeltaResponse, Node};
use super::on_demand::Lookups;
use super::request::unsubscriptions;
use super::resource_type::ResourceType;
use super::session::{Item, Session, SessionError};
use super::workload::{Address, AddressType};
use crate::mesh::lookup::Lookup;
use crate::mesh::names::Set;
use crate::mesh::store::MeshStore;
use crate::mesh::{Mesh, Name, Workload};

/// The number of changes after which unused interned values are dropped.
const CHANGES_PER_CLEANUP: usize = 1 << 16;

/// The mesh of a control plane, without I/O.
#[derive(Debug)]
pub struct ControlPlane {
    session: Session,
    store: MeshStore,
    local: LocalWorkloads,
    /// The lookups on demand; `None` if the control plane sends the whole mesh.
    lookups: Option<Lookups>,
    /// The policies of which no version was accepted, so that a substitute denies instead.
    substitutes: Set<Name>,
    /// The resources whose last version was rejected, with the reasons.
    rejected: BTreeMap<(ResourceType, Name), Rejection>,
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
    /// The requests that end the subscriptions to removed resources.
    pub unsubscriptions: Vec<DeltaRequest>,
    /// The type of the resources.
    pub kind: ResourceType,
    /// The number of resources that were added or changed.
    pub set: usize,
    /// The number of resources that were removed.
    pub removed: usize,
    /// The number of addresses that were removed because the whole state, which the response
    /// completes, lacks them.
    pub outdated: usize,
    /// The rejected resources.
    pub rejected: Vec<(Name, Rejection)>,
    /// How soon the change must take effect.
    pub urgency: Urgency,
}

impl Applied {
    /// The requests to send now, in this order.
    pub fn into_requests(self) -> impl Iterator<Item = DeltaRequest> {
        std::iter::once(self.answer).chain(self.unsubscriptions)
    }
}

/// How soon a change must take effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// No one waits for it.
    Low,
    /// Connections wait for it: it answers lookups.
    Awaited,
    /// At once: it concerns policies, local workloads, or answers that are not valid any longer.
    Immediate,
}

impl Urgency {
    /// Raises the urgency to `other` if `applies`.
    fn raise(&mut self, other: Self, applies: bool) {
        if applies {
            *self = (*self).max(other);
        }
    }
}

impl ControlPlane {
    /// Creates a client with this node id and these local workloads. It looks addresses up on
    /// demand, or subscribes to all.
    pub fn new(node: Node, local: LocalWorkloads, on_demand: bool) -> Self {
        Self {
            session: Session::new(node),
            store: MeshStore::default(),
            local,
            lookups: on_demand.then(Lookups::default),
            substitutes: Set::default(),
            rejected: BTreeMap::new(),
            changes: 0,
        }
    }

    /// The same client without state.
    #[must_use]
    pub fn renewed(&self) -> Self {
        Self::new(self.session.node().clone(), self.local.clone(), self.lookups.is_some())
    }

    /// The first requests of a new stream.
    pub fn open(&mut self) -> Vec<DeltaRequest> {
        // The new stream sends rejected resources again, if they still exist.
        self.rejected.clear();
        self.session.open(self.lookups.as_mut())
    }

    /// Whether the first state is complete: with lookups on demand, that of the policies.
    pub fn is_synced(&self) -> bool {
        let mut kinds = ResourceType::ALL.into_iter();
        let on_demand = self.lookups.is_some();
        kinds.all(|kind| on_demand && kind == ResourceType::Address || self.session.is_synced(kind))
    }

    /// The requests that look up those of `lookups` that have no answer. None without lookups on
    /// demand.
    pub fn look_up(&mut self, lookups: &[Lookup]) -> Vec<DeltaRequest> {
        let Some(known) = &mut self.lookups else { return Vec::new() };
        known.ask(lookups, |name| self.session.retains(ResourceType::Address, name))
    }

    /// The requests that look up those of `lookups` again that are known. Their answers stay valid.
    pub fn refresh(&self, lookups: &[Lookup]) -> Vec<DeltaRequest> {
        self.lookups.as_ref().map(|known| known.refresh(lookups)).unwrap_or_default()
    }

    /// Removes these lookups, and the resources that no other lookup needs. Returns the requests
    /// that end their subscriptions.
    pub fn let_go(&mut self, lookups: &[Lookup]) -> Vec<DeltaRequest> {
        let Some(known) = &mut self.lookups else { return Vec::new() };
        let sweeps = lookups.iter().any(|lookup| !known.is_absent(lookup));
        let names = lookups.iter().map(Lookup::as_str).filter(|name| known.contains(name));
        let mut names: BTreeSet<_> = names.map(Name::from).collect();
        known.let_go(lookups);
        let mut unneeded = Vec::new();
        if sweeps {
            let local = &self.local;
            let is_local = |workload: &Workload| local.contains(workload);
            unneeded = self.store.unneeded(|name| known.contains(name), is_local);
        }
        for name in &unneeded {
            self.session.forget(ResourceType::Address, name);
            self.remove(ResourceType::Address, name);
        }
        // Another lookup needs what is left.
        names.retain(|name| !self.session.retains(ResourceType::Address, name));
        names.extend(unneeded);
        unsubscriptions(names.iter().map(|name| name.to_string()))
    }

    /// The resources whose last version was rejected, with the reasons.
    pub fn rejected(&self) -> impl ExactSizeIterator<Item = (ResourceType, &Name, &Rejection)> {
        self.rejected.iter().map(|((kind, name), reason)| (*kind, name, reason))
    }

    /// Whether the control plane has not answered this lookup yet.
    pub fn awaits(&self, lookup: &Lookup) -> bool {
        self.lookups.as_ref().is_some_and(|known| known.is_awaited(lookup))
    }

    /// Whether the control plane has nothing for this lookup.
    pub fn is_absent(&self, lookup: &Lookup) -> bool {
        self.lookups.as_ref().is_some_and(|known| known.is_absent(lookup))
    }

    /// The names of the retained resources of this type.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn retained(&self, kind: ResourceType) -> BTreeSet<String> {
        self.session.retained(kind).into_keys().collect()
    }

    /// The number of changes of a response at most, with the removals that a whole state implies.
    pub fn max_changes(&self, response: &DeltaResponse) -> usize {
        response.resources.len() + self.session.max_removals(response)
    }

    /// Applies a response to the next snapshot.
    ///
    /// # Errors
    /// The control plane violates the protocol. The response was not applied; close the
    /// stream.
    pub fn receive(&mut self, response: DeltaResponse) -> Result<Applied, SessionError> {
        let update = self.session.receive(response)?;
        let (kind, set, removed) = (update.kind, update.resources.len(), update.removed.len());
        let mut urgency = Urgency::Low;
        urgency.raise(Urgency::Immediate, kind == ResourceType::Authorization);
        let outdated = update.outdated.len();
        for name in &update.outdated {
            self.remove(ResourceType::Address, name);
        }
        let unsubscriptions = self.unsubscriptions(kind, &update.removed);
        for name in &update.removed {
            let before = self.aliases(kind, name);
            urgency.raise(Urgency::Immediate, self.is_local(kind, name));
            self.remove(kind, name);
            urgency.raise(Urgency::Immediate, self.outdated(kind, name, &before));
            let lookups = self.lookups.as_mut().filter(|_| kind == ResourceType::Address);
            let is_answer = lookups.is_some_and(|lookups| lookups.mentioned(name, false));
            let is_removal = is_answer && self.session.retains(kind, name);
            urgency.raise(Urgency::Awaited, is_answer);
            urgency.raise(Urgency::Immediate, is_removal);
        }
        let mut rejected = Vec::new();
        for item in &update.resources {
            let name = &item.name;
            let before = self.aliases(kind, name);
            self.accepted(kind, name);
            if item.is_unchanged {
                // Also after a rejected version.
                if kind == ResourceType::Address {
                    self.store.release(name);
                }
                urgency.raise(Urgency::Immediate, self.outdated(kind, name, &before));
                urgency.raise(Urgency::Awaited, self.answered(kind, item));
                continue;
            }
            let was_local = self.is_local(kind, name);
            let applied = self.apply(kind, item);
            urgency.raise(Urgency::Immediate, self.outdated(kind, name, &before));
            urgency.raise(Urgency::Awaited, self.answered(kind, item));
            match applied {
                Ok(is_urgent) => urgency.raise(Urgency::Immediate, was_local || is_urgent),
                Err(rejection) => {
                    self.rejected.insert((kind, name.clone()), rejection.clone());
                    rejected.push((name.clone(), rejection));
                }
            }
        }
        self.changes += set + removed + outdated;
        if self.changes > CHANGES_PER_CLEANUP {
            self.changes = 0;
            self.store.drop_unused();
        }
        let answer = self.session.finish(update, &rejected);
        Ok(Applied { answer, unsubscriptions, kind, set, removed, outdated, rejected, urgency })
    }

    /// Does most of the work of the next [`snapshot`](Self::snapshot).
    pub fn index(&mut self) {
        self.store.index();
    }

    /// The mesh after all responses.
    pub fn snapshot(&mut self) -> Mesh {
        let answered = self.lookups.as_ref().map(|lookups| lookups.answered().clone());
        self.store.snapshot().with_answered(answered)
    }

    /// Whether the accepted version of a resource is a local workload.
    fn is_local(&self, kind: ResourceType, name: &str) -> bool {
        let workload = self.store.workload(name).filter(|_| kind == ResourceType::Address);
        workload.is_some_and(|workload| self.local.contains(workload))
    }

    /// The addresses of a workload or service.
    fn aliases(&self, kind: ResourceType, name: &str) -> Vec<Lookup> {
        match (&self.lookups, kind) {
            (Some(_), ResourceType::Address) => self.store.aliases(name),
            _ => Vec::new(),
        }
    }

    /// The requests that end the subscriptions to removed resources that no lookup names: istiod
    /// keeps them, and would not answer a later lookup of the name.
    fn unsubscriptions(&self, kind: ResourceType, removed: &[String]) -> Vec<DeltaRequest> {
        let lookups = self.lookups.as_ref().filter(|_| kind == ResourceType::Address);
        let Some(lookups) = lookups else { return Vec::new() };
        let names = removed.iter().filter(|name| !lookups.contains(name));
        unsubscriptions(names.filter(|name| self.session.retains(kind, name)).cloned())
    }

    /// Records a resource as the answer to the lookups of its names. Returns whether an answer
    /// changes.
    fn answered(&mut self, kind: ResourceType, Item { name, aliases, .. }: &Item) -> bool {
        let known = self.aliases(kind, name);
        let Some(lookups) = self.lookups.as_mut().filter(|_| kind == ResourceType::Address) else {
            return false;
        };
        let aliases = aliases.iter().map(String::as_str).chain(known.iter().map(Lookup::as_str));
        let names = std::iter::once(&**name).chain(aliases);
        names.fold(false, |changed, name| lookups.mentioned(name, true) | changed)
    }

    /// Records that a resource does not have these addresses `before` any longer. Returns whether
    /// an answer changes.
    fn outdated(&mut self, kind: ResourceType, name: &str, before: &[Lookup]) -> bool {
        let after = self.aliases(kind, name);
        let Some(lookups) = &mut self.lookups else { return false };
        let gone = before.iter().filter(|alias| !after.contains(alias));
        gone.fold(false, |changed, alias| lookups.outdate(alias.as_str()) | changed)
    }

    /// Applies a resource, or rejects it. Returns whether its change must take effect at once.
    fn apply(&mut self, kind: ResourceType, item: &Item) -> Result<bool, Rejection> {
        let applied = match (&item.problem, kind) {
            (Some(problem), _) => Err(problem.clone()),
            (None, ResourceType::Address) => self.address(&item.name, &item.content),
            (None, ResourceType::Authorization) => self.policy(&item.name, &item.content),
        };
        if applied.is_err() {
            self.reject(kind, item);
        }
        applied
    }

    /// Applies a workload or a service. Returns whether it is a local workload.
    fn address(&mut self, name: &Name, content: &Bytes) -> Result<bool, Rejection> {
        let shared = self.store.shared();
        match Address::decode(content.clone())?.kind.ok_or(Rejection::Type)? {
            AddressType::Workload(given) => {
                let draft = workload(name.clone(), &given, shared)?;
                let is_local = self.local.contains(&draft.workload);
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
        let policy = policy(name, content, self.store.shared())?;
        self.substitutes.remove(name);
        self.store.set_policy(name.clone(), policy);
        Ok(true)
    }

    /// Keeps the accepted version of a rejected resource. Connections that only the rejected one
    /// may forbid are refused.
    fn reject(&mut self, kind: ResourceType, item: &Item) {
        let Item { name, aliases, content, .. } = item;
        match kind {
            ResourceType::Address => {
                let addresses = addresses_of(content, aliases, self.store.shared());
                self.store.withhold(name.clone(), addresses);
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

    /// Forgets that the last version of a resource was rejected.
    fn accepted(&mut self, kind: ResourceType, name: &str) {
        if !self.rejected.is_empty() {
            self.rejected.remove(&(kind, Name::from(name)));
        }
    }

    fn remove(&mut self, kind: ResourceType, name: &str) {
        self.accepted(kind, name);
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
    /// Whether this process serves `workload`.
    pub fn contains(&self, workload: &Workload) -> bool {
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
