//! Folders and pods for the tests of the CNI source.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use tokio::sync::watch;
use underpass_config::{Mesh, Settings};
use underpass_interception::Namespace;

use super::attachment::{AttachedPod, Attachment, NetworkName, PodReference};
use super::facts::{FactFinder, FactOrigin};
use crate::decide::snapshot::Snapshot;
use crate::node::testing::settings;

/// A temporary folder, removed on drop.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        // A short name, because the path of a Unix socket has at most 107 bytes.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Relaxed));
        let path = std::env::temp_dir().join(format!("underpass-cni-{process}-{number}"));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// The pod `shop/NAME` with the interface `eth0` of the container `NAME-1`.
pub(super) fn attached(name: &str, addresses: &[&str]) -> AttachedPod {
    AttachedPod {
        attachment: Attachment::new(&format!("{name}-1"), "eth0").unwrap(),
        network: NetworkName::new("pods").unwrap(),
        pod: PodReference::new("shop", name, &format!("uid-of-{name}")).unwrap(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        namespace_path: namespace_path("uts"),
        dns: None,
    }
}

/// A namespace of this process of another kind, such as `uts`. Opening it needs no privilege.
pub(super) fn namespace(kind: &str) -> Namespace {
    Namespace::open(namespace_path(kind)).unwrap()
}

pub(super) fn namespace_path(kind: &str) -> String {
    format!("/proc/{}/ns/{kind}", std::process::id())
}

/// Facts from a mesh that has the pods `web` and `db` of the namespace `shop`. `core` is exempt.
pub(super) fn facts() -> (FactFinder, watch::Sender<Arc<Snapshot>>) {
    let settings = settings(&["node.exempt_namespaces=core"]);
    let mesh = watch::Sender::new(snapshot(&settings, &["web", "db"]));
    (FactFinder::new(&settings, FactOrigin::Mesh(mesh.subscribe())), mesh)
}

/// A mesh that has these pods of the namespace `shop`.
pub(super) fn snapshot(settings: &Settings, pods: &[&str]) -> Arc<Snapshot> {
    let workload = |name: &&str| {
        format!(
            "- {{name: {name}, namespace: shop, serviceAccount: {name}-account, hostname: {name}.example}}\n"
        )
    };
    let workloads: String = pods.iter().map(workload).collect();
    let mesh = Mesh::from_text("mesh", &format!("workloads:\n{workloads}")).unwrap();
    Arc::new(Snapshot::new(Arc::new(mesh), &settings.workload, 1))
}
