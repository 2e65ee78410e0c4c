//! Nodes and pods for the tests of this crate.

use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use underpass_config::{Any, Mesh, Resource, ResourceType, Settings, Sources};
use underpass_interception::{Entered, LocalAddresses, NamespaceAccess, Sockets};

use crate::decide::connection_registry::Registries;
use crate::decide::policy::PolicyContext;
use crate::decide::snapshot::Snapshot;
use crate::limits::{Descriptors, Limits};
use crate::mesh::on_demand::Lookups;
use crate::node::Node;
use crate::node::pod::{Pod, PodId};
use crate::node::sockets::PodSockets;
use crate::process::pause_gate::PauseGate;
use crate::traffic::inbound_drain::InboundDrain;

/// The settings of a workload `server`, followed by `more` settings.
pub(crate) fn settings(more: &[&str]) -> Settings {
    let files =
        "identity.certificate=c.pem identity.key=c.key identity.roots=r.pem workload.name=server";
    let flags = files.split(' ').chain(more.iter().copied()).map(str::to_owned).collect();
    let sources = Sources { file: None, environment: Vec::new(), flags };
    sources.load().expect("settings")
}

/// A pod with the settings `more`, without credentials.
pub(crate) fn pod(more: &[&str]) -> Arc<Pod> {
    let settings = settings(more);
    let here = Entered::current().expect("a namespace");
    let closing = CancellationToken::new();
    Arc::new(Pod {
        id: PodId::next(),
        name: Arc::new((&settings.workload).into()),
        context: PolicyContext::new(&settings),
        limits: Limits::new(&settings.limits, 2).pod(),
        sockets: sockets(&settings),
        credentials: None,
        endpoints: Arc::default(),
        self_test: crate::rules::self_test::SelfTest::default(),
        accepting: PauseGate::default(),
        interception: watch::Sender::new(settings.interception).subscribe(),
        connections: Registries::new(2),
        local: LocalAddresses::open(&here).expect("a netlink socket"),
        inbound_drain: InboundDrain::new(&closing),
        closing,
        seats: TaskTracker::new(),
        queries: TaskTracker::new(),
        failed_names: Arc::default(),
        lookups: Lookups::default(),
    })
}

/// A pod with the settings `more` that uses the lookups of a node.
pub(crate) fn pod_of(node: &Node, more: &[&str]) -> Arc<Pod> {
    let pod = Arc::into_inner(pod(more)).expect("the only reference");
    Arc::new(Pod { lookups: node.lookups.of_pod(), ..pod })
}

/// Sockets of the current namespace.
pub(crate) fn sockets(settings: &Settings) -> Arc<PodSockets> {
    let access = NamespaceAccess::current().expect("a thread");
    let sockets = Sockets::new(&settings.interception, false);
    PodSockets::new(access, sockets, Descriptors::new(10_000, 0, 1))
}

/// The metrics that `act` changes.
pub(crate) fn metrics_after(act: impl FnOnce()) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, act);
    recorder.handle().render()
}

/// A node with this many workers and an empty mesh. Requires a runtime.
pub(crate) fn node(workers: usize) -> Arc<Node> {
    let mesh = watch::Sender::new(snapshot(1, "workloads: []")).subscribe();
    node_in(workers, mesh)
}

/// A node with this many workers that follows a mesh. Requires a runtime.
pub(crate) fn node_in(workers: usize, mesh: watch::Receiver<Arc<Snapshot>>) -> Arc<Node> {
    node_with(workers, mesh, Lookups::default())
}

/// A node with one worker that follows a mesh with lookups on demand. Requires a runtime.
pub(crate) fn node_on_demand(mesh: watch::Receiver<Arc<Snapshot>>) -> Arc<Node> {
    node_with(1, mesh, Lookups::on_demand())
}

fn node_with(workers: usize, mesh: watch::Receiver<Arc<Snapshot>>, lookups: Lookups) -> Arc<Node> {
    let (settings, access) = (settings(&[]), NamespaceAccess::current().expect("a thread"));
    Arc::new(Node::new(
        &settings,
        &access,
        workers,
        mesh,
        lookups,
        PauseGate::default(),
        Arc::default(),
    ))
}

/// The mesh of a file with this content, as this generation.
pub(crate) fn snapshot(generation: u64, mesh: &str) -> Arc<Snapshot> {
    let mesh = Arc::new(Mesh::from_text("mesh", mesh).expect("a mesh"));
    Arc::new(Snapshot::new(mesh, &settings(&[]).workload, generation))
}

/// The workload `uid-HOST` of a control plane at `10.0.0.HOST`.
pub(crate) fn workload_resource(host: u8) -> Resource {
    named_workload_resource("ns", "", host)
}

/// The same workload with this namespace and name:
/// `Address { workload: { name, namespace, addresses, uid } }`.
pub(crate) fn named_workload_resource(namespace: &str, workload: &str, host: u8) -> Resource {
    let name = format!("uid-{host}");
    let content = [
        field(&[0x0a], workload.as_bytes()),
        field(&[0x12], namespace.as_bytes()),
        field(&[0x1a], &[10, 0, 0, host]),
        field(&[0xa2, 1], name.as_bytes()),
    ];
    let value = field(&[0x0a], &content.concat());
    let any = Any { type_url: ResourceType::Address.url().to_owned(), value: value.into() };
    Resource { version: "1".to_owned(), resource: Some(any), name, aliases: Vec::new() }
}

/// A field of protobuf with this tag.
fn field(tag: &[u8], value: &[u8]) -> Vec<u8> {
    [tag, &[u8::try_from(value.len()).expect("a short value")], value].concat()
}
