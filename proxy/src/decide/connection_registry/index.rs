//! The index of open connections by address, so that a change of the mesh finds the connections
//! that it concerns.

use std::collections::BTreeSet;
use std::net::IpAddr;

/// A subject that an [`Index`] can find.
pub(crate) trait Indexed {
    fn indexed_by(&self) -> IndexedBy;
}

/// A connection that no change of the mesh concerns.
impl Indexed for () {
    fn indexed_by(&self) -> IndexedBy {
        IndexedBy::Nothing
    }
}

/// The addresses of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IndexedBy {
    /// None: a tunnel, or a connection without a permit yet.
    Nothing,
    /// The address of the pod.
    Inbound(IpAddr),
    /// The original destination and the next hop.
    Outbound([IpAddr; 2]),
}

/// The keys of connections by address.
#[derive(Debug, Default)]
pub(crate) struct Index {
    inbound: BTreeSet<(IpAddr, usize)>,
    outbound: BTreeSet<(IpAddr, usize)>,
}

impl Index {
    /// The addresses of the pod with inbound connections.
    pub(crate) fn inbound_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let first = self.inbound.first().map(|(address, _)| *address);
        std::iter::successors(first, |address| {
            let mut after = self.inbound.range((*address, usize::MAX)..);
            after.find(|(next, _)| next != address).map(|(next, _)| *next)
        })
    }

    /// The inbound connections to an address of the pod.
    pub(crate) fn inbound_to(&self, address: IpAddr) -> impl Iterator<Item = usize> {
        keys(&self.inbound, address)
    }

    /// The outbound connections to an address.
    pub(crate) fn outbound_to(&self, address: IpAddr) -> impl Iterator<Item = usize> {
        keys(&self.outbound, address)
    }

    pub(super) fn insert(&mut self, by: IndexedBy, key: usize) {
        match by {
            IndexedBy::Nothing => {}
            IndexedBy::Inbound(address) => {
                self.inbound.insert((address, key));
            }
            IndexedBy::Outbound(addresses) => {
                self.outbound.extend(addresses.map(|address| (address, key)));
            }
        }
    }

    pub(super) fn remove(&mut self, by: IndexedBy, key: usize) {
        match by {
            IndexedBy::Nothing => {}
            IndexedBy::Inbound(address) => {
                self.inbound.remove(&(address, key));
            }
            IndexedBy::Outbound(addresses) => {
                for address in addresses {
                    self.outbound.remove(&(address, key));
                }
            }
        }
    }
}

fn keys(all: &BTreeSet<(IpAddr, usize)>, address: IpAddr) -> impl Iterator<Item = usize> {
    all.range((address, 0)..=(address, usize::MAX)).map(|(_, key)| *key)
}
