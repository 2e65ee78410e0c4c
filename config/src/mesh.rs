//! The mesh: an immutable snapshot of who is where and who speaks HBONE, and the source that publishes it.
//!
//! A snapshot is built whole, checked whole and swapped whole; whoever holds one sees one state of the mesh. Not here:
//! what is done with it. Routing belongs to the proxy.

mod document;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use crate::{ConfigErrors, SpiffeId};

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// By plain TCP.
    Tcp,
    /// Through a tunnel, and never otherwise.
    Hbone,
}

/// What kind of thing a workload is part of: Istio's four.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    /// A Deployment, or what is scaled like one.
    Deployment,
    /// A CronJob.
    CronJob,
    /// Nothing larger: a pod, or a process, by itself.
    Pod,
    /// A Job.
    Job,
}

/// Where in the world a workload runs. Empty: unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locality {
    /// A cloud's region.
    pub region: String,
    /// A zone in that region.
    pub zone: String,
    /// A part of that zone, such as a rack.
    pub subzone: String,
}

/// One workload: a pod, a VM, a process with an address and an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh; empty if the source gives none.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The service account that its identity is made of.
    pub service_account: String,
    /// Who it must prove to be.
    pub identity: SpiffeId,
    /// Where it is.
    pub addresses: Vec<IpAddr>,
    /// How it is reached.
    pub protocol: Protocol,
    /// What it is part of, as metrics call it (`source_workload`): a Deployment's name, or its own.
    pub workload_name: String,
    /// What kind of thing that is.
    pub workload_type: WorkloadType,
    /// The service that it mainly is, as metrics call it.
    pub canonical_name: String,
    /// The revision of that service.
    pub canonical_revision: String,
    /// The cluster that it is in.
    pub cluster_id: String,
    /// Where it runs.
    pub locality: Locality,
}

impl WorkloadType {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::Deployment, Self::CronJob, Self::Pod, Self::Job];

    /// As the mesh file and `baggage` call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// One state of the mesh.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    by_address: HashMap<IpAddr, Arc<Workload>>,
    workloads: usize,
}

impl Mesh {
    /// Reads a mesh file: ztunnel's `LOCAL_XDS_PATH` document.
    ///
    /// # Errors
    /// Every mistake in the file, or the one reason why it could not be read.
    pub fn from_file(path: &Path) -> Result<Self, ConfigErrors> {
        document::read(&crate::load::read_file(path)?)
    }

    /// Reads the same document from a text that is called `name` in errors.
    ///
    /// # Errors
    /// Every mistake in the text.
    pub fn from_text(name: &str, text: &str) -> Result<Self, ConfigErrors> {
        document::read(&crate::load::read_text(name, text)?)
    }

    /// The workload that has this address.
    pub fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// How many workloads the mesh has.
    pub fn len(&self) -> usize {
        self.workloads
    }

    /// Whether the mesh has no workload at all.
    pub fn is_empty(&self) -> bool {
        self.workloads == 0
    }

    /// Adds a workload; gives back the one that has one of its addresses already.
    fn insert(&mut self, workload: Workload) -> Result<(), (IpAddr, Arc<Workload>)> {
        let taken = |address: &IpAddr| Some((*address, self.by_address.get(address)?.clone()));
        if let Some(conflict) = workload.addresses.iter().find_map(taken) {
            return Err(conflict);
        }
        let workload = Arc::new(workload);
        for address in &workload.addresses {
            self.by_address.insert(*address, workload.clone());
        }
        self.workloads += 1;
        Ok(())
    }
}

/// Where the current snapshot is published.
#[derive(Debug)]
pub struct MeshSource {
    current: watch::Sender<Arc<Mesh>>,
}

impl MeshSource {
    /// A source whose mesh is a file, or empty when there is none.
    ///
    /// # Errors
    /// As [`Mesh::from_file`].
    pub fn open(file: Option<&Path>) -> Result<Self, ConfigErrors> {
        let mesh = file.map(Mesh::from_file).transpose()?.unwrap_or_default();
        Ok(Self { current: watch::Sender::new(Arc::new(mesh)) })
    }

    /// Follows the snapshots, beginning with the current one.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Mesh>> {
        self.current.subscribe()
    }
}
