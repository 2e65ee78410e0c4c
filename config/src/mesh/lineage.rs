//! The addresses at which a snapshot differs from the previous one of the same control plane.

use std::sync::Arc;

use super::names::{NetworkAddress, Set};

/// The maximum number of addresses. With more, every address counts as touched.
const MAX_TOUCHED: usize = 1024;

/// A snapshot in the series of its source.
#[derive(Debug, Clone, Default)]
pub(super) struct Lineage {
    /// Identifies the snapshot.
    this: Arc<()>,
    /// Identifies the snapshot before it, if there is one.
    previous: Option<Arc<()>>,
    touched: Arc<Touched>,
}

/// The addresses with another workload or service than in the previous snapshot.
#[derive(Debug, Clone)]
enum Touched {
    Addresses(Set<NetworkAddress>),
    /// Any address: many, or ranges.
    All,
}

impl Default for Touched {
    fn default() -> Self {
        Self::Addresses(Set::default())
    }
}

impl Lineage {
    pub(super) fn touch(&mut self, address: NetworkAddress) {
        let touched = Arc::make_mut(&mut self.touched);
        if let Touched::Addresses(addresses) = touched {
            addresses.insert(address);
            if addresses.len() > MAX_TOUCHED {
                *touched = Touched::All;
            }
        }
    }

    pub(super) fn touch_all(&mut self) {
        self.touched = Arc::new(Touched::All);
    }

    /// The series after this snapshot, which has touched nothing yet.
    pub(super) fn next(&self) -> Self {
        Self { previous: Some(self.this.clone()), ..Self::default() }
    }

    /// The addresses that may differ from `old`; `None` for any address.
    pub(super) fn touched_since(&self, old: &Self) -> Option<&Set<NetworkAddress>> {
        let previous = self.previous.as_ref().filter(|it| Arc::ptr_eq(it, &old.this));
        match &*self.touched {
            Touched::Addresses(addresses) => previous.map(|_| addresses),
            Touched::All => None,
        }
    }
}
