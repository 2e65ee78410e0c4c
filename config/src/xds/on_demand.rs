//! The lookups of a client that subscribes to resources on demand, and the state of their answers.
//!
//! ```text
//!            ask             mentioned by a response
//! unasked ────────> awaited ────────────────────────> known, or absent
//!    ^                 ^  ask                            │ its resource is removed or moves
//!    │ let go          └──────────── outdated <──────────┘
//! ```
//!
//! istiod answers a subscription once. It pushes later changes of the resources that it sent, but
//! neither a new resource for an absent name nor a new endpoint of a service. So an absent name is
//! let go after a while, and a known one is subscribed to again: unsubscribing comes first, because
//! istiod does not answer a subscription to a name that it already has. It also has the name of
//! each resource that it sent, even after it has removed the resource.

use super::message::DeltaRequest;
use super::request::{subscriptions, unsubscriptions};
use crate::mesh::lookup::{Answer, Answered, Lookup};
use crate::mesh::names::Map;

/// The lookups of a client.
#[derive(Debug, Default)]
pub(super) struct Lookups {
    states: Map<Lookup, State>,
    answered: Answered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Awaited,
    Known,
    Absent,
    /// The control plane has the subscription, but its answer is not valid any longer.
    Outdated,
}

impl Lookups {
    /// Subscribes to the lookups that have no answer, and are not awaited. `is_subscribed` tells
    /// whether the control plane has a subscription to this name of a resource.
    pub(super) fn ask(
        &mut self,
        lookups: &[Lookup],
        is_subscribed: impl Fn(&str) -> bool,
    ) -> Vec<DeltaRequest> {
        let (mut subscribed, mut asked) = (Vec::new(), Vec::new());
        for lookup in lookups {
            match self.states.get(lookup) {
                None if !is_subscribed(lookup.as_str()) => {}
                None | Some(State::Outdated) => subscribed.push(lookup.clone()),
                Some(State::Awaited | State::Known | State::Absent) => continue,
            }
            self.states.insert(lookup.clone(), State::Awaited);
            asked.push(lookup.clone());
        }
        subscribe_again(&subscribed, &asked)
    }

    /// Subscribes again to those of `lookups` that are known. Their answers stay valid.
    pub(super) fn refresh(&self, lookups: &[Lookup]) -> Vec<DeltaRequest> {
        let is_known = |lookup: &&Lookup| self.states.get(*lookup) == Some(&State::Known);
        let known: Vec<_> = lookups.iter().filter(is_known).cloned().collect();
        subscribe_again(&known, &known)
    }

    /// Forgets these lookups. The caller unsubscribes from them.
    pub(super) fn let_go(&mut self, lookups: &[Lookup]) {
        for lookup in lookups {
            self.states.remove(lookup);
            self.answered.remove(lookup);
        }
    }

    /// The names for the first request of a stream, which asks all again.
    pub(super) fn reopened(&mut self) -> impl Iterator<Item = &Lookup> {
        for state in self.states.values_mut().filter(|state| **state == State::Outdated) {
            *state = State::Awaited;
        }
        self.states.keys()
    }

    /// Records a name in a response. Returns whether this changes an answer.
    pub(super) fn mentioned(&mut self, name: &str, is_known: bool) -> bool {
        let Some((lookup, state)) = self.states.get_key_value(name) else { return false };
        let (new, answer) = match is_known {
            true => (State::Known, Answer::Known),
            false => (State::Absent, Answer::Absent),
        };
        if *state == new {
            return false;
        }
        let lookup = lookup.clone();
        self.answered.insert(lookup.clone(), answer);
        self.states.insert(lookup, new);
        true
    }

    /// Records that the resource of a known lookup was removed or has moved. Returns whether this
    /// changes an answer.
    pub(super) fn outdate(&mut self, name: &str) -> bool {
        match self.states.get_mut(name) {
            Some(state @ State::Known) => {
                *state = State::Outdated;
                self.answered.remove(name);
                true
            }
            _ => false,
        }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.states.contains_key(name)
    }

    pub(super) fn is_awaited(&self, lookup: &Lookup) -> bool {
        self.states.get(lookup) == Some(&State::Awaited)
    }

    pub(super) fn is_absent(&self, lookup: &Lookup) -> bool {
        self.states.get(lookup) == Some(&State::Absent)
    }

    /// Whether any lookup has no answer.
    pub(super) fn awaits_any(&self) -> bool {
        self.states.values().any(|state| *state == State::Awaited)
    }

    pub(super) fn answered(&self) -> &Answered {
        &self.answered
    }
}

/// Requests that unsubscribe from the first names, and then subscribe to the others.
fn subscribe_again(unsubscribe: &[Lookup], subscribe: &[Lookup]) -> Vec<DeltaRequest> {
    let mut requests = unsubscriptions(unsubscribe.iter().map(Lookup::to_string));
    requests.extend(subscriptions(subscribe.iter().map(Lookup::to_string)));
    requests
}

#[cfg(test)]
mod tests;
