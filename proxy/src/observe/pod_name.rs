//! The namespace and the name of a pod, which the records of its connections share.

use std::fmt;

use underpass_config::WorkloadSettings;

/// The namespace and the name of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PodName {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl From<&WorkloadSettings> for PodName {
    fn from(own: &WorkloadSettings) -> Self {
        Self { namespace: own.namespace.clone(), name: own.name.clone() }
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
