//! The enrolment of a pod: its trait, its outcome and its errors.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;
use tokio::sync::oneshot;
use underpass_config::{Hint, PodUid};
use underpass_interception::{InterceptionError, Namespace};

use crate::node::data_plane::{CertificateState, ServedPod};
use crate::node::pod_error::PodError;
use crate::pods::annotations::ExemptReason;
use crate::pods::facts::{FactsError, PodFacts};
use crate::pods::namespace::NamespaceError;
use crate::pods::take_over::handed::Handed;
use crate::process::take_over::TakeOverError;
use crate::rules::health::RulesHealth;
use crate::traffic::inbound_drain::DrainState;
use crate::traffic::listeners::NamedListeners;

/// The future of a method of these traits.
pub(crate) type Operation<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Enrols pods. Tests have an implementation without namespaces.
pub(crate) trait Enroller: fmt::Debug + Send + Sync + 'static {
    /// Makes one attempt to serve a pod in its namespace, with the listeners that another process
    /// has `handed` over. A failed attempt leaves only the rules that block the pod's traffic. Each
    /// step has a deadline, so the attempt ends.
    fn enrol(
        &self,
        facts: Arc<PodFacts>,
        namespace: Namespace,
        handed: Option<Handed>,
    ) -> Operation<Result<Enrolled, EnrolError>>;
}

/// A pod that is served.
pub(crate) trait EnrolledPod: fmt::Debug + Send {
    /// Applies changed facts to the running pod.
    ///
    /// # Errors
    ///
    /// The pod must leave for the returned reason. Another attempt then decides with the new facts.
    fn follow(&self, facts: &PodFacts) -> Result<(), LeaveReason>;

    /// Verifies the pod's listeners and rules.
    fn check(&self) -> Operation<Result<(), EnrolError>>;

    /// Reports its rules with their counters (`rules/report.rs`).
    fn rules(&self) -> Operation<Value>;

    /// The current problem of the served pod.
    fn problem(&self) -> Option<PodProblem>;

    /// Its listeners with their names, for another process that takes it over.
    fn listeners(&self) -> NamedListeners;

    /// Whether it has a valid certificate, or needs none.
    fn has_certificate(&self) -> Operation<bool>;

    /// Pauses a part of its work while another process takes over. Connections go on.
    fn pause(&self, part: Pause) -> Operation<()>;

    /// Resumes what is paused: the other process has failed.
    fn resume(&self);

    /// Removes the rules for another process that takes over and leaves the pod alone. `resume`
    /// installs them again.
    fn remove_rules(&self) -> Operation<()>;

    /// Drains the connections, and keeps or removes the rules once `release` ends. Afterwards the
    /// process has no socket in the pod's namespace.
    fn leave(self: Box<Self>, why: LeaveReason, release: Release) -> Operation<()>;
}

/// Ends when no other process that takes over works in the namespace of a pod. Until then that
/// process may test the pod's rules.
#[derive(Debug, Default)]
pub(crate) struct Release(Option<oneshot::Receiver<Infallible>>);

impl Release {
    /// A release that ends when the sender is dropped.
    pub(crate) fn channel() -> (oneshot::Sender<Infallible>, Self) {
        let (sender, receiver) = oneshot::channel();
        (sender, Self(Some(receiver)))
    }

    pub(crate) async fn wait(self) {
        if let Some(dropped) = self.0 {
            dropped.await.ok();
        }
    }
}

/// The work of a pod that only one process may do at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pause {
    /// Repairing and testing the rules.
    Rules,
    /// Accepting. New connections wait in the queue of the listeners.
    Accepting,
}

/// The reason why a pod stops being served. It decides whether the rules are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeaveReason {
    /// The source has removed the pod: its rules are removed.
    Removed,
    /// The process that this one takes over from has removed the pod. That process owns its rules.
    RemovedByOther,
    /// The pod will be enrolled with other facts: its rules stay and block its traffic meanwhile.
    EnrolledAgain,
    /// The daemon stops: `interception.on_exit` decides.
    DaemonStops,
    /// Another process has taken the pod over; the rules belong to that process.
    HandedOver,
}

/// The outcome of a successful attempt.
#[derive(Debug)]
pub(crate) enum Enrolled {
    Serving(Box<dyn EnrolledPod>),
    /// The pod is exempt for this reason.
    Exempt(ExemptReason),
}

/// A problem of a pod that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PodProblem {
    /// Another program has changed the rules, which are being repaired or stay changed.
    RulesChanged,
    SelfTestFailed,
    /// The first certificate is not issued yet.
    CertificateAwaited,
    CertificateExpired,
    /// An operator drains it: inbound connections are still open.
    Draining,
    /// An operator has drained it.
    Drained,
}

impl PodProblem {
    /// The problem of the rules of a pod.
    pub(crate) fn of_rules(rules: &RulesHealth) -> Option<Self> {
        if rules.are_lost() || rules.are_unrepaired() {
            Some(Self::RulesChanged)
        } else {
            rules.has_self_test_failed().then_some(Self::SelfTestFailed)
        }
    }

