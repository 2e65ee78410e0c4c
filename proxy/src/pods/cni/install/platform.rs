//! The folders of CNI plugins and network configurations on known platforms.

use std::path::Path;

/// A platform whose container runtime has its own folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Platform {
    /// kubeadm, and most others: /etc/cni/net.d and /opt/cni/bin
    Kubeadm,
    /// k3s: /var/lib/rancher/k3s/agent/etc/cni/net.d and /var/lib/rancher/k3s/data/cni
    K3s,
    /// MicroK8s: /var/snap/microk8s/current/args/cni-network and …/current/opt/cni/bin
    Microk8s,
    /// Google Kubernetes Engine: /etc/cni/net.d and /home/kubernetes/bin
    Gke,
}

impl Platform {
    pub(crate) fn network_folder(self) -> &'static Path {
        Path::new(match self {
            Self::Kubeadm | Self::Gke => "/etc/cni/net.d",
            Self::K3s => "/var/lib/rancher/k3s/agent/etc/cni/net.d",
            Self::Microk8s => "/var/snap/microk8s/current/args/cni-network",
        })
    }

    /// The folder of the plugins' binaries.
    pub(crate) fn program_folder(self) -> &'static Path {
        Path::new(match self {
            Self::Kubeadm => "/opt/cni/bin",
            Self::K3s => "/var/lib/rancher/k3s/data/cni",
            Self::Microk8s => "/var/snap/microk8s/current/opt/cni/bin",
            Self::Gke => "/home/kubernetes/bin",
        })
    }
}
