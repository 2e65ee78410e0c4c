//! What things in a mesh are called: texts that many of them share, and addresses that mean something in one network only.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use ipnet::IpNet;

use crate::cidr::canonical;

/// A name that many things in the mesh share: a namespace, a node, a network.
pub type Name = Arc<str>;

/// A map with a faster hash than the standard one: its keys come from whoever says what the mesh is, not from peers.
pub(crate) type Map<K, V> = HashMap<K, V, RandomState>;

/// A set with the hash of [`Map`].
pub(crate) type Set<T> = HashSet<T, RandomState>;

/// Gives equal texts one place in memory.
#[derive(Debug, Default)]
pub(crate) struct Names(Set<Name>);

impl Names {
    /// The one copy of `text`.
    pub(crate) fn shared(&mut self, text: &str) -> Name {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let name = Name::from(text);
        self.0.insert(name.clone());
        name
    }

    /// Lets go of the texts that nobody else has.
    pub(crate) fn forget_unused(&mut self) {
        self.0.retain(|name| Arc::strong_count(name) > 1);
    }
}

/// Gives equal values one place in memory.
#[derive(Debug)]
pub(crate) struct Interned<T>(Set<Arc<T>>);

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self(Set::default())
    }
}

impl<T: Eq + Hash> Interned<T> {
    /// The one copy of `value`.
    pub(crate) fn shared(&mut self, value: T) -> Arc<T> {
        if let Some(known) = self.0.get(&value) {
            return known.clone();
        }
        let value = Arc::new(value);
        self.0.insert(value.clone());
        value
    }

    /// Lets go of the values that nobody else has.
    pub(crate) fn forget_unused(&mut self) {
        self.0.retain(|value| Arc::strong_count(value) > 1);
    }
}

/// An address and the network in which it means something; the network without a name is the mesh's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkAddress {
    /// The network's name; may be empty.
    pub network: Name,
    /// The address in it, never an IPv4-mapped one.
    pub address: IpAddr,
}

impl NetworkAddress {
    /// The same, its network's name shared.
    pub(crate) fn shared(self, names: &mut Names) -> Self {
        Self { network: names.shared(&self.network), ..self }
    }
}

/// A range of addresses and the network in which it means something.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkCidr {
    /// The network's name; may be empty.
    pub network: Name,
    /// The range in it.
    pub cidr: IpNet,
}

/// How a service, or a workload with a hostname, is called: ztunnel's `namespace/hostname`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamespacedHostname {
    /// The namespace; may be empty.
    pub namespace: Name,
    /// The hostname.
    pub hostname: Name,
}

impl NamespacedHostname {
    /// Reads ztunnel's `namespace/hostname`; `name` makes a name of each.
    pub(crate) fn read(
        text: &str,
        mut name: impl FnMut(&str) -> Name,
    ) -> Result<Self, &'static str> {
        match text.split_once('/') {
            Some((namespace, hostname)) if !hostname.is_empty() && !hostname.contains('/') => {
                Ok(Self { namespace: name(namespace), hostname: name(hostname) })
            }
            _ => Err("must be NAMESPACE/HOSTNAME, such as default/example.com"),
        }
    }
}

impl FromStr for NetworkAddress {
    type Err = &'static str;

    /// Reads ztunnel's `network/address`, such as `/10.0.0.1`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "must be NETWORK/ADDRESS, such as /10.0.0.1 or remote/10.0.0.1";
        let (network, address) = text.split_once('/').ok_or(EXPECTED)?;
        let address: IpAddr = address.parse().map_err(|_| EXPECTED)?;
        Ok(Self { network: network.into(), address: address.to_canonical() })
    }
}

impl FromStr for NetworkCidr {
    type Err = &'static str;

    /// Reads `network/address/length`, such as `/10.0.0.0/8`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "must be NETWORK/ADDRESS/LENGTH, such as /10.0.0.0/8";
        let (network, cidr) = text.split_once('/').ok_or(EXPECTED)?;
        let cidr: IpNet = cidr.parse().map_err(|_| EXPECTED)?;
        Ok(Self { network: network.into(), cidr: canonical(cidr) })
    }
}

impl FromStr for NamespacedHostname {
    type Err = &'static str;

    /// Reads ztunnel's `namespace/hostname`, such as `default/example.com`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::read(text, |text| text.into())
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

impl fmt::Display for NetworkCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.cidr)
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}
