//! `/config_dump`: the mesh, the certificates and the settings, with ztunnel's keys, so that
//! `istioctl ztunnel-config` reads it.

mod certificate;
mod policy;
mod service;
mod settings;
mod state;
mod workload;

use std::iter::once;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use serde::Serialize;
use serde_json::json;
use underpass_config::Mesh;

use crate::admin::api::version::version;
use crate::admin::state::Admin;
use crate::observe::record::TrackedConnection;

/// The length after which a chunk has no further item. One item, such as a service with many
/// endpoints, may be longer.
const CHUNK_BYTES: usize = 32 << 10;

/// The dump in chunks. Each is made when the client has read the ones before, from the mesh at the
/// time of the request. `open` are the open connections.
pub(crate) fn chunks(
    admin: &Admin,
    open: Vec<Arc<TrackedConnection>>,
) -> impl Stream<Item = Bytes> + Send + 'static {
    let mesh = admin.node.mesh.borrow().mesh.clone();
    let layers: Vec<&Arc<Mesh>> = once(&mesh).chain(mesh.fallback()).collect();
    let workloads = owned(layers.iter().flat_map(|mesh| mesh.workloads()));
    let services = owned(layers.iter().flat_map(|mesh| mesh.services()));
    let policies = owned(layers.iter().flat_map(|mesh| mesh.all_policies()));
    let rest = json!({
        "certificates": certificate::dump(admin),
        "stagedServices": {},
        "staticConfig": {},
        "version": version(admin),
        "config": settings::dump(&admin.settings),
    });
    let rest = rest.to_string();
    // Without the bracket that opens the object.
    let rest = rest.strip_prefix('{').unwrap_or_default().to_owned() + "\n";
    let chunks = list("{\"workloads\":[", workloads, workload::write, "],")
        .chain(list("\"services\":[", services, service::write, "],"))
        .chain(list("\"policies\":[", policies, policy::write, "],"))
        .chain(state::chunks(admin.node.pods.all(), open))
        .chain(once(rest.into()));
    stream::iter(chunks)
}

/// A list of the dump between these texts. `write` appends one item.
fn list<T: Send + Sync>(
    open: &'static str,
    items: Vec<Arc<T>>,
    write: fn(&T, &mut Vec<u8>),
    close: &'static str,
) -> impl Iterator<Item = Bytes> + Send {
    let mut next = 0;
    let chunks = std::iter::from_fn(move || {
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK_BYTES {
            let Some(item) = items.get(next) else { break };
            if next > 0 {
                chunk.push(b',');
            }
            write(item, &mut chunk);
            next += 1;
        }
        (!chunk.is_empty()).then(|| Bytes::from(chunk))
    });
    once(Bytes::from(open)).chain(chunks).chain(once(Bytes::from(close)))
}

/// Appends a value as JSON.
fn append(chunk: &mut Vec<u8>, value: &impl Serialize) {
    // Fails only for maps whose keys are no texts.
    serde_json::to_writer(chunk, value).ok();
}

fn owned<'a, T: 'a>(items: impl Iterator<Item = &'a Arc<T>>) -> Vec<Arc<T>> {
    items.cloned().collect()
}

#[cfg(test)]
mod tests;
