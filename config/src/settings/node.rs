//! The settings of a node daemon (`underpass node`).

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::Word;

/// The settings of a node daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSettings {
    /// The name of the node in logs.
    pub name: Option<String>,
    /// The source of the daemon's pods. `None` means that the settings are those of a proxy for one
    /// pod.
    pub pods: Option<PodSourceSettings>,
    /// The namespaces whose pods are not enrolled.
    pub exempt_namespaces: Vec<String>,
    /// Whether the daemon changes the source address of the node's own connections to its pods.
    pub probes: NodeProbes,
    /// Whether the daemon reads facts about its pods from the API server of Kubernetes.
    pub kubernetes: KubernetesWatch,
    /// The kubeconfig file with the address and the credential of the API server.
    pub kubeconfig: Option<PathBuf>,
    /// The DNS servers of the cluster; empty means those of the node's file.
    pub cluster_dns: Vec<IpAddr>,
    /// The folder in which container runtimes keep the results of CNI plugins.
    pub cni_results: PathBuf,
    /// The folders in which the daemon installs the CNI plugin and keeps it installed.
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

/// Whether the node's own connections to its pods, such as the kubelet's probes, get the source
/// address that `interception.kubelet_probes` exempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeProbes {
    /// They get the address, by rules in the host's network namespace.
    Translate,
    /// They keep their source address.
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

/// Whether a node daemon watches its pods at the API server of Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KubernetesWatch {
    /// Watch if there is a kubeconfig file or a service account.
    Auto,
    /// Never watch.
    Off,
}

impl Word for KubernetesWatch {
    const WORDS: &'static [(&'static str, Self)] = &[("auto", Self::Auto), ("off", Self::Off)];
}

impl fmt::Display for KubernetesWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The source of a node daemon's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodSourceSettings {
    /// The Unix socket of the agent of istio-cni or Cilium, which uses ZDS and installs the rules.
    Zds(PathBuf),
    /// The Unix socket for the CNI plugin `underpass cni`.
    Cni(PathBuf),
    /// The folder whose files name the pods, one file for each pod.
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
