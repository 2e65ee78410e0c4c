//! The protocol of delta xDS on one stream, and the state that a client retains for the next one.
//!
//! ```text
//! open ──> one request for each type: all resources, with the names and versions retained; on
//!          demand only lookups, split into requests of limited size
//! receive ──> Update ──> finish ──> ACK, or NACK with the rejected names
//! ```
//!
//! istiod computes removals on a new stream from the retained names. So every name that was not
//! removed is retained, also that of a rejected resource. A request with too many names is sent
//! without them: its first response is the whole state, and removes every name that it lacks. So is
//! that of a control plane without versions (Cilium), which computes no removals.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use thiserror::Error;

use super::convert::Rejection;
use super::message::{DeltaRequest, DeltaResponse, Node, Resource, Status};
use super::on_demand::Lookups;
use super::resource_type::ResourceType;
use crate::mesh::Name;
use crate::mesh::lookup::Lookup;
use crate::mesh::names::{Map, Set};

/// The maximum size of one resource in bytes: a service with thousands of addresses.
const MAX_RESOURCE: usize = 1 << 20;
/// The maximum length of a name in bytes.
const MAX_NAME: usize = 2048;
/// The maximum number of resources of a type.
const MAX_RESOURCES: usize = 1 << 20;
/// The maximum size of a request in bytes: the default limit of gRPC servers, also that of istiod.
const MAX_REQUEST: usize = 4 << 20;
/// The maximum size in bytes of the names that a request subscribes to.
const MAX_NAMES: usize = 1 << 20;
/// The bytes of a name in a request besides its text: a tag and a length.
const NAME_OVERHEAD: usize = 4;
/// The maximum number of names in a NACK.
const MAX_REPORTED: usize = 20;
/// The name for all resources.
const ALL_NAMES: &str = "*";
/// `INVALID_ARGUMENT` of gRPC.
const INVALID_ARGUMENT: i32 = 3;

/// A violation of the protocol by the control plane. The response was not applied; the stream must
/// be closed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SessionError {
    /// A response of a type without a subscription.
    #[error("a response of the unknown type {0:?}")]
    UnknownType(String),
    /// More resources than the client's maximum.
    #[error("more than {MAX_RESOURCES} resources of type {}", .0.name())]
    TooMany(ResourceType),
    /// The state of the client was lost.
    #[error("no thread to apply a response")]
    Lost,
    /// An empty or overlong name.
    #[error("a resource without a usable name")]
    Name,
}

/// A response of the control plane, to be applied.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) kind: ResourceType,
    /// The names of removed resources, which are removed before `resources` are applied.
    pub(super) removed: Vec<String>,
    pub(super) resources: Vec<Item>,
    nonce: String,
}

/// A new or changed resource.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) name: Name,
    pub(super) aliases: Vec<String>,
    version: String,
    pub(super) content: Result<Bytes, Rejection>,
    /// Whether the version is the accepted one.
    pub(super) is_unchanged: bool,
}

/// The state of the client.
#[derive(Debug)]
pub(super) struct Session {
    node: Node,
    subscriptions: [Subscription; 2],
}

#[derive(Debug)]
struct Subscription {
    kind: ResourceType,
    /// The retained names with their versions; a version is empty if the resource was rejected or
    /// has none.
    versions: Map<Name, Box<str>>,
    /// Whether a response was applied, on any stream.
    synced: bool,
    /// Whether the next response is the whole state, because the stream began without the retained
    /// names.
    is_whole: bool,
}

