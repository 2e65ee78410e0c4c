//! The enrolment of a pod: the trait that performs it, its outcome and its errors.

use std::borrow::Cow;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use thiserror::Error;
use underpass_config::{Hint, PodUid};
use underpass_interception::{InterceptionError, Namespace};

use crate::node::pod_error::PodError;
use crate::pods::annotations::NotEnrolled;
use crate::pods::facts::{FactsError, PodFacts};
use crate::pods::namespace::NamespaceError;

/// A future of this module's traits.
pub(crate) type Operation<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Enrols pods. Tests have one that needs no namespace.
pub(crate) trait Enroller: fmt::Debug + Send + Sync + 'static {
    /// Makes one attempt to serve a pod in its namespace. A failed attempt leaves nothing but the
    /// rules that keep the pod closed. It ends by itself: each step has a deadline.
    fn enrol(
        &self,
        facts: Arc<PodFacts>,
        namespace: Namespace,
    ) -> Operation<Result<Enrolled, EnrolError>>;
}

/// A pod that is served.
pub(crate) trait EnrolledPod: fmt::Debug + Send {
    /// Applies changed facts to the running pod.
    ///
    /// # Errors
    ///
    /// The pod must leave, for this reason, and another attempt decides with the new facts.
    fn follow(&self, facts: &PodFacts) -> Result<(), Departure>;

    /// Verifies its listeners and rules.
    fn check(&self) -> Operation<Result<(), EnrolError>>;

    /// The problem of the pod while it is served.
    fn trouble(&self) -> Option<Trouble>;

    /// Drains its connections, and keeps or removes its rules. Nothing holds its namespace then.
    fn leave(self: Box<Self>, why: Departure) -> Operation<()>;
}

/// Why a pod is not served any longer, which decides about its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Departure {
    /// The source has removed it: its rules are removed.
    Removed,
    /// It is enrolled again with other facts: its rules stay, so that it stays closed meanwhile.
    EnrolledAgain,
    /// The daemon stops: `interception.on_exit` decides.
    DaemonStops,
}

/// The outcome of an attempt that did not fail.
#[derive(Debug)]
pub(crate) enum Enrolled {
    Serving(Box<dyn EnrolledPod>),
    /// The pod's facts exempt it.
    LeftAlone(NotEnrolled),
}

/// The problem of a pod that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Another program changes the rules; they are being repaired.
    RulesChanged,
    SelfTestFailed,
    /// The first certificate is not issued yet.
    CertificateAwaited,
    CertificateExpired,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RulesChanged => "another program changes the rules",
            Self::SelfTestFailed => "the self-test of the rules failed",
            Self::CertificateAwaited => "its first certificate is not issued yet",
            Self::CertificateExpired => "its certificate has expired",
        })
    }
}

/// Why a pod is not served.
#[derive(Debug, Clone, Error)]
pub(crate) enum EnrolError {
    #[error("the data about the pod is invalid")]
    Facts(#[from] FactsError),
    #[error("its network namespace is that of the pod {0}")]
    NamespaceInUse(PodUid),
    #[error("its network namespace cannot be used")]
    Namespace(#[source] Arc<InterceptionError>),
    #[error("its network namespace is refused")]
    ForeignNamespace(#[from] NamespaceError),
    #[error("it cannot be served")]
    Pod(#[source] Arc<PodError>),
    #[error("it was removed, or replaced by a pod in another namespace")]
    Removed,
    #[error("it is not known")]
    Unknown,
    #[error("it is still being enrolled")]
    Pending,
    #[error("the daemon stops")]
    Stopping,
    #[error("the attempt to enrol it panicked")]
    Panicked,
}

impl EnrolError {
    /// Whether another attempt with the same facts may succeed.
    pub(crate) fn is_retryable(&self) -> bool {
        match self {
            // A network plugin may assign the pod's addresses later.
            Self::Pod(_)
            | Self::Namespace(_)
            | Self::ForeignNamespace(NamespaceError::OtherAddresses { .. })
            | Self::Pending
            | Self::Panicked => true,
            Self::Facts(_)
            | Self::ForeignNamespace(NamespaceError::Host { .. })
            | Self::NamespaceInUse(_)
            | Self::Removed
            | Self::Unknown
            | Self::Stopping => false,
        }
    }
}

impl Hint for EnrolError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Pod(error) => return error.hint(),
            Self::Facts(_) => "correct the pod's labels, annotations or file",
            Self::NamespaceInUse(_) => {
                "remove the other pod first: two pods of one namespace cannot be told apart"
            }
            Self::Namespace(error) => {
                return error.hint().or_else(|| {
                    Some("name the network namespace by an absolute path without links, such as /run/netns/NAME".into())
                });
            }
            Self::ForeignNamespace(_) => "correct the namespace or the addresses of the pod",
            Self::Pending => return None,
            Self::Removed | Self::Unknown => "add the pod again",
            Self::Stopping => "add the pod once the daemon runs again",
            Self::Panicked => "report this defect of underpass",
        };
        Some(fixed.into())
    }
}

impl From<PodError> for EnrolError {
    fn from(error: PodError) -> Self {
        Self::Pod(Arc::new(error))
    }
}
