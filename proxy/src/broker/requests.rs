//! Receives the messages of the proxy process in the broker, and performs what it may request.
//!
//! Everything in these messages may be hostile. A pod counts as known only while the proxy process
//! serves it. The broker alone decides the namespace and the marks in an answer.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout};
use underpass_config::{Quoted, Settings};
use underpass_hbone::{LogLimit, log_panic};
use underpass_interception::{
    InterceptionError, Message as Received, NamespaceAccess, SocketKind, Sockets,
};

use crate::admin::api::status::Pod;
use crate::admin::state::RulesError;
use crate::broker::link::{LinkError, Receiver};
use crate::broker::message::{
    Answer, MAX_SOCKETS, Message as _, Refusal, Request, SocketsOf, ToBroker, ToProxy, WireKind,
    WireRole,
};
use crate::broker::remote::RemoteDataPlane;
use crate::error::chain;
use crate::node::node_connects;
use crate::node::pod::pod_sockets;
use crate::observe::metrics;
use crate::pods::enrolment::EnrolError;
use crate::pods::registry::PodRegistry;
use crate::pods::status::PodStatus;

/// The maximum number of requests that are performed at a time. Further messages wait in the
/// socket, and then the proxy process waits.
const MAX_CONCURRENT: usize = 64;
/// The maximum number of messages in each [`WINDOW`]: twice what 20,000 new connections per second
/// need.
const MAX_MESSAGES: u32 = 200;
const WINDOW: Duration = Duration::from_millis(100);
/// The pause after a refused message. An intact proxy process sends one only about a pod that was
/// just removed.
const REFUSED_PAUSE: Duration = Duration::from_millis(10);
/// Timeout for the proxy process to read a report of rules.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum length of the status texts in one answer.
const MAX_STATUS_BYTES: usize = 48 << 10;
/// The longest status text of a pod.
const MAX_STATUS: usize = 4096;
/// The bytes of a pod in an answer besides its texts: names of fields, state and numbers.
const POD_OVERHEAD: usize = 128;

/// Performs the requests of the proxy process.
#[derive(Debug)]
pub(crate) struct RequestServer {
    context: Arc<Context>,
    progress: watch::Sender<Progress>,
}

/// How far the start of the proxy process is, according to that process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Progress {
    #[default]
    Started,
    /// Mesh and trust are loaded.
    Loaded,
    /// The workers run.
    Running,
}

/// The broker's knowledge about its pods.
pub(crate) trait PodReports: fmt::Debug + Send + Sync {
    /// The status of the pods of a node. The pod of `underpass run` is not among them.
    fn status(&self) -> Vec<PodStatus>;

    /// The rules of the pod with this name, `NAMESPACE/NAME`, or the reason why there are none.
    fn rules(&self, pod: &str) -> BoxFuture<'static, Result<Value, RulesError>>;
}

impl PodReports for PodRegistry {
    fn status(&self) -> Vec<PodStatus> {
        Self::status(self)
    }

    fn rules(&self, pod: &str) -> BoxFuture<'static, Result<Value, RulesError>> {
        let (registry, pod) = (self.clone(), pod.to_owned());
        Box::pin(async move {
            Self::rules(&registry, &pod).await.map_err(|error| match error {
                EnrolError::Unknown => RulesError::UnknownPod,
                error => RulesError::Unavailable(chain(&error)),
            })
        })
    }
}

/// The objects that requests may concern.
#[derive(Debug)]
struct Context {
    data_plane: RemoteDataPlane,
    pods: Arc<dyn PodReports>,
    node: Option<NodeSockets>,
    /// Locked while the rules of a pod are reported.
    rules: Arc<Mutex<()>>,
}

/// The sockets of the node itself.
#[derive(Debug)]
struct NodeSockets {
    access: NamespaceAccess,
    sockets: Sockets,
    /// Whether they are also for TCP connections, to a CA or to a control plane. Otherwise they are
    /// only for lookups of hostnames over UDP.
    connects: bool,
}

impl NodeSockets {
    /// `None` if the settings need none.
    fn new(settings: &Settings, access: NamespaceAccess) -> Option<Self> {
        // The fixed pod of `underpass run` is in this namespace, and has sockets for TCP itself.
        let connects = settings.node.pods.is_none() || node_connects(settings);
        let needed = connects || settings.mesh_file.is_some();
        needed.then(|| Self { access, sockets: pod_sockets(settings), connects })
    }

    fn allows(&self, role: WireRole) -> bool {
        match role {
            WireRole::Upstream => self.connects,
            WireRole::NameServer => true,
            WireRole::Workload => false,
        }
    }
}

