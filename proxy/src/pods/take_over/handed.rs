//! A pod that this process adopts from the running one.

use std::sync::Arc;

use underpass_config::PodUid;
use underpass_interception::BoundListener;

use super::{ACCEPT, EXEMPT, RESUME, RULES, SERVED};
use crate::process::take_over::{TakeOverError, TakeoverClient};

/// The parts that an attempt to adopt a pod gets from the running process.
#[derive(Debug)]
pub(crate) struct Handed {
    /// The listeners with their names.
    pub(crate) listeners: Vec<(String, BoundListener)>,
    /// Whether the pod has a valid certificate there.
    pub(crate) has_certificate: bool,
    pub(crate) running: RunningPod,
}

impl Handed {
    /// The listeners, and the rest.
    pub(crate) fn split(self) -> (Vec<(String, BoundListener)>, Adopted) {
        let Self { listeners, has_certificate, running } = self;
        (listeners, Adopted { has_certificate, running })
    }
}

/// A pod that is being adopted.
#[derive(Debug)]
pub(crate) struct Adopted {
    pub(crate) has_certificate: bool,
    pub(crate) running: RunningPod,
}

/// The pod in the running process, which serves it until another process does. Every request
/// succeeds if that process has ended.
#[derive(Debug)]
pub(crate) struct RunningPod {
    client: Arc<TakeoverClient>,
    uid: PodUid,
}

impl RunningPod {
    pub(crate) fn new(client: Arc<TakeoverClient>, uid: PodUid) -> Self {
        Self { client, uid }
    }

    /// Stops the repair of the pod's rules.
    pub(crate) async fn pause_rules(&self) -> Result<(), TakeOverError> {
        self.request(RULES).await
    }

    /// Stops accepting for the pod.
    pub(crate) async fn pause_accepting(&self) -> Result<(), TakeOverError> {
        self.request(ACCEPT).await
    }

    /// Reports that this process serves the pod.
    pub(crate) async fn served(&self) -> Result<(), TakeOverError> {
        self.request(SERVED).await
    }

    /// Lets the running process serve the pod until the take-over is complete.
    pub(crate) async fn resume(&self) -> Result<(), TakeOverError> {
        self.request(RESUME).await
    }

    /// Lets the running process remove the pod's rules once the take-over is complete: this process
    /// leaves the pod alone.
    pub(crate) async fn exempt(&self) -> Result<(), TakeOverError> {
        self.request(EXEMPT).await
    }

    async fn request(&self, request: &'static str) -> Result<(), TakeOverError> {
        let outcome = self.client.request(request, &format!("{request} {}", self.uid)).await;
        self.client.unless_ended(outcome).await
    }
}
