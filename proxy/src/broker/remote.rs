//! The data plane in the proxy process, as the broker sees it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use underpass_config::{InterceptionSettings, PodUid, Quoted, Settings, WorkloadSettings};
use underpass_interception::{NamespaceAccess, Sockets};

use crate::broker::heartbeat;
use crate::broker::identities::{IdentityFeed, IdentityFeeds};
use crate::broker::link::{LinkError, Pending, Sender};
use crate::broker::message::{Command, Outcome, PodKey, PodToStart, ToProxy};
use crate::error::chain;
use crate::node::data_plane::{CertificateState, DataPlane, PodToServe, ServedPod};
use crate::node::pod::pod_sockets;
use crate::node::pod_error::PodError;
use crate::process::pause_gate::Pausable;
use crate::rules::self_test::Arrivals;
use crate::traffic::inbound_drain::DrainState;

/// Timeout of a command. The workers of a busy proxy process answer within milliseconds.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout for the readiness. A client of the instance socket waits for 5 s.
const READINESS_TIMEOUT: Duration = Duration::from_secs(3);

/// The name of the endpoints in the log.
const ENDPOINTS: &str = "endpoints";

/// The data plane of the proxy process. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct RemoteDataPlane(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sender: Sender<ToProxy>,
    commands: Pending<Result<Outcome, String>>,
    /// By enrolment.
    pods: Mutex<HashMap<u64, Arc<RemoteState>>>,
    /// By enrolment: the self-tests that run.
    arrivals: Mutex<HashMap<u64, mpsc::UnboundedSender<()>>>,
    next: AtomicU64,
    /// `None` if the proxy process gets certificates itself.
    identities: Option<IdentityFeeds>,
}

/// The broker's knowledge of a pod that the proxy process serves.
#[derive(Debug)]
pub(crate) struct RemoteState {
    key: PodKey,
    pub(crate) access: NamespaceAccess,
    pub(crate) sockets: Sockets,
    /// Sends the pod's certificates while the pod is served.
    _identity: Option<Arc<IdentityFeed>>,
}

impl DataPlane for RemoteDataPlane {
    fn serve(&self, pod: PodToServe) -> BoxFuture<'static, Result<Box<dyn ServedPod>, PodError>> {
        let this = self.clone();
        Box::pin(async move { this.open(pod).await })
    }

    fn other_workload(
        &self,
        pod: &WorkloadSettings,
        addresses: Vec<IpAddr>,
    ) -> BoxFuture<'static, Result<Option<(IpAddr, String)>, PodError>> {
        let (shared, namespace, name) = (self.0.clone(), pod.namespace.clone(), pod.name.clone());
        let command = Command::FindOtherWorkload { namespace, name, addresses };
        Box::pin(async move {
            match shared.command(command, Vec::new(), COMMAND_TIMEOUT).await? {
                Outcome::OtherWorkload(other) => {
                    Ok(other.map(|(address, other)| (address, Quoted::new(other).to_string())))
                }
                _ => Err(PodError::ProxyProcess("unexpected outcome of the command".to_owned())),
            }
        })
    }
}

impl RemoteDataPlane {
    pub(crate) fn new(sender: Sender<ToProxy>, identities: Option<IdentityFeeds>) -> Self {
        let (commands, pods, arrivals, next) = Default::default();
        Self(Arc::new(Shared { sender, commands, pods, arrivals, next, identities }))
    }

    pub(crate) fn sender(&self) -> &Sender<ToProxy> {
        &self.0.sender
    }

    /// The source of certificates; `None` if the proxy process gets them itself.
    pub(super) fn identities(&self) -> Option<&IdentityFeeds> {
        self.0.identities.as_ref()
    }

    /// The pod of this key, if the proxy process serves it.
    pub(crate) fn pod(&self, key: &PodKey) -> Option<Arc<RemoteState>> {
        self.0.pods().get(&key.enrolment).filter(|pod| pod.key == *key).cloned()
    }

    /// Delivers the outcome of a command; `false` if none was awaited.
    pub(crate) fn done(&self, number: u64, outcome: Result<Outcome, String>) -> bool {
        self.0.commands.answer(number, outcome)
    }

    /// Reports a test connection. One that arrives after the end of its test is ignored.
    pub(crate) fn arrived(&self, key: &PodKey) {
        if let Some(arrived) = self.0.arrivals().get(&key.enrolment) {
            arrived.send(()).ok();
        }
    }

    /// `ready`, or the reasons why the proxy process is not ready, or does not answer.
    pub(crate) async fn readiness(&self) -> String {
        let asked =
            self.0.exchange(READINESS_TIMEOUT, Vec::new(), |number| ToProxy::Readiness { number });
        match asked.await {
            Ok(Outcome::Readiness(text)) => {
                Quoted::bounded(text.trim_end(), Quoted::MAX_CHAIN_BYTES).to_string()
            }
            Ok(_) => "not ready: the proxy process does not answer".to_owned(),
            Err(error) => format!("not ready: {}", chain(&error)),
        }
    }

