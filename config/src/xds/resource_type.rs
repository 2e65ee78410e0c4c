//! The types of the resources that a client subscribes to.

/// A type of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// Workloads and services.
    Address,
    /// Authorization policies.
    Authorization,
}

impl ResourceType {
    /// All types, in the order of their subscriptions.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The URL of the type.
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Authorization => "authorization",
        }
    }
}