    /// The problem of a pod that the data plane serves.
    pub(crate) fn of_served(pod: &dyn ServedPod) -> Option<Self> {
        match (pod.drain_state(), pod.certificate()) {
            (DrainState::Draining { .. }, _) => Some(Self::Draining),
            (DrainState::Drained { .. }, _) => Some(Self::Drained),
            (DrainState::Serving, CertificateState::Awaited) => Some(Self::CertificateAwaited),
            (DrainState::Serving, CertificateState::Expired) => Some(Self::CertificateExpired),
            (DrainState::Serving, CertificateState::Valid) => None,
        }
    }

    pub(crate) fn hint(self) -> Option<&'static str> {
        match self {
            Self::Draining | Self::Drained => Some("`underpass admin undrain` ends the drain"),
            Self::RulesChanged
            | Self::SelfTestFailed
            | Self::CertificateAwaited
            | Self::CertificateExpired => None,
        }
    }
}

impl fmt::Display for PodProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RulesChanged => "another program has changed the rules",
            Self::SelfTestFailed => "the self-test of the rules failed",
            Self::CertificateAwaited => "its first certificate is not issued yet",
            Self::CertificateExpired => "its certificate has expired",
            Self::Draining => "new inbound connections are refused, and open ones end",
            Self::Drained => "new inbound connections are refused, and none is open",
        })
    }
}

/// The reason why a pod is not served.
#[derive(Debug, Clone, Error)]
pub(crate) enum EnrolError {
    #[error("the data about the pod is invalid")]
    Facts(#[from] FactsError),
    #[error("the pod's network namespace belongs to the pod {0}")]
    NamespaceInUse(PodUid),
    #[error("the pod's network namespace cannot be used")]
    Namespace(#[source] Arc<InterceptionError>),
    #[error("the pod's network namespace is refused")]
    ForeignNamespace(#[from] NamespaceError),
    #[error("the pod cannot be served")]
    Pod(#[source] Arc<PodError>),
    #[error("the pod was removed, or replaced by a pod in another namespace")]
    Removed,
    #[error("the runtime did not call the CNI plugin for the pod, so it bypasses the mesh")]
    NotAdded,
    #[error("the pod is unknown")]
    Unknown,
    #[error("the pod is still being enrolled")]
    Pending,
    #[error("the daemon stops")]
    Stopping,
    #[error("the attempt to enrol the pod panicked")]
    Panicked,
    #[error("the previous process does not hand it over")]
    TakeOver(#[source] Arc<TakeOverError>),
    #[error("it was not adopted from the previous process, and is enrolled again")]
    NotAdopted(#[source] Box<Self>),
}

impl EnrolError {
    /// Whether another attempt with the same facts may succeed.
    pub(crate) fn is_retryable(&self) -> bool {
        match self {
            // For example, a network plugin may assign the pod's addresses later.
            Self::Pod(_)
            | Self::Namespace(_)
            | Self::ForeignNamespace(
                NamespaceError::OtherAddresses { .. } | NamespaceError::OfAnotherWorkload { .. },
            )
            | Self::Pending
            | Self::Panicked
            | Self::TakeOver(_) => true,
            Self::NotAdopted(error) => error.is_retryable(),
            Self::Facts(_)
            | Self::ForeignNamespace(NamespaceError::Host { .. })
            | Self::NamespaceInUse(_)
            | Self::NotAdded
            | Self::Removed
            | Self::Unknown
            | Self::Stopping => false,
        }
    }

    /// The error of an attempt to adopt a pod.
    pub(crate) fn of_adoption(self) -> Self {
        match self {
            // Ends the take-over.
            Self::TakeOver(_) => self,
            error => Self::NotAdopted(Box::new(error)),
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
            Self::NotAdded => {
                "check that the network configuration has the plugin (`underpass cni install`), then create the pod again"
            }
            Self::Pending => return None,
            Self::Removed | Self::Unknown => "add the pod again",
            Self::Stopping => "add the pod once the daemon runs again",
            Self::Panicked => "report this defect of underpass",
            Self::TakeOver(error) => return error.hint(),
            Self::NotAdopted(error) => return error.hint(),
        };
        Some(fixed.into())
    }
}

impl From<TakeOverError> for EnrolError {
    fn from(error: TakeOverError) -> Self {
        Self::TakeOver(Arc::new(error))
    }
}

impl From<PodError> for EnrolError {
    fn from(error: PodError) -> Self {
        Self::Pod(Arc::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_rules_are_a_problem_with_and_without_repair() {
        let rules = RulesHealth::default();
        assert_eq!(PodProblem::of_rules(&rules), None);
        rules.set_self_test_failed(true);
        assert_eq!(PodProblem::of_rules(&rules), Some(PodProblem::SelfTestFailed));
        rules.set_unrepaired(true);
        assert_eq!(PodProblem::of_rules(&rules), Some(PodProblem::RulesChanged), "no repair");
        rules.set_unrepaired(false);
        rules.set_intact(false);
        assert_eq!(PodProblem::of_rules(&rules), Some(PodProblem::RulesChanged), "lost");
    }
}