    /// Checks that the control thread and the workers of the proxy process answer.
    pub(crate) async fn check(&self) -> Result<(), PodError> {
        self.0.command(Command::Ping, Vec::new(), heartbeat::INTERVAL).await.map(drop)
    }

    async fn open(self, pod: PodToServe) -> Result<Box<dyn ServedPod>, PodError> {
        let PodToServe { uid, settings, interception, access, listeners, dns, certificate_within } =
            pod;
        let local = access.local_addresses().await?;
        let uid = uid.as_ref().map(PodUid::as_str).unwrap_or_default().to_owned();
        let key = PodKey { uid, enrolment: self.0.next.fetch_add(1, Relaxed) };
        let (mut names, mut listeners) = listeners.into_descriptors().map_err(PodError::Accept)?;
        let of_dns = dns.into_descriptors().map_err(PodError::Accept)?;
        names.extend(of_dns.0);
        listeners.extend(of_dns.1);
        let command = Command::Serve(PodToStart {
            pod: key.clone(),
            name: settings.workload.name.clone(),
            namespace: settings.workload.namespace.clone(),
            service_account: settings.workload.service_account.clone(),
            interception: settings.interception_text(),
            dns: settings.dns.pod.clone().into(),
            listeners: names,
            certificate_within,
        });
        let identities = self.0.identities.as_ref();
        let _identity = identities.map(|feeds| feeds.feed(&settings.workload.spiffe_id));
        let sockets = pod_sockets(&settings);
        let state = RemoteState { key: key.clone(), access, sockets, _identity };
        // Before the command: the proxy process may request sockets at once.
        self.0.pods().insert(key.enrolment, Arc::new(state));
        let following = follow(self.0.sender.clone(), key.clone(), settings, interception);
        let (is_closed, is_paused) = (AtomicBool::default(), AtomicBool::default());
        let _following = AbortOnDropHandle::new(tokio::spawn(following));
        let pod = RemotePod { shared: self.0, key, is_closed, is_paused, _following };
        let descriptors = listeners.into_iter().chain([OwnedFd::from(local)]).collect();
        let limit = COMMAND_TIMEOUT.saturating_add(certificate_within.unwrap_or_default());
        match (pod.shared.command(command, descriptors, limit).await?, certificate_within) {
            (Outcome::CertificateLate, Some(limit)) => Err(PodError::CertificateLate(limit)),
            _ => Ok(Box::new(pod)),
        }
    }
}

/// Sends changed interception settings.
async fn follow(
    sender: Sender<ToProxy>,
    pod: PodKey,
    settings: Arc<Settings>,
    mut interception: watch::Receiver<InterceptionSettings>,
) {
    while interception.changed().await.is_ok() {
        let interception = interception.borrow_and_update().clone();
        let settings = Settings { interception, ..(*settings).clone() };
        let interception = settings.interception_text();
        let message = ToProxy::Interception { pod: pod.clone(), interception };
        if let Err(error) = sender.send(&message, Vec::new()).await {
            tracing::error!(%error, uid = %pod, "cannot send changed settings to the proxy process");
        }
    }
}

