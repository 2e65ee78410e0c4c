//! The mesh file: who is where, and who speaks HBONE.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::OrFail;
use crate::pods::Pod;

/// A mesh file in the making. Names are also service accounts; everybody is in the namespace `default` of `cluster.local`.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    workloads: String,
}

impl Mesh {
    /// Adds a pod, which speaks HBONE.
    #[must_use]
    pub fn hbone(self, pod: &Pod) -> Self {
        self.workload(pod.name(), &pod.ips(), "HBONE")
    }

    /// Adds a pod, which speaks TCP only.
    #[must_use]
    pub fn tcp(self, pod: &Pod) -> Self {
        self.workload(pod.name(), &pod.ips(), "TCP")
    }

    /// Adds any workload.
    #[must_use]
    pub fn workload(mut self, name: &str, ips: &[IpAddr], protocol: &str) -> Self {
        let ips: Vec<_> = ips.iter().map(|ip| format!("\"{ip}\"")).collect();
        self.workloads.push_str(&format!(
            "- {{name: {name}, serviceAccount: {name}, protocol: {protocol}, workloadIps: [{}]}}\n",
            ips.join(", ")
        ));
        self
    }

    /// Adds a pod of another trust domain, which speaks HBONE.
    #[must_use]
    pub fn foreign(mut self, pod: &Pod, trust_domain: &str) -> Self {
        self = self.hbone(pod);
        let last = self.workloads.trim_end().len() - 1;
        self.workloads.insert_str(last, &format!(", trustDomain: {trust_domain}"));
        self
    }

    /// Writes it as `NAME.yaml` beside the other files of the pod's world.
    #[must_use]
    pub fn write(&self, pod: &Pod, name: &str) -> PathBuf {
        let file = pod.folder().join(format!("{name}.yaml"));
        let text = if self.workloads.is_empty() {
            "workloads: []\n".to_owned()
        } else {
            format!("workloads:\n{}", self.workloads)
        };
        fs::write(&file, text).or_fail("write a mesh file");
        file
    }
}