impl Session {
    pub(super) fn new(node: Node) -> Self {
        let subscription =
            |kind| Subscription { kind, versions: Map::default(), synced: false, is_whole: false };
        Self { node, subscriptions: ResourceType::ALL.map(subscription) }
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// The first requests of a new stream: all resources, or with `lookups` only those addresses.
    pub(super) fn open(&mut self, mut lookups: Option<&mut Lookups>) -> Vec<DeltaRequest> {
        let mut node = Some(self.node.clone());
        let subscriptions = self.subscriptions.iter_mut();
        let requests = subscriptions.flat_map(|subscription| {
            let is_address = subscription.kind == ResourceType::Address;
            match lookups.as_deref_mut().filter(|_| is_address) {
                Some(lookups) => subscription.open_on_demand(node.take(), lookups),
                None => vec![subscription.open(node.take())],
            }
        });
        requests.collect()
    }

    /// Checks a response. The caller must apply the update and then call [`finish`](Self::finish).
    pub(super) fn receive(&self, response: DeltaResponse) -> Result<Update, SessionError> {
        let Some(subscription) = self.of_response(&response) else {
            let unknown = response.type_url.chars().take(100).collect();
            return Err(SessionError::UnknownType(unknown));
        };
        let DeltaResponse { resources, nonce, removed_resources: removed, .. } = response;
        let kind = subscription.kind;
        let removed = match subscription.is_whole {
            true => subscription.names_missing_in(&resources),
            false => removed,
        };
        let versions = &subscription.versions;
        let retained = if subscription.is_whole { 0 } else { versions.len() };
        let is_new = |one: &&Resource| retained == 0 || !versions.contains_key(&*one.name);
        if retained + resources.iter().filter(is_new).count() > MAX_RESOURCES {
            return Err(SessionError::TooMany(kind));
        }
        let resources = resources.into_iter().map(|resource| self.item(kind, resource));
        Ok(Update { kind, removed, resources: resources.collect::<Result<_, _>>()?, nonce })
    }

    /// The number of resources that [`receive`](Self::receive) removes at most.
    pub(super) fn max_removals(&self, response: &DeltaResponse) -> usize {
        let subscription = self.of_response(response).filter(|one| one.is_whole);
        subscription.map_or(response.removed_resources.len(), |one| one.versions.len())
    }

    fn of_response(&self, response: &DeltaResponse) -> Option<&Subscription> {
        self.subscriptions.iter().find(|one| one.kind.url() == response.type_url)
    }

    fn item(&self, kind: ResourceType, resource: Resource) -> Result<Item, SessionError> {
        let Resource { version, resource, name, aliases } = resource;
        if name.is_empty() || name.len() > MAX_NAME || version.len() > MAX_NAME {
            return Err(SessionError::Name);
        }
        let retained = self.subscription(kind).versions.get_key_value(&*name);
        let is_unchanged = retained.is_some_and(|(_, it)| !it.is_empty() && **it == *version);
        let name = retained.map_or_else(|| Arc::from(name), |(name, _)| name.clone());
        let content = match resource {
            Some(any) if any.type_url != kind.url() => Err(Rejection::Type),
            Some(any) if any.value.len() > MAX_RESOURCE => Err(Rejection::Size(any.value.len())),
            Some(any) => Ok(any.value),
            None => Err(Rejection::Type),
        };
        Ok(Item { name, aliases, version, content, is_unchanged })
    }

    /// Retains the names of an applied update. Returns the ACK, or the NACK if any resource was
    /// rejected.
    pub(super) fn finish(
        &mut self,
        update: Update,
        rejected: &[(Name, Rejection)],
    ) -> DeltaRequest {
        let Update { kind, removed, resources, nonce } = update;
        let Some(subscription) = self.subscriptions.iter_mut().find(|one| one.kind == kind) else {
            return DeltaRequest::default();
        };
        subscription.synced = true;
        subscription.is_whole = false;
        let versions = &mut subscription.versions;
        for name in &removed {
            versions.remove(&**name);
        }
        let refused: Map<&Name, ()> = rejected.iter().map(|(name, _)| (name, ())).collect();
        for Item { name, version, .. } in resources {
            if refused.contains_key(&name) {
                versions.entry(name).or_default();
            } else {
                versions.insert(name, version.into());
            }
        }
        DeltaRequest {
            type_url: kind.url().to_owned(),
            response_nonce: nonce,
            error_detail: (!rejected.is_empty()).then(|| nack(rejected)),
            ..DeltaRequest::default()
        }
    }

    /// The retained names with their versions.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn retained(
        &self,
        kind: ResourceType,
    ) -> std::collections::BTreeMap<String, String> {
        let versions = self.subscription(kind).versions.iter();
        versions.map(|(name, version)| (name.to_string(), version.to_string())).collect()
    }

    /// Whether the first state of this type was applied.
    pub(super) fn is_synced(&self, kind: ResourceType) -> bool {
        self.subscription(kind).synced
    }

    /// Whether this resource is retained. The control plane then has a subscription to its name.
    pub(super) fn retains(&self, kind: ResourceType, name: &str) -> bool {
        self.subscription(kind).versions.contains_key(name)
    }

