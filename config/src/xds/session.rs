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
//! without them, and a control plane without versions (Cilium) computes no removals. The stream
//! then begins with the whole state, which removes every name that it lacks. It is complete when
//! the policies arrive, because they are requested last and requests are answered in order. The
//! first response of addresses may be another one: Cilium sends changes that it queued before the
//! stream began. Policies without a response of addresses before them remove no address.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher as _};
use std::sync::Arc;

use bytes::Bytes;
use prost::{DecodeError, Message as _};
use thiserror::Error;

use super::convert::Rejection;
use super::message::{DeltaRequest, DeltaResponse, Node, Resource, Status};
use super::on_demand::Lookups;
use super::request::subscriptions;
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
    /// A resource that is not one.
    #[error("a resource cannot be decoded: {0}")]
    Encoding(#[from] DecodeError),
    /// An overlong name, or a policy without a name.
    #[error("a resource without a usable name")]
    Name,
}

/// A response of the control plane, to be applied.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) kind: ResourceType,
    /// The names of removed resources, which are removed before `resources` are applied.
    pub(super) removed: Vec<String>,
    /// The names of addresses that the whole state lacks, which this response completes.
    pub(super) outdated: Vec<String>,
    pub(super) resources: Vec<Item>,
    nonce: String,
}

/// A new or changed resource.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) name: Name,
    pub(super) aliases: Vec<String>,
    version: String,
    /// Empty if the resource has none of its type.
    pub(super) content: Bytes,
    /// Why the content cannot be used.
    pub(super) problem: Option<Rejection>,
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
    /// Whether a response was applied on this stream.
    answered: bool,
    /// The names in the whole state that the stream begins with, as far as it was sent. `None` if
    /// responses are differences.
    whole: Option<Set<Name>>,
}

impl Session {
    pub(super) fn new(node: Node) -> Self {
        let subscription = |kind| Subscription {
            kind,
            versions: Map::default(),
            synced: false,
            answered: false,
            whole: None,
        };
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
        let is_complete = kind == ResourceType::Authorization;
        let resources = resources.into_iter().map(|resource| self.item(kind, resource));
        let resources: Vec<_> = resources.collect::<Result<_, _>>()?;
        let removed = match &subscription.whole {
            Some(_) if is_complete => subscription.names_missing_in(&resources),
            _ => removed,
        };
        let addresses = self.subscription(ResourceType::Address);
        let outdated = if is_complete { addresses.outdated() } else { Vec::new() };
        let is_new = |one: &&Item| !subscription.has_sent(&one.name);
        if subscription.sent() + resources.iter().filter(is_new).count() > MAX_RESOURCES {
            return Err(SessionError::TooMany(kind));
        }
        Ok(Update { kind, removed, outdated, resources, nonce })
    }

    /// The number of resources that [`receive`](Self::receive) removes at most.
    pub(super) fn max_removals(&self, response: &DeltaResponse) -> usize {
        let whole = self.subscriptions.iter().filter(|one| one.whole.is_some());
        let missing = match self.of_response(response).map(|one| one.kind) {
            Some(ResourceType::Authorization) => whole.map(|one| one.versions.len()).sum(),
            _ => 0,
        };
        response.removed_resources.len() + missing
    }

    fn of_response(&self, response: &DeltaResponse) -> Option<&Subscription> {
        self.subscriptions.iter().find(|one| one.kind.url() == response.type_url)
    }

    fn item(&self, kind: ResourceType, encoded: Bytes) -> Result<Item, SessionError> {
        let Resource { version, resource, name, aliases } = Resource::decode(encoded)?;
        let is_nameless = name.is_empty();
        let must_have_name = kind == ResourceType::Authorization;
        if name.len() > MAX_NAME || version.len() > MAX_NAME || is_nameless && must_have_name {
            return Err(SessionError::Name);
        }
        let content = resource.filter(|any| any.type_url == kind.url()).map(|any| any.value);
        let problem = match &content {
            None => Some(Rejection::Type),
            Some(content) if content.len() > MAX_RESOURCE => Some(Rejection::Size(content.len())),
            Some(_) => is_nameless.then_some(Rejection::Nameless),
        };
        let content = content.unwrap_or_default();
        let name = if is_nameless { substitute_for_name(&content) } else { name };
        let retained = self.subscription(kind).versions.get_key_value(&*name);
        let is_unchanged = retained.is_some_and(|(_, it)| !it.is_empty() && **it == *version);
        let name = retained.map_or_else(|| Arc::from(name), |(name, _)| name.clone());
        Ok(Item { name, aliases, version, content, problem, is_unchanged })
    }

