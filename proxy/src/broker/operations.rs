//! The sockets of the proxy process, which the broker opens.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use underpass_interception::{
    InterceptionError, LocalAddresses, PrivilegedOperations, Reply, ReplyFuture,
    Request as Operation, SocketKind, Sockets,
};

use crate::broker::link::{Pending, Sender};
use crate::broker::message::{Answer, Refusal, Request, SocketsOf, ToBroker};

/// The requests of the proxy process. Clones share the connection.
#[derive(Debug, Clone)]
pub(super) struct Requests {
    sender: Sender<ToBroker>,
    answers: Arc<Pending<Answered>>,
}

/// An answer of the broker with the attached sockets.
pub(super) type Answered = (Result<Answer, Refusal>, Vec<OwnedFd>);

impl Requests {
    pub(super) fn new(sender: Sender<ToBroker>) -> Self {
        Self { sender, answers: Arc::default() }
    }

    pub(super) fn sender(&self) -> &Sender<ToBroker> {
        &self.sender
    }

    /// Delivers an answer.
    pub(super) fn answered(&self, number: u64, answered: Answered) {
        self.answers.answer(number, answered);
    }

    /// Sends a request, and waits for its answer. There is no timeout: if the broker ends, so does
    /// this process.
    pub(super) async fn request(&self, request: Request) -> Result<(Answer, Vec<OwnedFd>), String> {
        let (number, answer) = self.answers.register();
        let message = ToBroker::Request { number, request };
        self.sender.send(&message, Vec::new()).await.map_err(|error| error.to_string())?;
        let (answer, sockets) = answer.await.map_err(|_| "the broker has ended".to_owned())?;
        answer.map(|answer| (answer, sockets)).map_err(|refusal| refusal.to_string())
    }
}

/// The operations in a network namespace that the broker performs for the proxy process.
#[derive(Debug)]
pub(super) struct BrokerOperations {
    requests: Requests,
    of: SocketsOf,
    /// The lookup of the pod's addresses, which came with the pod.
    local: Mutex<Option<LocalAddresses>>,
}

impl BrokerOperations {
    pub(super) fn new(requests: Requests, of: SocketsOf, local: Option<LocalAddresses>) -> Self {
        Self { requests, of, local: Mutex::new(local) }
    }
}

impl PrivilegedOperations for BrokerOperations {
    fn perform(&self, operation: Operation) -> ReplyFuture {
        match operation {
            Operation::OpenSockets { sockets, kind, count } => {
                let (requests, of) = (self.requests.clone(), self.of.clone());
                Box::pin(open(requests, of, sockets, kind, count))
            }
            Operation::OpenLocalAddresses => {
                let local = self.local.lock().unwrap_or_else(PoisonError::into_inner).take();
                let reply = local.map(Reply::LocalAddresses);
                let missing = || failed("look up addresses", "the broker has sent no socket");
                Box::pin(async move { reply.ok_or_else(missing) })
            }
            other => {
                let error =
                    failed("perform an operation", &format!("only the broker performs {other:?}"));
                Box::pin(async move { Err(error) })
            }
        }
    }
}

async fn open(
    requests: Requests,
    of: SocketsOf,
    sockets: Sockets,
    kind: SocketKind,
    count: usize,
) -> Result<Reply, InterceptionError> {
    let request = Request::Sockets { of, kind: kind.into(), count };
    let answer = requests.request(request).await;
    let (_, opened) = answer.map_err(|error| failed("open a socket", &error))?;
    if opened.len() < count {
        let cause = "the limit of open files is reached (`ulimit -n`, LimitNOFILE)";
        return Err(failed("open a socket", cause));
    }
    let opened = opened.into_iter().map(|socket| sockets.adopt(socket, kind));
    Ok(Reply::Sockets(opened.collect()))
}

fn failed(operation: &'static str, cause: &str) -> InterceptionError {
    InterceptionError::Socket { operation, source: io::Error::other(cause.to_owned()) }
}
