//! Adopts a pod of the running process: both processes accept for a moment, so that no
//! connection waits.

use std::time::Duration;

use super::NodeEnroller;
use crate::node::phases::{BoundPod, OpenPod, RulesOwner, ServingPod};
use crate::node::pod_error::PodError;
use crate::pods::enrolment::EnrolError;
use crate::pods::facts::PodFacts;
use crate::pods::take_over::handed::{Adopted, RunningPod};
use crate::process::pause_gate::PauseGate;
use crate::process::take_over::TakeOverError;

/// Timeout for the certificate of a pod, possibly from a remote CA. The running process serves
/// meanwhile.
const CERTIFICATE_TIMEOUT: Duration = Duration::from_secs(30);

impl NodeEnroller {
    /// Serves the pod instead of the running process. After a failure that process serves it again.
    pub(super) async fn adopt(
        &self,
        mut pod: BoundPod,
        adopted: &Adopted,
        facts: &PodFacts,
        rules_gate: PauseGate,
    ) -> Result<ServingPod, EnrolError> {
        let running = &adopted.running;
        if adopted.has_certificate {
            pod.require_certificate(CERTIFICATE_TIMEOUT);
        }
        running.pause_rules().await?;
        let mut open = match self.open(pod).await {
            Ok(open) => open,
            Err(error) => {
                running.resume().await?;
                return Err(adoption_error(error, facts));
            }
        };
        if let Err(error) = switch(&open, running).await {
            running.resume().await.ok();
            return Err(open.abandon(self.settings.timeouts.drain, error).await);
        }
        open.own_rules();
        Ok(open.watch(rules_gate))
    }

    async fn open(&self, pod: BoundPod) -> Result<OpenPod, PodError> {
        pod.guard(RulesOwner::OtherProcess).await?.open(&*self.data_plane).await
    }
}

/// Without certificates the running process must continue with all pods.
fn adoption_error(error: PodError, facts: &PodFacts) -> EnrolError {
    match error {
        PodError::CertificateLate(timeout) => {
            TakeOverError::NoCertificate { pod: facts.full_name(), timeout }.into()
        }
        error => error.into(),
    }
}

/// Becomes the only process that accepts for the pod, and tests its rules.
async fn switch(open: &OpenPod, running: &RunningPod) -> Result<(), EnrolError> {
    running.pause_accepting().await?;
    open.test().await?;
    Ok(running.served().await?)
}
