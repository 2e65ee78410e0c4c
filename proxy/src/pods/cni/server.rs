//! Answers the calls of the CNI plugin.
//!
//! Each request of a call has a deadline. If the plugin exits before it has read its answer, for
//! example because the runtime killed it, its addition is undone.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use underpass_config::interval_at_multiples;
use underpass_interception::{Handover, Namespace};

use super::attachment::{AttachedPod, Attachment, NetworkName};
use super::ledger::{Addition, AnsweredAddition, Ledger};
use super::protocol::{Answer, ProtocolError, Refusal, Request, code};
use crate::error::chain;
use crate::pods::registry::Removal;
use crate::pods::source::{PauseRequest, PauseRequests, SourceState};
use crate::process::pause_gate::PauseGate;
use crate::process::take_over::control_socket::ControlSocket;

/// The maximum number of concurrent calls. Further ones wait in the accept queue.
const MAX_CONCURRENT_CALLS: usize = 128;
/// Timeout for receiving a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for enrolling a pod, below the plugin's own timeout.
const ADD_TIMEOUT: Duration = Duration::from_secs(25);
/// Timeout for verifying a pod.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);
/// The maximum time that a runtime waits for the drain of a pod, which continues afterwards.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum number of attachments that a GC request lists.
const MAX_VALID_ATTACHMENTS: usize = 10_000;
/// Timeout for the calls in progress when another process takes over.
const FINISH_TIMEOUT: Duration = Duration::from_secs(4);
/// The interval of the search for pods whose namespace no longer exists.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);
/// The delay after a failed accept, for example without file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The reason why pods cannot be added at present; `None` if they can.
pub(super) type NotReady = watch::Receiver<Option<String>>;

