//! Requests that begin or end subscriptions to addresses by name, each below the size limit of the
//! peer.

use super::message::DeltaRequest;
use super::resource_type::ResourceType;

/// The maximum size in bytes of the names in a request: a quarter of the default limit of gRPC
/// servers, also that of istiod.
const MAX_NAMES: usize = 1 << 20;
/// The bytes of a name in a request besides its text: a tag and a length.
const NAME_OVERHEAD: usize = 4;

/// A name without a resource, which every request subscribes to that ends subscriptions. istiod
/// answers a request without subscriptions with the removal of all names (`pushDeltaXds`). It is
/// neither an address nor in a valid namespace, so that no connection looks it up.
pub(super) const NOTHING: &str = "-/-";

/// The requests that subscribe to these names.
pub(super) fn subscriptions(names: impl Iterator<Item = String>) -> Vec<DeltaRequest> {
    let requests = split(names).into_iter();
    requests.map(|names| DeltaRequest { resource_names_subscribe: names, ..addresses() }).collect()
}

/// The requests that end the subscriptions to these names.
pub(super) fn unsubscriptions(names: impl Iterator<Item = String>) -> Vec<DeltaRequest> {
    let requests = split(names).into_iter().map(|names| DeltaRequest {
        resource_names_subscribe: vec![NOTHING.to_owned()],
        resource_names_unsubscribe: names,
        ..addresses()
    });
    requests.collect()
}

fn addresses() -> DeltaRequest {
    DeltaRequest { type_url: ResourceType::Address.url().to_owned(), ..DeltaRequest::default() }
}

/// Splits names into parts for one request each.
fn split(names: impl Iterator<Item = String>) -> Vec<Vec<String>> {
    let (mut parts, mut part, mut size) = (Vec::new(), Vec::new(), 0);
    for name in names {
        let added = name.len() + NAME_OVERHEAD;
        if size + added > MAX_NAMES {
            parts.push(std::mem::take(&mut part));
            size = 0;
        }
        size += added;
        part.push(name);
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}
