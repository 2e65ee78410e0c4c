//! The first state of a control plane, received once by a command.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use underpass_config::{ControlPlane, Hint, Mesh, SessionError, Settings, XdsSettings};
use underpass_hbone::{ControlPlaneClient, ControlPlaneError, Dial};

use super::control_plane::{local, node};

/// The state that a control plane sends to a new client.
#[derive(Debug)]
pub(crate) struct FirstState {
    pub(crate) mesh: Arc<Mesh>,
    /// The names of the resources that this client rejects, with the reasons.
    pub(crate) rejected: Vec<String>,
}

/// Why there is no first state.
#[derive(Debug, Error)]
pub(crate) enum FirstStateError {
    #[error("no state from the control plane {0}")]
    Stream(String, #[source] ControlPlaneError),
    #[error("the control plane violates the protocol")]
    Session(#[from] SessionError),
    /// Of the caller: [`first_state`] has no timeout.
    #[error("the control plane has not sent its state within {0:?}")]
    Timeout(Duration),
}

impl Hint for FirstStateError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Stream(_, error) => error.hint(),
            Self::Session(_) => Some("check that mesh.xds.address is a control plane".into()),
            Self::Timeout(_) => Some("read the control plane's log".into()),
        }
    }
}

/// Receives the first complete state: with lookups on demand, the policies and the process' own
/// workload. Has no timeout.
///
/// # Errors
///
/// There is no stream, or it ended before the state was complete.
pub(crate) async fn first_state<D: Dial>(
    settings: &Settings,
    xds: &XdsSettings,
    dialer: D,
) -> Result<FirstState, FirstStateError> {
    let failed = |error| FirstStateError::Stream(xds.address.clone(), error);
    let client = ControlPlaneClient::new(xds.clone(), dialer).map_err(failed)?;
    let mut plane = ControlPlane::new(node(settings, xds), local(settings), xds.on_demand);
    let own = xds.lookup_of(&settings.workload).filter(|_| settings.node.pods.is_none());
    plane.look_up(own.as_slice());
    let mut stream = client.open(plane.open()).await.map_err(failed)?;
    let mut rejected = Vec::new();
    while !plane.is_synced() || own.as_ref().is_some_and(|own| plane.awaits(own)) {
        let response = stream.next().await.map_err(failed)?;
        let applied = plane.receive(response)?;
        let kind = applied.kind.name();
        let reasons = applied.rejected.iter().map(|(name, why)| format!("{kind} {name}: {why}"));
        rejected.extend(reasons);
        for request in applied.into_requests() {
            stream.send(request).await.map_err(failed)?;
        }
    }
    Ok(FirstState { mesh: Arc::new(plane.snapshot()), rejected })
}
