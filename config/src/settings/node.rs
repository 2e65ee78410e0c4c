//! The settings of a node daemon (`underpass node`).

use std::path::{Path, PathBuf};

/// The settings of a node daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSettings {
    /// The name of the node in logs.
    pub name: Option<String>,
    /// Where the daemon learns of its pods. `None`: the settings are those of a proxy for one pod.
    pub pods: Option<PodSourceSettings>,
    /// The namespaces whose pods are not enrolled.
    pub exempt_namespaces: Vec<String>,
}

/// Where a node daemon learns of its pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodSourceSettings {
    /// The Unix socket of the agent of istio-cni or Cilium, which speaks ZDS and installs the rules.
    Zds(PathBuf),
    /// The Unix socket at which the CNI plugin `underpass cni` connects.
    Cni(PathBuf),
    /// The folder with a file for each pod.
    Directory(PathBuf),
}

impl PodSourceSettings {
    /// The name of the source in settings and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Zds(_) => "zds",
            Self::Cni(_) => "cni",
            Self::Directory(_) => "directory",
        }
    }

    /// The socket or folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        let (Self::Zds(path) | Self::Cni(path) | Self::Directory(path)) = self;
        path
    }
}
