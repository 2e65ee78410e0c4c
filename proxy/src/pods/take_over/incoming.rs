//! The new process's side: adopts the pods of the running process, and the state of its source.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use thiserror::Error;
use underpass_config::{Hint, PodUid};

use super::handed::{Handed, RunningPod};
use super::message::{self, ReceivedPod};
use super::{AGAIN, END, GONE, NEXT, POD, RELEASED, SOURCE};
use crate::error::chain;
use crate::pods::enrolment::EnrolError;
use crate::pods::registry::{Enrolment, PodRegistry, Removal};
use crate::pods::source::SourceState;
use crate::process::take_over::{ANSWER_TIMEOUT, Answer, TakeOverError, TakeoverClient};

/// Timeout for the running process to pause its source.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the pods cannot be taken over.
#[derive(Debug, Error)]
pub(crate) enum AdoptionError {
    #[error("cannot take over the pods")]
    TakeOver(#[from] TakeOverError),
    #[error("cannot take over a pod")]
    Pod(#[source] EnrolError),
}

impl Hint for AdoptionError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::TakeOver(error) => error.hint(),
            Self::Pod(error) => error.hint(),
        }
    }
}

/// Adopts the pods. Returns the state of their source; `None` if the running process has ended.
///
/// # Errors
///
/// The running process has not ended, and does not pass its pods.
pub(crate) async fn adopt(
    client: &Arc<TakeoverClient>,
    registry: &PodRegistry,
) -> Result<Option<SourceState>, AdoptionError> {
    registry.begin_adoption();
    match adopt_all(client, registry).await {
        Err(AdoptionError::TakeOver(TakeOverError::Closed { .. })) if client.has_ended().await => {
            tracing::warn!(
                "the running process ended before it had passed all pods: the source enrols the others"
            );
            Ok(None)
        }
        outcome => outcome.map(Some),
    }
}

async fn adopt_all(
    client: &Arc<TakeoverClient>,
    registry: &PodRegistry,
) -> Result<SourceState, AdoptionError> {
    let source = loop {
        // Repeats until no pod has changed while others were adopted.
        while adopt_next(client, registry).await? > 0 {}
        let source = client.ask(SOURCE, SOURCE, SOURCE_TIMEOUT).await?;
        match source.word.as_str() {
            SOURCE => break source,
            AGAIN => {}
            _ => return Err(source.unexpected(SOURCE).into()),
        }
    };
    adopt_next(client, registry).await?;
    Ok(SourceState { text: source.rest, descriptors: source.descriptors })
}

/// Adopts the pods that the running process has not passed yet. Returns their number.
async fn adopt_next(
    client: &Arc<TakeoverClient>,
    registry: &PodRegistry,
) -> Result<usize, AdoptionError> {
    let (mut attempts, mut removals) = (Vec::new(), Vec::new());
    loop {
        let answer = client.ask(NEXT, NEXT, ANSWER_TIMEOUT).await?;
        match answer.word.as_str() {
            POD => attempts.extend(add(client, registry, answer)?),
            GONE => match answer.rest.parse::<PodUid>() {
                Ok(uid) => removals.push(release(client, registry.release(&uid), uid)),
                Err(_) => return Err(answer.unexpected(NEXT).into()),
            },
            END => break,
            _ => return Err(answer.unexpected(NEXT).into()),
        }
    }
    try_join_all(removals).await?;
    let adopted = attempts.len();
    for attempt in attempts {
        // The registry reports other failures, which concern one pod.
        if let Err(error @ EnrolError::TakeOver(_)) = attempt.first_outcome().await {
            return Err(AdoptionError::Pod(error));
        }
    }
    Ok(adopted)
}

/// Reports the end of the removal of a pod, which the running process has removed.
async fn release(
    client: &TakeoverClient,
    removal: Removal,
    uid: PodUid,
) -> Result<(), TakeOverError> {
    removal.gone().await;
    client.request(RELEASED, &format!("{RELEASED} {uid}")).await
}

/// Adds a pod. Returns the attempt to adopt it, if the running process serves it.
fn add(
    client: &Arc<TakeoverClient>,
    registry: &PodRegistry,
    answer: Answer,
) -> Result<Option<Enrolment>, TakeOverError> {
    let ReceivedPod { facts, namespace, listeners, has_certificate } =
        match message::decode(&answer.rest, answer.descriptors) {
            Ok(pod) => pod,
            Err(error) => {
                let answer = format!("{}: {}", answer.word, chain(&error));
                return Err(TakeOverError::UnexpectedAnswer { request: NEXT, answer });
            }
        };
    let running = RunningPod::new(client.clone(), facts.uid.clone());
    let handed = listeners.map(|listeners| Handed { listeners, has_certificate, running });
    Ok(registry.adopt(facts, namespace, handed))
}