impl Shared {
    async fn command(
        &self,
        command: Command,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Outcome, PodError> {
        let message = |number| ToProxy::Command { number, command };
        self.exchange(limit, descriptors, message).await
    }

    /// Sends a message with its number, and waits for the answer.
    async fn exchange(
        &self,
        limit: Duration,
        descriptors: Vec<OwnedFd>,
        message: impl FnOnce(u64) -> ToProxy,
    ) -> Result<Outcome, PodError> {
        let (number, answer) = self.commands.register();
        let failed = |error: LinkError| PodError::ProxyProcess(error.to_string());
        self.sender.send(&message(number), descriptors).await.map_err(failed)?;
        match timeout(limit, answer).await {
            Ok(Ok(outcome)) => {
                outcome.map_err(|error| PodError::ProxyProcess(Quoted::new(error).to_string()))
            }
            Ok(Err(_)) => Err(failed(LinkError::Closed)),
            Err(_) => Err(PodError::ProxyProcess(format!("no answer within {limit:?}"))),
        }
    }

    /// Sends a command whose outcome does not matter.
    fn post(&self, command: Command) {
        let (number, _) = self.commands.register();
        // Fails if the proxy process has ended.
        self.sender.post(&ToProxy::Command { number, command }).ok();
    }

    /// Sends a command about `subject`, and waits for its outcome. A failure is only logged: a pod
    /// leaves nevertheless, and the end of the proxy process ends this one.
    async fn obey(&self, command: Command, subject: &str, limit: Duration) -> Option<Outcome> {
        let outcome = self.command(command, Vec::new(), limit).await;
        let warn = |error: &PodError| {
            tracing::warn!(error = chain(error), subject, "a command to the proxy process failed");
        };
        outcome.inspect_err(warn).ok()
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<u64, Arc<RemoteState>>> {
        // No code panics while it holds the lock.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrivals(&self) -> MutexGuard<'_, HashMap<u64, mpsc::UnboundedSender<()>>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The endpoints of the proxy process.
impl Pausable for RemoteDataPlane {
    fn pause(&self) -> BoxFuture<'static, ()> {
        let shared = self.0.clone();
        Box::pin(async move {
            shared.obey(Command::PauseEndpoints, ENDPOINTS, COMMAND_TIMEOUT).await;
        })
    }

    fn resume(&self) {
        self.0.post(Command::ResumeEndpoints);
    }
}

/// A pod that the proxy process serves.
#[derive(Debug)]
struct RemotePod {
    shared: Arc<Shared>,
    key: PodKey,
    is_closed: AtomicBool,
    /// Whether accepting is paused.
    is_paused: AtomicBool,
    _following: AbortOnDropHandle<()>,
}

impl RemotePod {
    /// Sends a command about this pod.
    async fn obey(&self, command: Command, limit: Duration) -> Option<Outcome> {
        self.shared.obey(command, &self.key.uid, limit).await
    }

    /// Serves no request for this pod from now on.
    fn forget(&self) {
        self.is_closed.store(true, Relaxed);
        self.shared.pods().remove(&self.key.enrolment);
        self.shared.arrivals().remove(&self.key.enrolment);
    }
}

impl ServedPod for RemotePod {
    fn arrivals(&self) -> Arc<dyn Arrivals> {
        Arc::new(RemoteArrivals { shared: self.shared.clone(), key: self.key.clone() })
    }

    /// The proxy process adds the state of the certificate to the status.
    fn certificate(&self) -> CertificateState {
        CertificateState::Valid
    }

    /// The proxy process adds its drain to the status.
    fn drain_state(&self) -> DrainState {
        DrainState::Serving
    }

    fn has_certificate(&self) -> BoxFuture<'static, bool> {
        let (shared, pod) = (self.shared.clone(), self.key.clone());
        Box::pin(async move {
            let uid = pod.uid.clone();
            let outcome = shared.obey(Command::HasCertificate { pod }, &uid, COMMAND_TIMEOUT);
            matches!(outcome.await, Some(Outcome::HasCertificate(true)))
        })
    }

    fn pause_accepting(&self) -> BoxFuture<'static, ()> {
        self.is_paused.store(true, Relaxed);
        let (shared, pod) = (self.shared.clone(), self.key.clone());
        Box::pin(async move {
            let uid = pod.uid.clone();
            shared.obey(Command::PauseAccepting { pod }, &uid, COMMAND_TIMEOUT).await;
        })
    }

    fn resume_accepting(&self) {
        if self.is_paused.swap(false, Relaxed) {
            self.shared.post(Command::ResumeAccepting { pod: self.key.clone() });
        }
    }

    fn stop_accepting(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.obey(Command::StopAccepting { pod: self.key.clone() }, COMMAND_TIMEOUT).await;
        })
    }

    fn drain(&self, deadline: Duration) -> BoxFuture<'_, usize> {
        Box::pin(async move {
            let command = Command::Drain { pod: self.key.clone(), deadline };
            match self.obey(command, deadline.saturating_add(COMMAND_TIMEOUT)).await {
                Some(Outcome::Terminated(connections)) => connections,
                _ => 0,
            }
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.obey(Command::Close { pod: self.key.clone() }, COMMAND_TIMEOUT).await;
            self.forget();
        })
    }
}

impl Drop for RemotePod {
    fn drop(&mut self) {
        if self.is_closed.load(Relaxed) {
            return;
        }
        self.forget();
        self.shared.post(Command::Close { pod: self.key.clone() });
    }
}

/// Reports the test connections that arrive at the proxy process.
#[derive(Debug)]
struct RemoteArrivals {
    shared: Arc<Shared>,
    key: PodKey,
}

impl Arrivals for RemoteArrivals {
    fn expect(&self, destination: SocketAddr) -> BoxFuture<'static, mpsc::UnboundedReceiver<()>> {
        let (arrived, arrivals) = mpsc::unbounded_channel();
        let (shared, pod) = (self.shared.clone(), self.key.clone());
        shared.arrivals().insert(pod.enrolment, arrived);
        Box::pin(async move {
            let command = Command::Expect { pod, destination };
            if let Err(error) = shared.command(command, Vec::new(), COMMAND_TIMEOUT).await {
                tracing::warn!(error = chain(&error), "cannot begin the self-test");
            }
            arrivals
        })
    }

    fn end(&self) {
        self.shared.arrivals().remove(&self.key.enrolment);
        // Fails if the proxy process has ended.
        self.shared.sender.post(&ToProxy::EndTest { pod: self.key.clone() }).ok();
    }
}
