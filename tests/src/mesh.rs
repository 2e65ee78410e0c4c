//! Builds the mesh file: workloads, services and policies.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::or_fail::OrFail;
use crate::pods::Pod;

/// A mesh file. Names are also service accounts; all items are in the namespace `default` of
/// `cluster.local`.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    workloads: String,
    services: String,
    policies: String,
}

impl Mesh {
    /// Adds a pod that supports HBONE.
    #[must_use]
    pub fn hbone(self, pod: &Pod) -> Self {
        self.workload(pod.name(), &pod.ips(), "HBONE")
    }

    /// Adds a pod that supports only TCP.
    #[must_use]
    pub fn tcp(self, pod: &Pod) -> Self {
        self.workload(pod.name(), &pod.ips(), "TCP")
    }

    /// Adds a workload.
    #[must_use]
    pub fn workload(self, name: &str, ips: &[IpAddr], protocol: &str) -> Self {
        self.workload_with(name, ips, protocol, "")
    }

    /// Adds a workload with additional fields, such as `, capacity: 2`.
    #[must_use]
    pub fn workload_with(
        mut self,
        name: &str,
        ips: &[IpAddr],
        protocol: &str,
        fields: &str,
    ) -> Self {
        let ips: Vec<_> = ips.iter().map(|ip| format!("\"{ip}\"")).collect();
        self.workloads.push_str(&format!(
            "- {{name: {name}, serviceAccount: {name}, protocol: {protocol}, workloadIps: [{}]{fields}}}\n",
            ips.join(", ")
        ));
        self
    }

    /// Adds a service with these fields; its namespace is `default`.
    #[must_use]
    pub fn service(mut self, fields: &str) -> Self {
        self.services.push_str(&format!("- {{namespace: default, {fields}}}\n"));
        self
    }

    /// Adds a policy for the namespace.
    #[must_use]
    pub fn policy(mut self, name: &str, action: &str, rules: &str) -> Self {
        self.policies.push_str(&format!(
            "- {{name: {name}, namespace: default, scope: Namespace, action: {action}, dryRun: false, rules: {rules}}}\n"
        ));
        self
    }

    /// Sets `dryRun` on all policies so far.
    #[must_use]
    pub fn dry_run(mut self) -> Self {
        self.policies = self.policies.replace("dryRun: false", "dryRun: true");
        self
    }

    /// Adds a policy for the workloads that reference it.
    #[must_use]
    pub fn selector_policy(mut self, name: &str, action: &str, rules: &str) -> Self {
        self = self.policy(name, action, rules);
        let scope = self.policies.rfind("scope: Namespace").expect("the policy was just written");
        self.policies.replace_range(scope..scope + 16, "scope: WorkloadSelector");
        self
    }

    /// Adds a pod of another trust domain that supports HBONE.
    #[must_use]
    pub fn foreign(mut self, pod: &Pod, trust_domain: &str) -> Self {
        self = self.hbone(pod);
        let last = self.workloads.trim_end().len() - 1;
        self.workloads.insert_str(last, &format!(", trustDomain: {trust_domain}"));
        self
    }

    /// Writes the file `NAME.yaml` to the pod's folder atomically.
    #[must_use]
    pub fn write(&self, pod: &Pod, name: &str) -> PathBuf {
        let file = pod.folder().join(format!("{name}.yaml"));
        let new = file.with_extension("new");
        fs::write(&new, self.text()).or_fail("write a mesh file");
        fs::rename(&new, &file).or_fail("replace a mesh file");
        file
    }

    /// The YAML document.
    #[must_use]
    pub fn text(&self) -> String {
        let Self { workloads, services, policies } = self;
        let sections = [("workloads", workloads), ("services", services), ("policies", policies)];
        let text = |(name, items): (&str, &String)| match items.as_str() {
            "" => format!("{name}: []\n"),
            items => format!("{name}:\n{items}"),
        };
        sections.map(text).concat()
    }
}
