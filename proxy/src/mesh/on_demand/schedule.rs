//! When lookups on demand are asked again or let go.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::{ControlPlane, DeltaRequest, Lookup};

use super::Lookups;

/// The interval of the checks.
pub(in crate::mesh) const CHECK: Duration = Duration::from_secs(1);
/// How long an absent name counts as absent: the control plane does not report its later creation.
/// A new pod may get the address, and plaintext must not reach it for longer.
const ABSENT_TIME: Duration = Duration::from_secs(5);
/// The interval at which known names are looked up again: the control plane does not report new
/// endpoints of a service.
const REFRESH_INTERVAL: Duration = Duration::from_secs(30);
/// Timeout for an answer, after which the stream is opened again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The number of checks after which an unused lookup is let go: five minutes.
const UNUSED_CHECKS: u32 = 300;

/// A lookup without an answer after [`ANSWER_TIMEOUT`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the control plane has not answered the lookup of {0} within {ANSWER_TIMEOUT:?}")]
pub(in crate::mesh) struct Unanswered(Lookup);

/// The time at which each lookup was sent.
#[derive(Debug, Default)]
pub(in crate::mesh) struct Schedule(HashMap<Lookup, Instant>);

impl Schedule {
    /// The first requests of a new stream, which asks for all lookups in use, and whether the mesh
    /// changes.
    pub(in crate::mesh) fn open(
        &mut self,
        plane: &mut ControlPlane,
        lookups: &Lookups,
    ) -> (Vec<DeltaRequest>, bool) {
        let now = Instant::now();
        let evicted = lookups.take_evicted();
        for lookup in &evicted {
            self.0.remove(lookup);
        }
        // The new stream has no subscription that must end.
        plane.let_go(&evicted);
        let all = lookups.all();
        // The first request contains them.
        plane.look_up(&all);
        self.0.extend(all.into_iter().map(|lookup| (lookup, now)));
        self.0.values_mut().for_each(|sent| *sent = now);
        (plane.open(), !evicted.is_empty())
    }

    /// The requests for lookups that connections need.
    pub(in crate::mesh) fn ask(
        &mut self,
        plane: &mut ControlPlane,
        asked: Vec<Lookup>,
    ) -> Vec<DeltaRequest> {
        let is_new = |lookup: &Lookup| !plane.awaits(lookup);
        let asked: Vec<_> = asked.into_iter().filter(is_new).collect();
        let requests = plane.look_up(&asked);
        let now = Instant::now();
        let sent = asked.into_iter().filter(|lookup| plane.awaits(lookup));
        self.0.extend(sent.map(|lookup| (lookup, now)));
        requests
    }

    /// The requests that are due at a check, and whether they change the mesh.
    pub(in crate::mesh) fn check(
        &mut self,
        plane: &mut ControlPlane,
        lookups: &Lookups,
    ) -> Result<(Vec<DeltaRequest>, bool), Unanswered> {
        let now = Instant::now();
        let older = |age: Duration| move |sent: &Instant| now.duration_since(*sent) >= age;
        let mut sent = self.0.iter();
        let late = sent.find(|(lookup, sent)| older(ANSWER_TIMEOUT)(sent) && plane.awaits(lookup));
        if let Some((lookup, _)) = late {
            return Err(Unanswered(lookup.clone()));
        }
        let mut gone = lookups.take_unused(UNUSED_CHECKS);
        let absent =
            self.0.iter().filter(|(one, at)| older(ABSENT_TIME)(at) && plane.is_absent(one));
        gone.extend(absent.map(|(lookup, _)| lookup.clone()));
        for lookup in &gone {
            self.0.remove(lookup);
        }
        let due = self.0.iter_mut().filter(|(_, sent)| older(REFRESH_INTERVAL)(sent));
        let due: Vec<_> = due
            .map(|(lookup, sent)| {
                *sent = now;
                lookup.clone()
            })
            .collect();
        let mut requests = Vec::new();
        if !gone.is_empty() {
            requests.extend(plane.let_go(&gone));
        }
        requests.extend(plane.refresh(&due));
        Ok((requests, !gone.is_empty()))
    }
}