    /// Retains the names of an applied update. Returns the ACK, or the NACK if any resource was
    /// rejected.
    pub(super) fn finish(
        &mut self,
        update: Update,
        rejected: &[(Name, Rejection)],
    ) -> DeltaRequest {
        let Update { kind, removed, outdated, resources, nonce } = update;
        if kind == ResourceType::Authorization {
            self.complete(&outdated);
        }
        let Some(subscription) = self.subscriptions.iter_mut().find(|one| one.kind == kind) else {
            return DeltaRequest::default();
        };
        subscription.synced = true;
        subscription.answered = true;
        subscription.note_sent(&removed, &resources);
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

    /// Ends the whole state, which lacks these addresses. Later responses are differences.
    fn complete(&mut self, outdated: &[String]) {
        for subscription in &mut self.subscriptions {
            subscription.whole = None;
        }
        outdated.iter().for_each(|name| self.forget(ResourceType::Address, name));
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
        let is_whole = is_too_large || !is_versioned && self.kind == ResourceType::Address;
        self.whole = is_whole.then(Set::default);
        self.answered = false;
        request
    }

    /// The first requests of a new stream, for lookups only.
    fn open_on_demand(&self, node: Option<Node>, lookups: &mut Lookups) -> Vec<DeltaRequest> {
        let names = lookups.reopened().map(Lookup::to_string);
        let mut requests = subscriptions(names).into_iter();
        let mut first = requests.next().unwrap_or_else(|| self.request());
        first.node = node;
        // To subscribe to nothing (istiod, `deltaWatchedResources`).
        first.resource_names_subscribe.insert(0, ALL_NAMES.to_owned());
        first.resource_names_unsubscribe = vec![ALL_NAMES.to_owned()];
        // An unchanged resource is not sent again, so it would answer no lookup.
        first.initial_resource_versions = self.retained(!lookups.awaits_any());
        let mut retained = HashMap::new();
        if first.encoded_len() > MAX_REQUEST {
            std::mem::swap(&mut first.initial_resource_versions, &mut retained);
        }
        let retained = retained.into_keys().filter(|name| !lookups.contains(name));
        std::iter::once(first).chain(requests).chain(subscriptions(retained)).collect()
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

    /// The number of resources that the control plane has, as far as it has sent them.
    fn sent(&self) -> usize {
        self.whole.as_ref().map_or(self.versions.len(), Set::len)
    }

    fn has_sent(&self, name: &str) -> bool {
        match &self.whole {
            Some(sent) => sent.contains(name),
            None => self.versions.contains_key(name),
        }
    }

    /// Records the names of a response that is part of the whole state.
    fn note_sent(&mut self, removed: &[String], resources: &[Item]) {
        let Some(sent) = &mut self.whole else { return };
        for name in removed {
            sent.remove(&**name);
        }
        sent.extend(resources.iter().map(|item| item.name.clone()));
    }

    /// The retained names that the whole state lacks. None without a response on this stream: a
    /// control plane that fails to answer the request (Cilium, `handleAddressTypeURL`) still
    /// answers the one for policies, and every workload would be reached in plaintext.
    fn outdated(&self) -> Vec<String> {
        let Some(sent) = self.whole.as_ref().filter(|_| self.answered) else { return Vec::new() };
        let names = self.versions.keys().filter(|name| !sent.contains(*name));
        names.map(|name| name.to_string()).collect()
    }

    /// The retained names without those of `resources`.
    fn names_missing_in(&self, resources: &[Item]) -> Vec<String> {
        let sent: Set<&str> = resources.iter().map(|item| &*item.name).collect();
        let names = self.versions.keys().filter(|name| !sent.contains(&***name));
        names.map(|name| name.to_string()).collect()
    }
}

/// A name for an address without one, so that several of them are distinct. Cilium sends endpoints
/// without the UID of their pod if an older version has written them.
fn substitute_for_name(content: &Bytes) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    format!("(no name) {:016x}", hasher.finish())
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
