//! A pod with bound listeners.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use underpass_config::{InterceptionSettings, PodUid, Settings};
use underpass_interception::{BoundListener, InterceptionError, NamespaceAccess};

use super::guarded::GuardedPod;
use super::rules::{OwnedRules, RulesOwner};
use crate::node::data_plane::PodToServe;
use crate::node::pod::pod_sockets;
use crate::node::pod_error::PodError;
use crate::rules::capture::Capture;
use crate::rules::health::RulesHealth;
use crate::traffic::listeners::{DnsKind, Kind, Listeners, NamedListeners};

/// The time for another process of the node to close its listeners in a pod's namespace: one that
/// has handed the pod over before it was deleted and added again, or that was killed.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
/// The time for the runtime to enable the loopback interface of a pod: containerd calls the plugins
/// of that interface and those of the pod's network at the same time.
const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(2);
/// The pause between attempts to bind the listeners meanwhile.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// The parts from which a pod is bound.
#[derive(Debug)]
pub(crate) struct PodSpec {
    /// Its uid; `None` for the fixed pod of `underpass run`.
    pub(crate) uid: Option<PodUid>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) access: NamespaceAccess,
    /// The current interception settings; a reload changes them.
    pub(crate) interception: watch::Receiver<InterceptionSettings>,
    /// Receives the state of the rules.
    pub(crate) health: RulesHealth,
}

/// A pod whose listeners are bound in its namespace. Dropping it leaves no trace.
#[derive(Debug)]
pub(crate) struct BoundPod {
    pod: PodToServe,
    capture: Capture,
    health: RulesHealth,
}

impl BoundPod {
    /// Checks the preconditions of the rules, and binds the listeners except those that another
    /// process has `handed` over.
    ///
    /// # Errors
    ///
    /// A precondition is not met, or an address is in use.
    pub(crate) async fn bind(
        spec: PodSpec,
        handed: &mut Vec<(String, BoundListener)>,
    ) -> Result<Self, PodError> {
        let PodSpec { uid, settings, access, interception, health } = spec;
        let capture =
            Capture::prepare(settings.clone(), interception.clone(), access.clone()).await?;
        let began = Instant::now();
        let (listeners, dns) = loop {
            match bind(&access, &settings, handed).await {
                Err(error)
                    if uid.is_some()
                        && error.is_address_in_use()
                        && began.elapsed() < RELEASE_TIMEOUT =>
                {
                    sleep(RETRY_INTERVAL).await;
                }
                bound => break bound?,
            }
        };
        let pod = PodToServe {
            uid,
            settings,
            interception,
            access,
            listeners,
            dns,
            certificate_within: None,
        };
        Ok(Self { pod, capture, health })
    }

    /// Its listeners, to hand over. They close with the last handle.
    pub(crate) fn duplicate_listeners(&self) -> NamedListeners {
        let PodToServe { listeners, dns, .. } = &self.pod;
        listeners.duplicate().into_iter().chain(dns.duplicate()).collect()
    }

    /// Lets the pod wait for its certificate before it accepts.
    pub(crate) fn require_certificate(&mut self, within: Duration) {
        self.pod.certificate_within = Some(within);
    }

    /// Installs the rules.
    ///
    /// # Errors
    ///
    /// The kernel rejected them; the earlier rules are unchanged.
    pub(crate) async fn guard(self, owner: RulesOwner) -> Result<GuardedPod, PodError> {
        let Self { pod, capture, health } = self;
        let loopback_timeout = if pod.uid.is_some() { LOOPBACK_TIMEOUT } else { Duration::ZERO };
        capture.install(loopback_timeout).await?;
        health.set_intact(true);
        GuardedPod::new(pod, OwnedRules { capture, owner }, health).await
    }
}

/// Binds the listeners of the pod and of its DNS proxy.
async fn bind(
    access: &NamespaceAccess,
    settings: &Settings,
    handed: &mut Vec<(String, BoundListener)>,
) -> Result<(Listeners<Kind>, Listeners<DnsKind>), InterceptionError> {
    let sockets = pod_sockets(settings);
    let listeners = Listeners::bind(access, &sockets, settings, handed).await?;
    Ok((listeners, Listeners::bind(access, &sockets, settings, handed).await?))
}
