//! The names by which a control plane looks up resources on demand.

use std::borrow::Borrow;
use std::fmt;
use std::net::IpAddr;

use super::list::SharedMap;
use super::names::{Name, NamespacedHostname};

/// A name that a client can look up: `network/address`, `namespace/hostname` or a uid, in istiod's
/// form.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lookup(Name);

/// The lookups with an answer that is not outdated.
pub(crate) type Answered = SharedMap<Lookup, Answer>;

/// The answer to a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Known,
    Absent,
}

impl Lookup {
    /// The workload or service at an address.
    pub fn address(network: &str, address: IpAddr) -> Self {
        Self(format!("{network}/{}", address.to_canonical()).into())
    }

    /// The service with a hostname, and its endpoints.
    pub fn hostname(name: &NamespacedHostname) -> Self {
        Self(name.to_string().into())
    }

    /// The workload of a pod, by its uid in istiod.
    pub fn pod(cluster_id: &str, namespace: &str, name: &str) -> Self {
        Self(format!("{cluster_id}//Pod/{namespace}/{name}").into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Lookup {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