impl RequestServer {
    pub(crate) fn new(
        data_plane: RemoteDataPlane,
        pods: Arc<dyn PodReports>,
        settings: &Settings,
        access: NamespaceAccess,
    ) -> Self {
        let node = NodeSockets::new(settings, access);
        let context = Arc::new(Context { data_plane, pods, node, rules: Arc::default() });
        Self { context, progress: watch::Sender::default() }
    }

    /// The progress of the proxy process in its start.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Serves until the proxy process ends.
    pub(crate) async fn run(self, receiver: Receiver) {
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT));
        let mut pace = Pace::default();
        loop {
            pace.pass().await;
            let message = match receiver.next_complete().await {
                Ok(Some(message)) => self.read(&message),
                Ok(None) => return,
                // A message that is too long, or has too many descriptors; the connection remains.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(Refusal::Malformed),
                Err(error) => {
                    return tracing::error!(%error, "cannot receive from the proxy process");
                }
            };
            match message {
                Ok(None) => {}
                Ok(Some((number, request))) => {
                    let Ok(permit) = permits.clone().acquire_owned().await else { return };
                    let context = self.context.clone();
                    let answering = async move {
                        context.answer(number, request).await;
                        drop(permit);
                    };
                    tokio::spawn(log_panic("request of the proxy process", answering));
                }
                Err(refusal) => {
                    report(&refusal);
                    pace.after_refusal();
                }
            }
        }
    }

    /// Processes a message. Returns the request that it contains.
    fn read(&self, message: &Received) -> Result<Option<(u64, Request)>, Refusal> {
        if !message.descriptors.is_empty() {
            return Err(Refusal::Descriptors);
        }
        match ToBroker::decode(&message.bytes).ok_or(Refusal::Malformed)? {
            ToBroker::Loaded => {
                self.progress.send_replace(Progress::Loaded);
            }
            ToBroker::Ready => {
                self.progress.send_replace(Progress::Running);
            }
            ToBroker::Done { number, outcome } => {
                if !self.context.data_plane.done(number, outcome) {
                    return Err(Refusal::UnexpectedAnswer);
                }
            }
            ToBroker::Arrived { pod } => self.context.data_plane.arrived(&pod),
            ToBroker::Request { number, request } => return Ok(Some((number, request))),
        }
        Ok(None)
    }
}

/// Limits the rate of messages.
#[derive(Debug, Default)]
struct Pace {
    /// The end of the current window.
    until: Option<Instant>,
    messages: u32,
    not_before: Option<Instant>,
}

impl Pace {
    /// Waits until another message may be read.
    async fn pass(&mut self) {
        if let Some(pause) = self.not_before.take() {
            sleep_until(pause).await;
        }
        let now = Instant::now();
        let until = self.until.filter(|until| *until > now);
        match until {
            Some(until) if self.messages >= MAX_MESSAGES => {
                sleep_until(until).await;
                self.begin(until);
            }
            Some(_) => self.messages += 1,
            None => self.begin(now),
        }
    }

    fn begin(&mut self, now: Instant) {
        self.until = Some(now + WINDOW);
        self.messages = 1;
    }

    fn after_refusal(&mut self) {
        self.not_before = Some(Instant::now() + REFUSED_PAUSE);
    }
}

/// Counts and logs a message that is refused.
fn report(refusal: &Refusal) {
    static LIMIT: LogLimit = LogLimit::new("refused messages of the proxy process");
    let Some(reason) = refusal.reason() else {
        return tracing::debug!(%refusal, "a request of the proxy process failed");
    };
    metrics::pods::broker_refused(reason);
    if LIMIT.admit(reason) {
        tracing::error!(
            reason,
            %refusal,
            hint = "unless a pod was just removed, restart the daemon and look for an attack in the proxy's log",
            "the broker refused a message of the proxy process"
        );
    }
}

impl Context {
    async fn answer(&self, number: u64, request: Request) {
        let outcome = self.perform(request).await;
        let (answer, sockets) = match outcome {
            Ok((answer, sockets)) => (Ok(answer), sockets),
            Err(refusal) => {
                report(&refusal);
                (Err(refusal), Vec::new())
            }
        };
        let sender = self.data_plane.sender();
        let mut sent = sender.send(&ToProxy::Answer { number, answer }, sockets).await;
        if let Err(error @ LinkError::TooLong) = &sent {
            tracing::error!(%error, "cannot answer the proxy process in full");
            let answer = Err(Refusal::Failed(error.to_string()));
            sent = sender.send(&ToProxy::Answer { number, answer }, Vec::new()).await;
        }
        if let Err(error) = sent {
            tracing::debug!(%error, "cannot answer the proxy process");
        }
    }

