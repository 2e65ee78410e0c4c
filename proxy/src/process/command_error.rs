//! Why a command failed, and its exit code.

mod hint;

use std::io;
use std::net::SocketAddr;
use std::process::{ExitCode, ExitStatus};

use metrics_exporter_prometheus::BuildError;
use thiserror::Error;
use underpass_config::ConfigErrors;
use underpass_hbone::{CollectorError, HboneError};
use underpass_interception::InterceptionError;

use crate::admin::client::AdminClientError;
use crate::demo::DemoError;
use crate::mesh::feed::MeshFeedError;
use crate::node::pod_error::PodError;
use crate::pods::cni::install::InstallError;
use crate::pods::source::SourceEnd;
use crate::pods::take_over::incoming::AdoptionError;
use crate::process::instance::{InstanceError, Running};
use crate::process::supervise::TaskFailure;
use crate::process::take_over::TakeOverError;
use crate::process::take_over::control_socket::SocketError;

/// Why a command failed.
#[derive(Debug, Error)]
pub(crate) enum CommandError {
    /// Exit code 2: the configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// Exit code 2: the mistakes are already printed.
    #[error("mistakes in the configuration: {0}")]
    Mistakes(usize),
    #[error(transparent)]
    Interception(#[from] InterceptionError),
    #[error(transparent)]
    Pod(#[from] PodError),
    /// An essential task failed.
    #[error("an internal error stops the proxy")]
    Task(#[source] TaskFailure),
    #[error("cannot take over")]
    TakeOver(#[from] TakeOverError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Admin(#[from] AdminClientError),
    #[error(transparent)]
    Adoption(#[from] AdoptionError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error("a running proxy ({0}) would install the rules again")]
    KeptByProxy(Box<Running>),
    #[error("interception.profile is none: there are no rules to manage")]
    NoRules,
    #[error("node.pods is set: these are the settings of `underpass node`, not of `underpass run`")]
    SettingsOfNode,
    #[error("node.pods is not set: `underpass node` has no source of pods")]
    NoPodSource,
    #[error("node.name is not set: the API server selects the pods of this node by it")]
    NoNodeName,
    #[error(transparent)]
    PodSource(#[from] SourceEnd),
    /// Exit code 3: the rules differ. The difference is already printed.
    #[error("the installed rules differ from those of the settings")]
    Difference,
    /// Exit code 3: other rules bypass the installed ones.
    #[error("the rules are installed, but other rules bypass them: {0}")]
    Bypassed(String),
    /// Exit code 3: the problems are already printed.
    #[error("the proxy is not healthy: {problems} {}", if *problems == 1 { "problem" } else { "problems" })]
    Unhealthy { problems: usize },
    #[error(transparent)]
    Hbone(#[from] HboneError),
    #[error(transparent)]
    Mesh(#[from] MeshFeedError),
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// The proxy process has logged why it ended.
    #[error("the proxy process has ended{}", described(*status))]
    ProxyProcess { status: Option<ExitStatus> },
    /// The process in the background has logged why it ended.
    #[error("the new process ended before it served: {status}")]
    NotServing { status: ExitStatus },
    #[error("the broker process has ended")]
    BrokerEnded,
    #[error("cannot receive from the broker process")]
    Broker(#[source] io::Error),
    #[error("a broker of underpass starts this command")]
    InternalCommand(#[source] io::Error),
    #[error("cannot set up the process")]
    Start(#[source] io::Error),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Collector(#[from] CollectorError),
    #[error("cannot set up the metrics")]
    Metrics(#[source] BuildError),
    #[error("there is no command {0:?}")]
    NoSuchCommand(String),
    /// A call of the CNI plugin failed. Its result is already printed.
    #[error("{0}")]
    Plugin(String),
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The findings are already printed.
    #[error("failed checks: {0}")]
    ChecksFailed(usize),
    #[error("the drain of {0} was ended by another command, a hot restart or a new enrolment")]
    DrainEnded(String),
    #[error("cannot write the result")]
    Output(#[source] io::Error),
}

fn described(status: Option<ExitStatus>) -> String {
    status.map(|status| format!(": {status}")).unwrap_or_default()
}

/// The exit code after the end of another underpass process: 2 if its configuration was invalid.
fn of_process(status: Option<ExitStatus>) -> ExitCode {
    match status.and_then(|status| status.code()) {
        Some(2) => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}

impl CommandError {
    /// The error of a thread that could not be started (EAGAIN: pthread_create(3)).
    pub(crate) fn start(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::Thread(error),
            _ => Self::Start(error),
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_)
            | Self::Mesh(MeshFeedError::File(_))
            | Self::Mistakes(_)
            | Self::NoRules
            | Self::SettingsOfNode
            | Self::NoPodSource
            | Self::NoNodeName
            | Self::NoSuchCommand(_) => ExitCode::from(2),
            Self::ProxyProcess { status } => of_process(*status),
            Self::NotServing { status } => of_process(Some(*status)),
            Self::Difference | Self::Bypassed(_) | Self::Unhealthy { .. } => ExitCode::from(3),
            _ => ExitCode::FAILURE,
        }
    }
}
