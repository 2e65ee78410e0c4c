//! The settings of a node daemon (`underpass node`).

use std::fmt;
use std::path::{Path, PathBuf};

use super::Word;

/// The settings of a node daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSettings {
    /// The name of the node in logs.
    pub name: Option<String>,
    /// Where the daemon learns of its pods. `None`: the settings are those of a proxy for one pod.
    pub pods: Option<PodSourceSettings>,
    /// The namespaces whose pods are not enrolled.
    pub exempt_namespaces: Vec<String>,
    /// Whether the daemon translates the node's own connections to its pods.
    pub probes: NodeProbes,
    /// Where the daemon installs the CNI plugin and keeps it installed.
    pub cni_install: Option<CniInstallSettings>,
}

/// The folders of a container runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniInstallSettings {
    /// The folder of the network configurations.
    pub net_dir: PathBuf,
    /// The folder of the plugins.
    pub bin_dir: PathBuf,
}

/// Whether the source of the node's own connections to its pods, such as the kubelet's probes,
/// becomes the probe address that `interception.kubelet_probes` exempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeProbes {
    /// Yes, by rules in the host's network namespace.
    Translate,
    /// No.
    Off,
}

impl Word for NodeProbes {
    const WORDS: &'static [(&'static str, Self)] =
        &[("translate", Self::Translate), ("off", Self::Off)];
}

impl fmt::Display for NodeProbes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Where a node daemon learns of its pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodSourceSettings {
    /// The Unix socket of the agent of istio-cni or Cilium, which speaks ZDS and installs the
    /// rules.
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
