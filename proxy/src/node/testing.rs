//! Nodes and pods for the tests of this crate.

use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{Mesh, Settings, Sources};
use underpass_interception::{LocalAddresses, Sockets};

use super::{Node, Pod, PodId};
use crate::connection_registry::Registries;
use crate::limits::Limits;
use crate::pause_gate::PauseGate;
use crate::policy::PolicyContext;
use crate::snapshot::Snapshot;

/// The settings of a workload `server`, with others beside.
pub(crate) fn settings(more: &[&str]) -> Settings {
    let files =
        "identity.certificate=c.pem identity.key=c.key identity.roots=r.pem workload.name=server";
    let flags = files.split(' ').chain(more.iter().copied()).map(str::to_owned).collect();
    let sources = Sources { file: None, environment: Vec::new(), flags };
    sources.load().expect("settings")
}

/// A pod with these settings, without credentials.
pub(crate) fn pod(more: &[&str]) -> Arc<Pod> {
    let settings = settings(more);
    Arc::new(Pod {
        id: PodId::next(),
        context: PolicyContext::of(&settings),
        limits: Limits::new(&settings.limits, 2).pod(),
        sockets: Sockets::new(&settings.interception, false),
        credentials: None,
        endpoints: Arc::default(),
        self_test: crate::self_test::SelfTest::default(),
        interception: watch::Sender::new(settings.interception).subscribe(),
        connections: Registries::new(2),
        local: LocalAddresses::open().expect("a netlink socket"),
    })
}

/// A node of so many workers with an empty mesh. Needs a runtime.
pub(crate) fn node(workers: usize) -> Arc<Node> {
    let mesh = watch::Sender::new(snapshot(1, "workloads: []")).subscribe();
    node_in(workers, mesh)
}

/// A node of so many workers that follows a mesh. Needs a runtime.
pub(crate) fn node_in(workers: usize, mesh: watch::Receiver<Arc<Snapshot>>) -> Arc<Node> {
    Arc::new(Node::new(&settings(&[]), workers, mesh, PauseGate::default(), Arc::default()))
}

/// A generation of a mesh file with this content.
pub(crate) fn snapshot(generation: u64, mesh: &str) -> Arc<Snapshot> {
    let mesh = Arc::new(Mesh::from_text("mesh", mesh).expect("a mesh"));
    Arc::new(Snapshot::new(mesh, &settings(&[]).workload, generation))
}
