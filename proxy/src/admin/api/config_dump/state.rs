//! The served pods with their open connections, with ztunnel's keys.

use std::collections::BTreeMap;
use std::iter::once;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde_json::json;

use super::{append, list};
use crate::node::pod::Pod;
use crate::observe::party::Direction;
use crate::observe::pod_name::PodName;
use crate::observe::record::TrackedConnection;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionDump<T> {
    src: Option<SocketAddr>,
    /// Outbound: the address of the destination; inbound: the hostname of the service.
    original_dst: Option<T>,
    /// The address of the tunnel's listener, or of the destination.
    actual_dst: Option<SocketAddr>,
    protocol: &'static str,
}

/// The connections of one pod.
#[derive(Default)]
struct Connections {
    inbound: Vec<Arc<TrackedConnection>>,
    outbound: Vec<Arc<TrackedConnection>>,
}

/// The object of all pods, in chunks. Of two pods with one name, the newer one is shown.
pub(super) fn chunks(
    pods: Vec<Arc<Pod>>,
    open: Vec<Arc<TrackedConnection>>,
) -> impl Iterator<Item = Bytes> + Send {
    let mut of_pods: BTreeMap<Arc<PodName>, Connections> = BTreeMap::new();
    for connection in open {
        let of_pod = of_pods.entry(connection.pod.clone()).or_default();
        match connection.facts.direction {
            Direction::Inbound => of_pod.inbound.push(connection),
            Direction::Outbound => of_pod.outbound.push(connection),
        }
    }
    let by_name: BTreeMap<_, _> = pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect();
    let states = by_name.into_iter().enumerate().flat_map(move |(index, (name, pod))| {
        let Connections { inbound, outbound } = of_pods.remove(&name).unwrap_or_default();
        let comma = if index == 0 { "" } else { "," };
        let open =
            format!("{comma}{}:{{{},\"connections\":{{", json!(name.to_string()), head(&pod));
        once(Bytes::from(open))
            .chain(list("\"inbound\":[", inbound, write_inbound, "],"))
            .chain(list("\"outbound\":[", outbound, write_outbound, "]}}"))
    });
    once(Bytes::from("\"workloadState\":{")).chain(states).chain(once(Bytes::from("},")))
}

/// The fields of a pod without its connections.
fn head(pod: &Pod) -> String {
    let own = &pod.context.own;
    let awaits = pod.credentials.as_ref().is_some_and(|lease| lease.issued().is_none());
    let info = json!({
        "name": own.name,
        "namespace": own.namespace,
        "trustDomain": own.trust_domain.as_str(),
        "serviceAccount": own.service_account,
    });
    format!("\"state\":\"{}\",\"info\":{info}", if awaits { "Pending" } else { "Up" })
}

fn protocol(connection: &TrackedConnection) -> &'static str {
    if connection.facts.hbone.is_some() { "HBONE" } else { "TCP" }
}

fn write_inbound(connection: &TrackedConnection, chunk: &mut Vec<u8>) {
    let facts = &connection.facts;
    let dump = ConnectionDump {
        src: facts.source.address,
        original_dst: facts.service.as_ref().map(|service| &*service.hostname),
        actual_dst: facts.destination.address,
        protocol: protocol(connection),
    };
    append(chunk, &dump);
}

fn write_outbound(connection: &TrackedConnection, chunk: &mut Vec<u8>) {
    let facts = &connection.facts;
    let dump = ConnectionDump {
        src: facts.source.address,
        original_dst: facts.destination.address,
        actual_dst: facts.hbone.or(facts.destination.address),
        protocol: protocol(connection),
    };
    append(chunk, &dump);
}
