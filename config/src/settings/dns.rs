//! The settings of name resolution: the servers for names outside of the mesh, the limits of
//! queries and lookups, and the domain of Kubernetes services.

use std::path::PathBuf;

use crate::pod::dns::PodDns;

/// The settings `dns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsSettings {
    /// A file in the format of resolv.conf(5) with the servers.
    pub resolv_conf: PathBuf,
    /// The domain of Kubernetes services, in lower case.
    pub domain: String,
    /// The maximum number of queries of a pod to its servers per second; `None`: unlimited.
    pub queries_per_second: Option<u32>,
    /// The maximum number of lookups on demand per second that the queries of a pod cause; `None`:
    /// unlimited.
    pub lookups_per_second: Option<u32>,
    /// The pod's own resolver settings, if it is a pod of a node.
    pub pod: PodDns,
}