/// Answers calls on `socket`. Closes `facts_gate` during a pause. Never returns.
pub(super) async fn serve(
    mut socket: ControlSocket,
    ledger: Arc<Ledger>,
    not_ready: NotReady,
    mut pauses: PauseRequests,
    facts_gate: &PauseGate,
) -> Infallible {
    let calls = Arc::new(Semaphore::new(MAX_CONCURRENT_CALLS));
    let mut tasks = JoinSet::new();
    let mut sweep = interval_at_multiples(SWEEP_INTERVAL);
    loop {
        let accept = async {
            // Fails only if the semaphore is closed.
            let permit = calls.clone().acquire_owned().await.ok();
            (socket.accept().await, permit)
        };
        tokio::select! {
            (accepted, permit) = accept => match accepted {
                Ok(connection) => {
                    let (ledger, not_ready) = (ledger.clone(), not_ready.clone());
                    tasks.spawn(async move {
                        answer(&connection, &ledger, &not_ready).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a call of the CNI plugin");
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
            },
            _ = sweep.tick() => ledger.sweep(),
            mut request = pauses.next() => tokio::select! {
                () = finish(&mut tasks) => pause(request, &mut socket, facts_gate).await,
                // A call can wait for a pod that the other process must release first.
                () = request.withdrawn() => {}
            },
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Waits for the calls in progress. Those that are not finished in time are undone, and the runtime
/// repeats them.
async fn finish(calls: &mut JoinSet<()>) {
    let all = async { while calls.join_next().await.is_some() {} };
    if timeout(FINISH_TIMEOUT, all).await.is_err() {
        tracing::warn!(calls = calls.len(), "calls of the CNI plugin were not finished in time");
        calls.shutdown().await;
    }
}

/// Accepts no calls and follows no facts until the request ends. Calls wait in the queue of the
/// socket.
async fn pause(request: PauseRequest, socket: &mut ControlSocket, facts_gate: &PauseGate) {
    facts_gate.close().await;
    let descriptors = socket.descriptor().into_iter().collect();
    // The process that takes over owns the file if this one ends now.
    socket.own(false);
    request.pause(SourceState { text: String::new(), descriptors }).await;
    socket.own(true);
    facts_gate.open();
}

/// Answers the requests of one call.
async fn answer(connection: &Handover, ledger: &Ledger, not_ready: &NotReady) {
    if let Err(error) = serve_requests(connection, ledger, not_ready).await {
        tracing::debug!(%error, "a call of the CNI plugin ended early");
    }
}

async fn serve_requests(
    connection: &Handover,
    ledger: &Ledger,
    not_ready: &NotReady,
) -> io::Result<()> {
    let peer = connection.peer()?;
    if !peer.is_trusted() {
        let refusal = untrusted_refusal(peer.uid);
        tracing::warn!(
            uid = peer.uid,
            pid = peer.pid,
            "refused a call of the CNI plugin: {}",
            refusal.message
        );
        return connection.send(&Answer::Refused(refusal).encode(), &[]).await;
    }
    let (mut valid, mut answered) = (BTreeSet::new(), None::<AnsweredAddition<'_>>);
    loop {
        let received = timeout(REQUEST_TIMEOUT, connection.receive()).await?;
        if let Err(error) = &received
            // The plugin has ended without reading the answer (unix_release_sock, net/unix).
            && error.kind() == io::ErrorKind::ConnectionReset
            && let Some(answered) = answered.take()
        {
            answered.undo();
        }
        let Some((line, descriptors)) = received? else { return Ok(()) };
        let outcome = tokio::select! {
            // Poll this first, so that a request is started even if its plugin has already exited.
            biased;
            outcome = perform(&line, descriptors, &mut valid, ledger, not_ready) => outcome,
            // The plugin has exited, or has sent a request before its answer.
            _ = connection.receive() => return Ok(()),
        };
        match outcome {
            Ok(addition) => {
                connection.send(&Answer::Done.encode(), &[]).await?;
                answered = addition.map(Addition::answered);
            }
            Err(refusal) => {
                refuse(connection, refusal).await?;
                answered = None;
            }
        }
    }
}

async fn refuse(connection: &Handover, refusal: Refusal) -> io::Result<()> {
    let Refusal { code, message, hint } = &refusal;
    tracing::warn!(code, error = message, hint, "refused a call of the CNI plugin");
    connection.send(&Answer::Refused(refusal).encode(), &[]).await
}

async fn add<'a>(
    ledger: &'a Ledger,
    pod: AttachedPod,
    descriptors: Vec<OwnedFd>,
) -> Result<Addition<'a>, Refusal> {
    let namespace = namespace(descriptors)?;
    timeout(ADD_TIMEOUT, ledger.add(pod, namespace))
        .await
        .unwrap_or_else(|_| Err(timeout_refusal("enrolled", ADD_TIMEOUT)))
}

/// Performs a request. Returns the addition, which is undone unless the plugin is answered.
async fn perform<'a>(
    line: &str,
    descriptors: Vec<OwnedFd>,
    valid: &mut BTreeSet<Attachment>,
    ledger: &'a Ledger,
    not_ready: &NotReady,
) -> Result<Option<Addition<'a>>, Refusal> {
    match Request::decode(line).map_err(|error| malformed_refusal(&error))? {
        Request::Add(pod) => return add(ledger, *pod, descriptors).await.map(Some),
        Request::Check(pod) => {
            let namespace = namespace(descriptors)?.id();
            let checked = timeout(CHECK_TIMEOUT, ledger.check(&pod, namespace)).await;
            checked.unwrap_or_else(|_| Err(timeout_refusal("verified", CHECK_TIMEOUT)))?;
        }
        Request::Delete(attachment) => {
            let gone = ledger.delete(&attachment).map(Removal::gone);
            if let Some(gone) = gone {
                timeout(DELETE_TIMEOUT, gone).await.ok();
            }
        }
        Request::Status => status(not_ready)?,
        Request::Collect { network, valid: more, last } => {
            collect(&network, more, last, valid, ledger)?;
        }
    }
    Ok(None)
}

fn status(not_ready: &NotReady) -> Result<(), Refusal> {
    let hint = || "see the log of `underpass node`".to_owned();
    match not_ready.borrow().clone() {
        None => Ok(()),
        Some(message) => Err(Refusal { code: code::NOT_READY, message, hint: hint() }),
    }
}

fn collect(
    network: &NetworkName,
    more: Vec<Attachment>,
    last: bool,
    valid: &mut BTreeSet<Attachment>,
    ledger: &Ledger,
) -> Result<(), Refusal> {
    valid.extend(more);
    if valid.len() > MAX_VALID_ATTACHMENTS {
        return Err(Refusal {
            code: code::TRY_AGAIN,
            message: format!("more than {MAX_VALID_ATTACHMENTS} attachments remain"),
            hint: "nothing is to be done: the daemon removes deleted pods by itself".to_owned(),
        });
    }
    if last {
        ledger.collect(network, &std::mem::take(valid));
    }
    Ok(())
}

/// The network namespace of a request, which must be its only descriptor.
fn namespace(descriptors: Vec<OwnedFd>) -> Result<Namespace, Refusal> {
    let refusal = |message: String| Refusal {
        code: code::INVALID_NAMESPACE,
        message,
        hint: "CNI_NETNS must be the file of a network namespace".to_owned(),
    };
    let count = descriptors.len();
    let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|_| refusal(format!("the message has {count} descriptors instead of one")))?;
    Namespace::from_descriptor(descriptor).map_err(|error| refusal(chain(&error)))
}

fn timeout_refusal(done: &str, limit: Duration) -> Refusal {
    Refusal {
        code: code::TRY_AGAIN,
        message: format!("the pod was not {done} within {} s", limit.as_secs()),
        hint: "the log of `underpass node` says what it waits for; the runtime tries again"
            .to_owned(),
    }
}

fn malformed_refusal(error: &ProtocolError) -> Refusal {
    Refusal {
        code: code::TRY_AGAIN,
        message: format!("the daemon cannot read the request: {}", chain(error)),
        hint: "run `underpass cni install` again, so that the plugin and the daemon have the same version"
            .to_owned(),
    }
}

fn untrusted_refusal(uid: u32) -> Refusal {
    Refusal {
        code: code::TRY_AGAIN,
        message: format!("the plugin runs as user {uid}, not as root"),
        hint: "container runtimes must call the plugin as root".to_owned(),
    }
}

#[cfg(test)]
mod tests;
