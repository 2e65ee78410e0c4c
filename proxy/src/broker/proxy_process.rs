//! The proxy process: serves pods by command of the broker, from its start to its end.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use underpass_config::{FileWatcher, IdentitySettings, Settings};
use underpass_hbone::{CertificateIssuer, log_panic};
use underpass_interception::{
    BoundListener, Inotify, Message as Received, NamespaceAccess, ProxyUser, SeqPacket,
    raise_open_files,
};

use crate::broker::issuer::BrokerIssuer;
use crate::broker::link::{self, Receiver};
use crate::broker::message::{
    Answer, MAX_MESSAGE, Message as _, Request, SocketsOf, ToBroker, ToProxy,
};
use crate::broker::operations::{BrokerOperations, Requests};
use crate::broker::reported;
use crate::broker::served::{CommandServer, ServedKeys};
use crate::process::app::run_until_failure;
use crate::process::command_error::CommandError;
use crate::process::node_proxy::{LoadedNode, RunningNode};
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Supervisor;
use crate::traffic::listeners::{EndpointKind, Listeners};

/// The first message of the broker.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) settings: Settings,
    endpoints: Listeners<EndpointKind>,
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
        let Some(ToProxy::Start { settings, endpoints }) = ToProxy::decode(&message.bytes) else {
            return Err(malformed());
        };
        let settings = Settings::of_text("the broker's settings", &settings);
        let settings = settings.map_err(io::Error::other)?;
        let adopt =
            |(name, listener)| -> io::Result<_> { Ok((name, BoundListener::try_from(listener)?)) };
        let named = endpoints.into_iter().zip(message.descriptors).map(adopt);
        let endpoints = Listeners::adopt(named.collect::<io::Result<_>>()?);
        Ok(Self { settings, endpoints: endpoints.ok_or_else(malformed)?, socket })
    }
}

/// Serves pods until the broker ends this process.
///
/// # Errors
///
/// The process cannot start, or the broker has ended.
pub(crate) async fn run(start: Start) -> Result<(), CommandError> {
    let (supervisor, failures) = Supervisor::new();
    run_until_failure(Box::pin(live(start, supervisor)), failures).await
}

async fn live(start: Start, supervisor: Supervisor) -> Result<(), CommandError> {
    // Signals to the process group reach the broker too, which stops this process.
    let _ignored = StopSignal::new(false)?;
    raise_open_files().map_err(CommandError::Start)?;
    let Start { settings, endpoints, socket } = start;
    let settings = Arc::new(settings);
    let (sender, receiver, writer) = link::open(socket).map_err(CommandError::Start)?;
    let (requests, pods) = (Requests::new(sender), Arc::<ServedKeys>::default());
    let operations = BrokerOperations::new(requests.clone(), SocketsOf::Node, None);
    let access = NamespaceAccess::through(Arc::new(operations));
    let authority = issuer(&settings, &requests, &pods);
    let watcher = FileWatcher::new(Inotify::open);
    let node = LoadedNode::load(&settings, &access, authority, &watcher, &supervisor)?;
    let node = node.serve(endpoints, &supervisor).await?;
    report_pods(&node, &requests, &pods);
    let data_plane = node.data_plane().clone();
    let server = CommandServer { data_plane, settings, requests: requests.clone(), pods };
    requests.sender().post(&ToBroker::Ready).map_err(|_| CommandError::BrokerEnded)?;
    tokio::select! {
        outcome = obey(&receiver, &server, &node) => outcome?,
        () = writer.run() => return Err(CommandError::BrokerEnded),
    }
    node.end().await;
    Ok(())
}

/// Obeys the broker until it ends this process.
async fn obey(
    receiver: &Receiver,
    server: &CommandServer,
    node: &RunningNode,
) -> Result<(), CommandError> {
    let malformed = || CommandError::Start(io::ErrorKind::InvalidData.into());
    loop {
        let message = receiver.next().await.map_err(CommandError::Start)?;
        let Some(Received { bytes, descriptors }) = message else {
            return Err(CommandError::BrokerEnded);
        };
        let message = ToProxy::decode(&bytes).ok_or_else(malformed)?;
        match message {
            ToProxy::Command { number, command } => {
                let performing = server.clone().perform(number, command, descriptors);
                tokio::spawn(log_panic("command of the broker", performing));
            }
            ToProxy::Answer { number, answer } => {
                server.requests.answered(number, (answer, descriptors));
            }
            ToProxy::Interception { pod, interception } => server.follow(&pod, &interception),
            ToProxy::EndTest { pod } => server.end_test(&pod),
            ToProxy::Metric(metric) => reported::apply(metric),
            ToProxy::Source(report) => node.readiness().source_reports(report),
            ToProxy::Serving => node.readiness().ready(),
            ToProxy::Draining => node.drain(),
            ToProxy::End => return Ok(()),
            ToProxy::Start { .. } => return Err(malformed()),
        }
    }
}

/// The issuer of certificates, if the broker has a local CA.
fn issuer(
    settings: &Settings,
    requests: &Requests,
    pods: &Arc<ServedKeys>,
) -> Option<Arc<dyn CertificateIssuer>> {
    let Some(IdentitySettings::LocalCa(ca)) = &settings.identity else { return None };
    let (requests, pods) = (requests.clone(), pods.clone());
    Some(Arc::new(BrokerIssuer { requests, pods, name: ca.dir.display().to_string() }))
}

/// Answers `/healthz/pods` with the status that the broker knows, and the states of certificates.
fn report_pods(node: &RunningNode, requests: &Requests, pods: &Arc<ServedKeys>) {
    let (requests, pods) = (requests.clone(), pods.clone());
    node.readiness().report_pods(move || Box::pin(report(requests.clone(), pods.clone())));
}

async fn report(requests: Requests, keys: Arc<ServedKeys>) -> String {
    let (mut text, mut skip) = (String::new(), 0);
    loop {
        match requests.request(Request::Pods { skip }).await {
            Ok((Answer::Pods { pods, more }, _)) => {
                skip += pods.len();
                let goes_on = more && !pods.is_empty();
                text.extend(pods.into_iter().map(|line| keys.complete(line)));
                if !goes_on {
                    return text;
                }
            }
            Ok(_) => return text,
            Err(error) => {
                tracing::warn!(error, "cannot get the status of the pods");
                return text;
            }
        }
    }
}
