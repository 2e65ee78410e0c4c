//! Enrols the pods of this node: makes their settings, checks their namespaces, and runs the phases
//! of a pod.

mod adoption;

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tracing::Instrument as _;
use underpass_config::{Dns, Hint as _, InterceptionSettings, OnExit, Settings, WorkloadSettings};
use underpass_interception::{HostNamespaces, Namespace, NamespaceAccess, NamespaceThread};

use crate::error::chain;
use crate::limits::{PodDescriptors, PodDescriptorsPermit};
use crate::node::data_plane::DataPlane;
use crate::node::phases::{BoundPod, PodSpec, RulesOwner, ServingPod};
use crate::node::pod_error::PodError;
use crate::pods::enrolment::{
    EnrolError, Enrolled, EnrolledPod, Enroller, LeaveReason, Operation, Pause, PodProblem, Release,
};
use crate::pods::facts::PodFacts;
use crate::pods::namespace::{NamespaceError, addresses, check_addresses, check_owner};
use crate::pods::settings::{PodSettings, pod_settings};
use crate::pods::take_over::handed::Handed;
use crate::process::pause_gate::PauseGate;
use crate::process::reload::follow;
use crate::rules::health::{RulesHealth, RulesTotals};
use crate::traffic::listeners::NamedListeners;

/// The longest drain of a pod that is removed while it is adopted. The running process waits 60 s
/// for the next request (`PREPARE_TIMEOUT`).
const MAX_ADOPTION_DRAIN: Duration = Duration::from_secs(10);

/// Enrols the pods of this node. Clones share the node.
#[derive(Debug, Clone)]
pub(crate) struct NodeEnroller {
    pub(crate) data_plane: Arc<dyn DataPlane>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) thread: NamespaceThread,
    /// The states of the rules of all pods.
    pub(crate) rules: RulesTotals,
    /// The descriptors of all pods.
    pub(crate) descriptors: PodDescriptors,
    /// The host's namespaces, which no pod may have.
    pub(crate) hosts: HostNamespaces,
}

impl Enroller for NodeEnroller {
    fn enrol(
        &self,
        facts: Arc<PodFacts>,
        namespace: Namespace,
        handed: Option<Handed>,
    ) -> Operation<Result<Enrolled, EnrolError>> {
        let (this, span) = (self.clone(), span(&facts));
        Box::pin(async move { this.attempt(&facts, namespace, handed).await }.instrument(span))
    }
}

/// The fields that identify the pod in the log.
fn span(facts: &PodFacts) -> tracing::Span {
    tracing::info_span!("pod", name = facts.full_name())
}

impl NodeEnroller {
    async fn attempt(
        &self,
        facts: &PodFacts,
        namespace: Namespace,
        handed: Option<Handed>,
    ) -> Result<Enrolled, EnrolError> {
        let settings = match pod_settings(&self.settings, facts)? {
            PodSettings::Enrolled(settings) => Arc::<Settings>::from(settings),
            PodSettings::Exempt(reason) => {
                if let Some(handed) = handed {
                    handed.running.exempt().await?;
                }
                return Ok(Enrolled::Exempt(reason));
            }
        };
        let has_dns_proxy = settings.interception.dns == Dns::Capture;
        let descriptors = self.descriptors.take(has_dns_proxy).map_err(PodError::from)?;
        let access = self.open_namespace(facts, &settings.workload, namespace).await?;
        let (interception, changes) = watch::channel(settings.interception.clone());
        let health = self.rules.pod();
        let spec = PodSpec {
            uid: Some(facts.uid.clone()),
            settings: settings.clone(),
            access,
            interception: changes,
            health: health.clone(),
        };
        let (mut handed_listeners, adopted) = handed.map(Handed::split).unzip();
        let handed_listeners = handed_listeners.get_or_insert_default();
        let pod = BoundPod::bind(spec, handed_listeners).await?;
        let (listeners, rules_gate) = (pod.duplicate_listeners(), PauseGate::default());
        let pod = match &adopted {
            Some(adopted) => self.adopt(pod, adopted, facts, rules_gate.clone()).await?,
            None => {
                let pod = pod.guard(RulesOwner::ThisProcess).await?;
                pod.serve(&*self.data_plane, rules_gate.clone()).await?
            }
        };
        let (node, span) = (self.settings.clone(), span(facts));
        let served = NodePod {
            pod,
            listeners,
            rules_gate,
            node,
            settings,
            interception,
            health,
            span,
            _descriptors: descriptors,
        };
        Ok(Enrolled::Serving(Box::new(served)))
    }
}

impl NodeEnroller {
    /// Opens the namespace if it can be the pod's.
    async fn open_namespace(
        &self,
        facts: &PodFacts,
        workload: &WorkloadSettings,
        namespace: Namespace,
    ) -> Result<NamespaceAccess, EnrolError> {
        let id = namespace.id();
        check_owner(&self.hosts, id)?;
        let access = NamespaceAccess::new(namespace, self.thread.clone());
        let environment = access.environment().await;
        let environment = environment.map_err(|error| EnrolError::Namespace(Arc::new(error)))?;
        check_addresses(id, &facts.ips, &environment)?;
        if facts.ips.is_empty() {
            let found = self.data_plane.other_workload(workload, addresses(&environment)).await;
            if let Some((address, other)) = found.map_err(|error| EnrolError::Pod(error.into()))? {
                let error = NamespaceError::OfAnotherWorkload { namespace: id, address, other };
                return Err(error.into());
            }
        }
        Ok(access)
    }
}

