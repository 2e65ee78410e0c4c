//! The resolver settings of one pod, which its source reports.

use std::net::IpAddr;

/// The maximum number of DNS servers that resolvers use (resolv.h: `MAXNS`).
pub const MAX_NAME_SERVERS: usize = 3;

/// Whether queries to this address stay on the loopback interface of the pod that sends them, where
/// the DNS proxy would capture those of a resolver again. The unspecified address leads there too.
#[must_use]
pub fn is_local_server(address: IpAddr) -> bool {
    address.is_loopback() || address.is_unspecified()
}

/// The resolver settings of one pod, with the meaning of `dnsPolicy` and `dnsConfig` in Kubernetes.
/// The default is for a pod whose source does not report them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodDns {
    /// The settings that the following ones complete.
    pub policy: DnsPolicy,
    /// The DNS servers.
    pub nameservers: Vec<IpAddr>,
    /// The search path.
    pub search: Vec<String>,
    /// Options of resolv.conf(5), such as `timeout:1`.
    pub options: Vec<String>,
}

/// The settings from which those of a pod start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DnsPolicy {
    /// The servers of the cluster, and the search path for names of services.
    #[default]
    ClusterFirst,
    /// The settings of the node.
    Default,
    /// No other settings.
    None,
}

impl DnsPolicy {
    const ALL: [Self; 3] = [Self::ClusterFirst, Self::Default, Self::None];

    /// The name in Kubernetes.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterFirst => "ClusterFirst",
            Self::Default => "Default",
            Self::None => "None",
        }
    }

    /// The policy with this name in Kubernetes; `None` for another name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == name)
    }
}
