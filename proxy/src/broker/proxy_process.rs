//! The proxy process: serves pods by command of the broker, from its start to its end.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use underpass_config::{FileWatcher, Settings};
use underpass_hbone::log_panic;
use underpass_interception::{
    BoundListener, Inotify, Message as Received, NamespaceAccess, ProxyUser, SeqPacket,
    raise_open_files,
};

use crate::admin::api::status::Pod;
use crate::admin::readiness::Readiness;
use crate::admin::state::RulesError;
use crate::broker::link::{self, Receiver};
use crate::broker::message::{
    ADMIN_SOCKET, Answer, Certificate, MAX_MESSAGE, Message as _, Outcome, Request, SocketsOf,
    ToBroker, ToProxy,
};
use crate::broker::operations::{BrokerOperations, Requests};
use crate::broker::reported;
use crate::broker::served::{CommandServer, ServedKeys};
use crate::error::chain;
use crate::node::received_identities::ReceivedIdentities;
use crate::observe::metrics;
use crate::process::app::run_until_failure;
use crate::process::command_error::CommandError;
use crate::process::logging;
use crate::process::node_proxy::{LoadedNode, RunningNode};
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Supervisor;
use crate::rules::health::RulesHealth;
use crate::traffic::listeners::{BoundEndpoints, Listeners};

/// The origin of the settings, for errors.
const SETTINGS: &str = "the broker's settings";

/// The first message of the broker.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) settings: Settings,
    endpoints: BoundEndpoints,
    socket: OwnedFd,
}

impl Start {
    /// Drops all privileges of this process, and only then reads the first message of the broker
    /// from standard input. Call it while there is one thread.
    ///
    /// # Errors
    ///
    /// The kernel refused, or standard input is not a connection to a broker.
    pub(crate) fn receive(user: ProxyUser) -> Result<Self, CommandError> {
        user.separate()?;
        Self::read().map_err(CommandError::InternalCommand)
    }

    fn read() -> io::Result<Self> {
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        let (socket, message) = SeqPacket::receive_first(socket, MAX_MESSAGE)?;
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let Some(ToProxy::Start { settings, endpoints, paused }) = ToProxy::decode(&message.bytes)
        else {
            return Err(malformed());
        };
        let settings = Settings::of_text(SETTINGS, &settings);
        let settings = settings.map_err(io::Error::other)?;
        let (mut named, mut admin_socket) = (Vec::new(), None);
        for (name, socket) in endpoints.into_iter().zip(message.descriptors) {
            if name == ADMIN_SOCKET {
                admin_socket = Some(socket);
            } else {
                named.push((name, BoundListener::try_from(socket)?));
            }
        }
        let listeners = Listeners::adopt(&settings, &mut named).ok_or_else(malformed)?;
        let endpoints = BoundEndpoints { listeners, admin_socket, paused };
        Ok(Self { settings, endpoints, socket })
    }
}

/// Serves pods until the broker ends this process.
///
/// # Errors
///
/// The process cannot start, or the broker has ended.
pub(crate) async fn run(start: Start) -> Result<(), CommandError> {
    let (supervisor, failures) = Supervisor::new();
    run_until_failure(Box::pin(serve_pods(start, supervisor)), failures).await
}

async fn serve_pods(start: Start, supervisor: Supervisor) -> Result<(), CommandError> {
    // Signals to the process group reach the broker too, which stops this process.
    let _ignored = StopSignal::new(false)?;
    raise_open_files().map_err(CommandError::Start)?;
    let Start { settings, endpoints, socket } = start;
    let settings = Arc::new(settings);
    let (sender, receiver, writer) = link::open(socket).map_err(CommandError::Start)?;
    let requests = Requests::new(sender);
    let broker = Broker::new(&settings, receiver, requests.clone());
    let serving = async {
        let mut node = tokio::select! {
            node = start_workers(&settings, endpoints, &broker, &supervisor) => node?,
            error = broker.before_pods() => return Err(error),
        };
        let pods = Arc::<ServedKeys>::default();
        if settings.node.pods.is_some() {
            report_pods(&node, &requests, &pods);
        }
        report_rules(&node, &requests);
        requests.sender().post(&ToBroker::Ready).map_err(|_| CommandError::BrokerEnded)?;
        let data_plane = node.data_plane().clone();
        let server = CommandServer { data_plane, settings, requests, pods };
        broker.obey(&server, &mut node).await?;
        node.end().await;
        Ok(())
    };
    tokio::select! {
        outcome = serving => outcome,
        () = writer.run() => Err(CommandError::BrokerEnded),
    }
}

