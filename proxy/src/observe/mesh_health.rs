//! The health of the mesh's sources: the stream of the control plane, and the mesh file.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::{ConfigErrors, Hint as _};

use crate::error::Described;

/// The health of the mesh's sources. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct MeshHealth(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    control_plane: Option<ControlPlaneHealth>,
    rejected: Option<Rejected>,
    /// The duration of an outage of the control plane that is tolerated; `None` for any.
    tolerated: Option<Duration>,
    file: Option<Described>,
}

/// The resources of the control plane that this proxy cannot use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rejected {
    pub(crate) count: usize,
    /// One of them, with the reason.
    pub(crate) first: String,
}

/// The stream of the control plane.
#[derive(Debug, Clone)]
pub(crate) struct ControlPlaneHealth {
    pub(crate) is_connected: bool,
    /// Since when it is connected, or not.
    pub(crate) since: Instant,
    /// Why the last stream ended or could not be opened; `None` while it is connected.
    pub(crate) error: Option<Described>,
}

/// The hint for a mesh file that cannot be used.
pub(crate) fn hint_of_file(errors: &ConfigErrors) -> Cow<'static, str> {
    let general = "correct the mesh file: `underpass config check` lists all mistakes";
    errors.hint().unwrap_or(Cow::Borrowed(general))
}

impl MeshHealth {
    /// Records that the stream of the control plane is open.
    pub(crate) fn connected(&self) {
        let (is_connected, since) = (true, Instant::now());
        let state = ControlPlaneHealth { is_connected, since, error: None };
        self.lock().control_plane = Some(state);
    }

    /// Records that the stream of the control plane has ended, or could not be opened.
    pub(crate) fn lost(&self, error: Described) {
        let mut state = self.lock();
        let before = state.control_plane.as_ref().filter(|before| !before.is_connected);
        let since = before.map_or_else(Instant::now, |before| before.since);
        let error = Some(error);
        state.control_plane = Some(ControlPlaneHealth { is_connected: false, since, error });
    }

    /// Records the resources of the control plane that this proxy cannot use.
    pub(crate) fn set_rejected(&self, rejected: Option<Rejected>) {
        self.lock().rejected = rejected;
    }

    /// `None` if all resources of the control plane are in use.
    pub(crate) fn rejected(&self) -> Option<Rejected> {
        self.lock().rejected.clone()
    }

    /// Sets the duration of an outage of the control plane that is tolerated; `None` for any.
    pub(crate) fn tolerate(&self, outage: Option<Duration>) {
        self.lock().tolerated = outage;
    }

    /// Whether an outage of the control plane lasts longer than tolerated.
    pub(crate) fn is_lost_too_long(&self) -> bool {
        let state = self.lock();
        let lost = state.control_plane.as_ref().filter(|plane| !plane.is_connected);
        let outage = lost.map(|plane| plane.since.elapsed());
        state.tolerated.is_some_and(|tolerated| outage > Some(tolerated))
    }

    /// Records whether the last content of the mesh file is in use, or why not.
    pub(crate) fn file_read(&self, errors: Option<&ConfigErrors>) {
        self.lock().file = errors.map(|errors| {
            // One line: the text has a line for each mistake.
            let error = errors.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            Described { error, hint: Some(hint_of_file(errors)) }
        });
    }

    /// `None` before the first stream.
    pub(crate) fn control_plane(&self) -> Option<ControlPlaneHealth> {
        self.lock().control_plane.clone()
    }

    /// Why the last content of the mesh file is not in use.
    pub(crate) fn file_error(&self) -> Option<Described> {
        self.lock().file.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> Described {
        Described { error: text.to_owned(), hint: None }
    }

    #[tokio::test(start_paused = true)]
    async fn outage_lasts_from_first_failure_to_next_stream() {
        let health = MeshHealth::default();
        assert!(health.control_plane().is_none());
        let began = Instant::now();
        health.lost(error("refused"));
        tokio::time::advance(Duration::from_secs(5)).await;
        health.lost(error("unreachable"));
        let outage = health.control_plane().unwrap();
        assert_eq!((outage.is_connected, outage.since), (false, began));
        assert_eq!(outage.error, Some(error("unreachable")));
        assert!(!health.is_lost_too_long());
        health.tolerate(Some(Duration::from_secs(6)));
        assert!(!health.is_lost_too_long());
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(health.is_lost_too_long());
        health.connected();
        assert!(!health.is_lost_too_long());
        let open = health.control_plane().unwrap();
        assert_eq!((open.is_connected, open.since, open.error), (true, Instant::now(), None));
    }
}