    /// Forgets a resource.
    pub(super) fn forget(&mut self, kind: ResourceType, name: &str) {
        if let Some(subscription) = self.subscriptions.iter_mut().find(|one| one.kind == kind) {
            subscription.versions.remove(name);
        }
    }

    fn subscription(&self, kind: ResourceType) -> &Subscription {
        let [address, authorization] = &self.subscriptions;
        match kind {
            ResourceType::Address => address,
            ResourceType::Authorization => authorization,
        }
    }
}

impl Subscription {
    /// The first request of a new stream, for all resources.
    fn open(&mut self, node: Option<Node>) -> DeltaRequest {
        let is_versioned = self.versions.values().any(|version| !version.is_empty());
        let versions = self.retained(true);
        let mut request =
            DeltaRequest { node, initial_resource_versions: versions, ..self.request() };
        let is_too_large = request.encoded_len() > MAX_REQUEST;
        if is_too_large {
            request.initial_resource_versions = HashMap::new();
        }
        // istiod sends policies without versions, and computes their removals.
        self.is_whole = is_too_large || !is_versioned && self.kind == ResourceType::Address;
        request
    }

    /// The first requests of a new stream, for lookups only.
    fn open_on_demand(&self, node: Option<Node>, lookups: &mut Lookups) -> Vec<DeltaRequest> {
        let names = split(lookups.reopened().map(Lookup::to_string)).into_iter();
        let mut requests: Vec<_> = names.map(|names| self.subscribing(names)).collect();
        let Some(first) = requests.first_mut() else { return requests };
        first.node = node;
        // To subscribe to nothing (istiod, `deltaWatchedResources`).
        first.resource_names_subscribe.insert(0, ALL_NAMES.to_owned());
        first.resource_names_unsubscribe = vec![ALL_NAMES.to_owned()];
        // An unchanged resource is not sent again, so it would answer no lookup.
        first.initial_resource_versions = self.retained(!lookups.awaits_any());
        if first.encoded_len() > MAX_REQUEST {
            let retained = std::mem::take(&mut first.initial_resource_versions).into_keys();
            let names = split(retained.filter(|name| !lookups.contains(name))).into_iter();
            requests.extend(names.map(|names| self.subscribing(names)));
        }
        requests
    }

    fn subscribing(&self, resource_names_subscribe: Vec<String>) -> DeltaRequest {
        DeltaRequest { resource_names_subscribe, ..self.request() }
    }

    fn request(&self) -> DeltaRequest {
        DeltaRequest { type_url: self.kind.url().to_owned(), ..DeltaRequest::default() }
    }

    /// The retained names, with their versions or without.
    fn retained(&self, with_versions: bool) -> HashMap<String, String> {
        let versions = self.versions.iter().map(|(name, version)| {
            let version = if with_versions { version.to_string() } else { String::new() };
            (name.to_string(), version)
        });
        versions.collect()
    }

    /// The retained names without those of `resources`.
    fn names_missing_in(&self, resources: &[Resource]) -> Vec<String> {
        let sent: Set<&str> = resources.iter().map(|resource| &*resource.name).collect();
        let names = self.versions.keys().filter(|name| !sent.contains(&***name));
        names.map(|name| name.to_string()).collect()
    }
}

/// Splits names into parts for one request each, and at least one part.
fn split(names: impl Iterator<Item = String>) -> Vec<Vec<String>> {
    let (mut parts, mut part, mut size) = (Vec::new(), Vec::new(), 0);
    for name in names {
        if size + name.len() > MAX_NAMES {
            parts.push(std::mem::take(&mut part));
            size = 0;
        }
        size += name.len() + NAME_OVERHEAD;
        part.push(name);
    }
    parts.push(part);
    parts
}

fn nack(rejected: &[(Name, Rejection)]) -> Status {
    let mut message = String::new();
    for (name, reason) in rejected.iter().take(MAX_REPORTED) {
        // Writing to a string cannot fail.
        write!(message, "{name}: {reason}; ").ok();
    }
    if let Some(more @ 1..) = rejected.len().checked_sub(MAX_REPORTED) {
        write!(message, "and {more} more").ok();
    }
    Status { code: INVALID_ARGUMENT, message: message.trim_end_matches("; ").to_owned() }
}

#[cfg(test)]
mod tests;