/// Loads mesh and trust, and starts the workers.
async fn start_workers(
    settings: &Arc<Settings>,
    endpoints: BoundEndpoints,
    broker: &Broker,
    supervisor: &Supervisor,
) -> Result<RunningNode, CommandError> {
    let operations = BrokerOperations::new(broker.requests.clone(), SocketsOf::Node, None);
    let access = NamespaceAccess::through(Arc::new(operations));
    let (identities, readiness) = (Some(broker.identities.clone()), broker.readiness.clone());
    let watcher = FileWatcher::new(Inotify::open);
    let loading =
        LoadedNode::load(settings, &access, identities, readiness, endpoints, &watcher, supervisor);
    let node = loading.await?;
    let loaded = broker.requests.sender().post(&ToBroker::Loaded);
    loaded.map_err(|_| CommandError::BrokerEnded)?;
    node.serve(supervisor).await
}

/// The messages of the broker.
struct Broker {
    receiver: Receiver,
    requests: Requests,
    identities: Arc<ReceivedIdentities>,
    readiness: Readiness,
    /// The state of the rules of the pod of `underpass run`.
    rules: RulesHealth,
}

impl Broker {
    fn new(settings: &Settings, receiver: Receiver, requests: Requests) -> Self {
        let (identities, rules) = (Arc::default(), RulesHealth::default());
        let readiness = match settings.node.pods {
            Some(_) => Readiness::for_node(),
            None => Readiness::for_pod(rules.clone()),
        };
        Self { receiver, requests, identities, readiness, rules }
    }

    /// Processes messages until the broker ends or sends a command. Cancel-safe.
    async fn before_pods(&self) -> CommandError {
        loop {
            let received =
                self.next().await.map(|(message, attached)| self.apply(message, attached));
            match received {
                Ok(None) => {}
                Ok(Some(_)) => return malformed(),
                Err(error) => return error,
            }
        }
    }

    /// Obeys the broker until it ends this process.
    async fn obey(
        &self,
        server: &CommandServer,
        node: &mut RunningNode,
    ) -> Result<(), CommandError> {
        loop {
            let (message, attached) = self.next().await?;
            let Some((message, attached)) = self.apply(message, attached) else { continue };
            match message {
                ToProxy::Command { number, command } => {
                    let performing = server.clone().perform(number, command, attached);
                    tokio::spawn(log_panic("command of the broker", performing));
                }
                ToProxy::Interception { pod, interception } => server.follow(&pod, &interception),
                ToProxy::EndTest { pod } => server.end_test(&pod),
                ToProxy::Source(report) => node.readiness().source_reports(report),
                ToProxy::Serving => node.ready(),
                ToProxy::Draining => node.drain(),
                ToProxy::HandedOver => node.hand_over(),
                ToProxy::End => return Ok(()),
                _ => return Err(malformed()),
            }
        }
    }

    async fn next(&self) -> Result<(ToProxy, Vec<OwnedFd>), CommandError> {
        let message = self.receiver.next().await.map_err(CommandError::Broker)?;
        let Received { bytes, descriptors } = message.ok_or(CommandError::BrokerEnded)?;
        Ok((ToProxy::decode(&bytes).ok_or_else(malformed)?, descriptors))
    }

