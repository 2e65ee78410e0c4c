//! The settings of a control plane that serves the mesh.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::WorkloadSettings;
use crate::mesh::lookup::Lookup;

/// The client of a control plane (delta xDS, as istiod serves it to ztunnel).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XdsSettings {
    /// `https://HOST:PORT`.
    pub address: String,
    /// The name in the server's certificate, if it differs from the host of `address`.
    pub server_name: Option<String>,
    /// PEM: the roots that verify the server's certificate. Read for every connection.
    pub roots: PathBuf,
    /// The file with the bearer token. Read for every connection.
    pub token: Option<PathBuf>,
    /// PEM: the client's certificate with its chain, and its key. Read for every connection.
    pub client: Option<(PathBuf, PathBuf)>,
    /// The id of our cluster, sent as a header and in the node's metadata.
    pub cluster_id: String,
    /// Further headers of the request.
    pub headers: Vec<XdsHeader>,
    /// Whether addresses are looked up on demand.
    pub on_demand: bool,
    /// The duration of an outage of the control plane after which the process is not ready.
    pub unready_after: Option<Duration>,
    /// The name of this client.
    pub name: String,
    /// The namespace of this client, which must be that of the token.
    pub namespace: String,
}

impl XdsSettings {
    /// The lookup of `pod` by its name. `None` unless addresses are looked up on demand.
    pub fn lookup_of(&self, pod: &WorkloadSettings) -> Option<Lookup> {
        self.on_demand.then(|| Lookup::pod(&self.cluster_id, &pod.namespace, &pod.name))
    }
}

/// A header of the request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct XdsHeader {
    /// The name.
    pub name: String,
    /// The value.
    pub value: String,
}

impl fmt::Display for XdsHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}