    async fn perform(&self, request: Request) -> Result<(Answer, Vec<OwnedFd>), Refusal> {
        match request {
            Request::Sockets { of, kind, count } => {
                let sockets = self.sockets(&of, kind, count).await?;
                Ok((Answer::Sockets, sockets))
            }
            Request::Pods { skip } => Ok((self.pods(skip), Vec::new())),
            Request::Rules { pod } => self.rules(&pod).await,
        }
    }

    async fn sockets(
        &self,
        of: &SocketsOf,
        kind: WireKind,
        count: usize,
    ) -> Result<Vec<OwnedFd>, Refusal> {
        if !(1..=MAX_SOCKETS).contains(&count) {
            return Err(Refusal::SocketCount(count));
        }
        let opened = match of {
            SocketsOf::Node => {
                let node = self.node.as_ref().filter(|node| node.allows(kind.role));
                let NodeSockets { access, sockets, .. } = node.ok_or(Refusal::SocketsOfNode)?;
                access.open_sockets(sockets, kind.into(), count).await
            }
            SocketsOf::Pod(key) => {
                let pod = self.data_plane.pod(key).ok_or(Refusal::UnknownPod)?;
                pod.access.open_sockets(&pod.sockets, SocketKind::from(kind), count).await
            }
        };
        let failed = |error: InterceptionError| Refusal::Failed(chain(&error));
        Ok(opened.map_err(failed)?.into_iter().map(OwnedFd::from).collect())
    }

    /// Reports the rules of one pod at a time: the namespaces thread reads them. The proxy process
    /// reads the report from the returned socket.
    async fn rules(&self, pod: &str) -> Result<(Answer, Vec<OwnedFd>), Refusal> {
        let turn = self.rules.clone().lock_owned().await;
        let rules = match self.pods.rules(pod).await {
            Ok(rules) => rules.to_string(),
            Err(RulesError::UnknownPod) => return Ok((Answer::NoSuchPod, Vec::new())),
            Err(RulesError::Unavailable(reason)) => return Err(Refusal::Failed(reason)),
        };
        let failed = |error: io::Error| Refusal::Failed(error.to_string());
        let (mut ours, theirs) = UnixStream::pair().map_err(failed)?;
        let theirs = theirs.into_std().map_err(failed)?;
        let writing = async move {
            let _turn = turn;
            if timeout(REPORT_TIMEOUT, ours.write_all(rules.as_bytes())).await.is_err() {
                tracing::debug!("the proxy process reads a report of rules too slowly");
            }
        };
        tokio::spawn(log_panic("report of rules", writing));
        Ok((Answer::Rules, vec![theirs.into()]))
    }

    fn pods(&self, skip: usize) -> Answer {
        let status = self.pods.status();
        let mut pods = Vec::new();
        let mut length = 0;
        for status in status.iter().skip(skip) {
            let pod = bounded(status);
            let texts = [Some(&pod.uid), Some(&pod.pod), pod.detail.as_ref(), pod.hint.as_ref()];
            length += POD_OVERHEAD + texts.into_iter().flatten().map(String::len).sum::<usize>();
            if length > MAX_STATUS_BYTES {
                return Answer::Pods { pods, more: true };
            }
            pods.push(pod);
        }
        Answer::Pods { pods, more: false }
    }
}

fn bounded(status: &PodStatus) -> Pod {
    let pod = Pod::from(status);
    let bounded = |text: String| Quoted::bounded(&text, MAX_STATUS).to_string();
    Pod { pod: bounded(pod.pod), detail: pod.detail.map(bounded), ..pod }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pace_limits_messages_in_each_window() {
        let (mut pace, began) = (Pace::default(), Instant::now());
        for _ in 0..MAX_MESSAGES * 3 {
            pace.pass().await;
        }
        assert_eq!(began.elapsed(), WINDOW * 2);
        tokio::time::sleep(WINDOW * 5).await;
        let later = Instant::now();
        pace.pass().await;
        assert_eq!(later.elapsed(), Duration::ZERO, "a message after a pause does not wait");
    }

    #[tokio::test(start_paused = true)]
    async fn refused_message_is_followed_by_a_pause() {
        let (mut pace, began) = (Pace::default(), Instant::now());
        for _ in 0..100 {
            pace.pass().await;
            pace.after_refusal();
        }
        assert_eq!(began.elapsed(), REFUSED_PAUSE * 99);
    }
}