/// A pod that this node serves.
#[derive(Debug)]
struct NodePod {
    pod: ServingPod,
    /// Closed with the pod.
    listeners: NamedListeners,
    /// Pauses the repair of its rules.
    rules_gate: PauseGate,
    node: Arc<Settings>,
    /// The pod's settings at its enrolment.
    settings: Arc<Settings>,
    interception: watch::Sender<InterceptionSettings>,
    health: RulesHealth,
    span: tracing::Span,
    /// Given back when the pod has left.
    _descriptors: PodDescriptorsPermit,
}

impl EnrolledPod for NodePod {
    fn follow(&self, facts: &PodFacts) -> Result<(), LeaveReason> {
        let new = match pod_settings(&self.node, facts) {
            Ok(PodSettings::Enrolled(new)) => new,
            // An exempt pod has no proxy, so its rules must not stay.
            Ok(PodSettings::Exempt(_)) => return Err(LeaveReason::Removed),
            Err(_) => return Err(LeaveReason::EnrolledAgain),
        };
        let changes_rules = new.interception != *self.interception.borrow();
        if follow(&self.settings, &new, true) != *new || changes_rules && !new.interception.repair {
            return Err(LeaveReason::EnrolledAgain);
        }
        if changes_rules {
            self.interception.send_replace(new.interception);
        }
        Ok(())
    }

    fn check(&self) -> Operation<Result<(), EnrolError>> {
        let check = self.pod.check();
        Box::pin(async move { Ok(check.await?) })
    }

    fn rules(&self) -> Operation<Value> {
        let capture = self.pod.capture().clone();
        Box::pin(async move { capture.report().await })
    }

    fn problem(&self) -> Option<PodProblem> {
        PodProblem::of_rules(&self.health).or_else(|| PodProblem::of_served(self.pod.served()))
    }

    fn listeners(&self) -> NamedListeners {
        self.listeners.clone()
    }

    fn has_certificate(&self) -> Operation<bool> {
        self.pod.served().has_certificate()
    }

    fn pause(&self, part: Pause) -> Operation<()> {
        let gate = self.rules_gate.clone();
        match part {
            Pause::Rules => Box::pin(async move { gate.close().await }),
            Pause::Accepting => self.pod.served().pause_accepting(),
        }
    }

    fn resume(&self) {
        self.rules_gate.open();
        self.pod.served().resume_accepting();
        let interception = &self.settings.interception;
        if interception.install && !interception.repair {
            // Without a reconciler nothing else replaces the rules of the other process.
            tokio::spawn(self.restore_rules().instrument(self.span.clone()));
        }
    }

    fn remove_rules(&self) -> Operation<()> {
        let (gate, capture) = (self.rules_gate.clone(), self.pod.capture().clone());
        let removal = async move {
            gate.close().await;
            if let Err(error) = capture.leave(OnExit::Remove).await {
                tracing::warn!(error = chain(&error), "cannot remove the rules of an exempt pod");
            }
        };
        Box::pin(removal.instrument(self.span.clone()))
    }

    fn leave(mut self: Box<Self>, why: LeaveReason, release: Release) -> Operation<()> {
        let (timeouts, span) = (&self.settings.timeouts, self.span.clone());
        let drain = match why {
            LeaveReason::HandedOver => timeouts.handover_drain,
            LeaveReason::RemovedByOther => timeouts.drain.min(MAX_ADOPTION_DRAIN),
            _ => timeouts.drain,
        };
        let on_exit = match why {
            LeaveReason::Removed => OnExit::Remove,
            LeaveReason::EnrolledAgain => OnExit::Keep,
            LeaveReason::HandedOver | LeaveReason::RemovedByOther => {
                self.pod.disown_rules();
                OnExit::Keep
            }
            LeaveReason::DaemonStops => self.settings.interception.on_exit,
        };
        Box::pin(
            async move { self.drain_and_leave(drain, release, on_exit).await }.instrument(span),
        )
    }
}

impl NodePod {
    /// Installs the rules again, which the other process of a failed take-over may have changed.
    fn restore_rules(&self) -> impl Future<Output = ()> + Send + use<> {
        let (gate, capture) = (self.rules_gate.clone(), self.pod.capture().clone());
        async move {
            let access = capture.access().clone();
            if let Some(Err(error)) =
                gate.pass_until(capture.install(Duration::ZERO), access.finish()).await
            {
                let (error, hint) = (chain(&error), error.hint());
                tracing::error!(
                    error,
                    hint = hint.as_deref(),
                    "cannot restore the rules after a failed take-over"
                );
            }
        }
    }

    async fn drain_and_leave(self, deadline: Duration, release: Release, on_exit: OnExit) {
        let Self { mut pod, listeners, rules_gate, .. } = self;
        drop(listeners);
        // Waits for the end of a restoration.
        rules_gate.close().await;
        pod.stop_accepting().await;
        let terminated = pod.drain(deadline).await;
        if terminated > 0 {
            tracing::info!(terminated, "connections of a removed pod were terminated");
        }
        release.wait().await;
        if let Err(error) = pod.leave_with(on_exit).await {
            // The namespace of a deleted pod may no longer exist, nor its rules.
            tracing::warn!(
                error = chain(&error),
                "cannot keep or remove the rules of a removed pod"
            );
        }
    }
}