    /// Processes a message that may arrive at any time. Returns any other message.
    fn apply(&self, message: ToProxy, attached: Vec<OwnedFd>) -> Option<(ToProxy, Vec<OwnedFd>)> {
        match message {
            ToProxy::Answer { number, answer } => {
                self.requests.answered(number, (answer, attached))
            }
            ToProxy::Certificate(certificate) => self.receive(certificate),
            ToProxy::DropCertificate { identity } => {
                if let Ok(id) = identity.parse() {
                    self.identities.forget(&id);
                }
            }
            ToProxy::Metric(metric) => reported::apply(metric),
            ToProxy::Logging { settings } => apply_logging(&settings),
            ToProxy::Rules(state) => self.rules.copy(state),
            ToProxy::Readiness { number } => {
                let outcome = Ok(Outcome::Readiness(self.readiness.text()));
                // Fails if the broker has ended.
                self.requests.sender().post(&ToBroker::Done { number, outcome }).ok();
            }
            other => return Some((other, attached)),
        }
        None
    }

    fn receive(&self, certificate: Certificate) {
        match certificate.identity() {
            Ok((workload, identity)) => self.identities.receive(workload, identity),
            Err(error) => {
                metrics::certificate_failed();
                tracing::error!(error = chain(&error), "cannot use a certificate of the broker");
            }
        }
    }
}

/// Applies the settings of the log in the text of all settings.
fn apply_logging(settings: &str) {
    match Settings::of_text(SETTINGS, settings) {
        Ok(settings) => logging::apply(&settings.logging),
        Err(errors) => tracing::error!("cannot use the changed settings of the log: {errors}"),
    }
}

fn malformed() -> CommandError {
    CommandError::Broker(io::ErrorKind::InvalidData.into())
}

/// Answers `/healthz/pods` with the status that the broker knows, and the states of certificates.
fn report_pods(node: &RunningNode, requests: &Requests, pods: &Arc<ServedKeys>) {
    let (requests, pods) = (requests.clone(), pods.clone());
    node.readiness().report_pods(move || Box::pin(report(requests.clone(), pods.clone())));
}

/// Answers `/rules` with the report of the broker.
fn report_rules(node: &RunningNode, requests: &Requests) {
    let requests = requests.clone();
    node.admin().report_rules(move |pod| {
        let (requests, pod) = (requests.clone(), pod.to_owned());
        Box::pin(async move {
            match requests.request(Request::Rules { pod }).await {
                Ok((Answer::Rules, attached)) => {
                    let report = read_report(attached).await;
                    report.map_err(|error| RulesError::Unavailable(error.to_string()))
                }
                Ok((Answer::NoSuchPod, _)) => Err(RulesError::UnknownPod),
                Ok(_) => Err(RulesError::Unavailable("the broker sent another answer".to_owned())),
                Err(error) => Err(RulesError::Unavailable(error)),
            }
        })
    });
}

/// Reads a JSON value from the attached socket.
async fn read_report(attached: Vec<OwnedFd>) -> io::Result<Value> {
    let socket = attached.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
    let mut socket = UnixStream::from_std(socket.into())?;
    let mut report = Vec::new();
    socket.read_to_end(&mut report).await?;
    Ok(serde_json::from_slice(&report)?)
}

async fn report(requests: Requests, keys: Arc<ServedKeys>) -> Vec<Pod> {
    let mut known = Vec::new();
    loop {
        match requests.request(Request::Pods { skip: known.len() }).await {
            Ok((Answer::Pods { pods, more }, _)) => {
                let has_more = more && !pods.is_empty();
                known.extend(pods);
                if has_more {
                    continue;
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(error, "cannot get the status of the pods"),
        }
        return keys.complete(known);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use underpass_hbone::IdentityPem;

    use super::*;
    use crate::node::testing::{metrics_after, settings};

    #[tokio::test]
    async fn unusable_certificate_of_broker_counts_as_failure() {
        let (ours, _theirs) = SeqPacket::pair().unwrap();
        let (sender, receiver, _writer) = link::open(ours).unwrap();
        let broker = Broker::new(&settings(&[]), receiver, Requests::new(sender));
        let (chain, key) = ("no certificate".to_owned(), String::new());
        let pem = IdentityPem { chain, key, bundles: BTreeMap::new() };
        let workload = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let metrics = metrics_after(|| broker.receive(Certificate::new(&workload, pem)));
        assert!(metrics.contains("underpass_certificate_failures_total 1"), "{metrics}");
    }
}
