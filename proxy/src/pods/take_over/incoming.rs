//! The new process's side: adopts the pods of the running process, and the state of its source.

use std::borrow::Cow;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::task::JoinSet;
use tokio::time::timeout;
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

/// The interval of requests for changes while pods are adopted.
const CHANGES_INTERVAL: Duration = Duration::from_millis(100);

/// The attempts and removals in progress. They are tasks, because they use the connection while
/// this process asks for changes.
type Work = JoinSet<Result<(), AdoptionError>>;

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
///
/// Pods that are removed meanwhile are released at once, because the running process keeps their
/// rules until then.
async fn adopt_next(
    client: &Arc<TakeoverClient>,
    registry: &PodRegistry,
) -> Result<usize, AdoptionError> {
    let (mut work, mut adopted) = (Work::new(), 0);
    loop {
        adopted += receive_changes(client, registry, &mut work).await?;
        if let Ok(finished) = timeout(CHANGES_INTERVAL, finish(&mut work)).await {
            return finished.map(|()| adopted);
        }
    }
}

/// Waits for the end of all work. Cancel-safe.
async fn finish(work: &mut Work) -> Result<(), AdoptionError> {
    while let Some(finished) = work.join_next().await {
        finished.unwrap_or_else(|error| resume_unwind(error.into_panic()))?;
    }
    Ok(())
}

/// Starts the work that the changes require which the running process passes now. Returns the
/// number of pods to adopt.
async fn receive_changes(
    client: &Arc<TakeoverClient>,
    registry: &PodRegistry,
    work: &mut Work,
) -> Result<usize, AdoptionError> {
    let mut adopted = 0;
    loop {
        let answer = client.ask(NEXT, NEXT, ANSWER_TIMEOUT).await?;
        match answer.word.as_str() {
            POD => {
                if let Some(attempt) = add(client, registry, answer)? {
                    work.spawn(end_of(attempt));
                    adopted += 1;
                }
            }
            GONE => match answer.rest.parse::<PodUid>() {
                Ok(uid) => {
                    work.spawn(release(client.clone(), registry.release(&uid), uid));
                }
                Err(_) => return Err(answer.unexpected(NEXT).into()),
            },
            END => return Ok(adopted),
            _ => return Err(answer.unexpected(NEXT).into()),
        }
    }
}

/// Waits for the end of an attempt. The registry reports failures that concern one pod.
async fn end_of(attempt: Enrolment) -> Result<(), AdoptionError> {
    match attempt.first_outcome().await {
        Err(error @ EnrolError::TakeOver(_)) => Err(AdoptionError::Pod(error)),
        _ => Ok(()),
    }
}

/// Reports the end of the removal of a pod, which the running process has removed.
async fn release(
    client: Arc<TakeoverClient>,
    removal: Removal,
    uid: PodUid,
) -> Result<(), AdoptionError> {
    removal.gone().await;
    Ok(client.request(RELEASED, &format!("{RELEASED} {uid}")).await?)
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
