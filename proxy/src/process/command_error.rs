//! Why a command failed, and its exit code.

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;

use metrics_exporter_prometheus::BuildError;
use thiserror::Error;
use underpass_config::ConfigErrors;
use underpass_hbone::HboneError;
use underpass_interception::InterceptionError;

use crate::demo::DemoError;
use crate::node::pod_error::PodError;
use crate::pods::source::SourceEnd;
use crate::process::instance::{InstanceError, Running};
use crate::process::supervise::TaskFailure;
use crate::process::take_over::TakeOverError;

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
    /// The process cannot go on without this task.
    #[error(
        "an internal error ends the proxy; the rules stay and connections are refused until it runs again"
    )]
    Task(#[source] TaskFailure),
    #[error("cannot take over")]
    TakeOver(#[from] TakeOverError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(
        "the rules are those of a proxy that runs ({0}), which would put them back: stop it, or replace them all the same \
         with `--force`"
    )]
    KeptByProxy(Box<Running>),
    #[error(
        "interception.profile is none: there are no rules to manage; choose ambient, sidecar or osm (`--profile`)"
    )]
    NoRules,
    #[error("node.pods is set: these are the settings of `underpass node`, not of `underpass run`")]
    SettingsOfNode,
    #[error("node.pods is not set: `underpass node` needs a source of pods, zds, cni or directory")]
    NoPodSource,
    #[error(transparent)]
    PodSource(#[from] SourceEnd),
    /// Exit code 3: the rules differ. The difference is already printed.
    #[error("the rules that are installed are not those of these settings")]
    Difference,
    /// Exit code 3: other rules bypass the installed ones.
    #[error("the rules are installed, but traffic passes them by: {0}")]
    Bypassed(String),
    #[error(transparent)]
    Hbone(#[from] HboneError),
    #[error(transparent)]
    Demo(#[from] DemoError),
    #[error("the process could not be set up")]
    Start(#[source] io::Error),
    #[error(
        "a thread cannot be started: is a limit of processes too low (`ulimit -u`, pids.max of the cgroup, TasksMax of the \
         service)?"
    )]
    Thread(#[source] io::Error),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("metrics could not be set up")]
    Metrics(#[source] BuildError),
    #[error("there is no command {0:?}: `underpass --help` lists them")]
    NoSuchCommand(String),
    #[error("the result could not be written")]
    Output(#[source] io::Error),
}

impl CommandError {
    /// An error of starting a thread (EAGAIN: pthread_create(3)).
    pub(crate) fn start(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::Thread(error),
            _ => Self::Start(error),
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_)
            | Self::Mistakes(_)
            | Self::Pod(PodError::NoDnsProxy { .. })
            | Self::NoRules
            | Self::SettingsOfNode
            | Self::NoPodSource
            | Self::NoSuchCommand(_) => ExitCode::from(2),
            Self::Difference | Self::Bypassed(_) => ExitCode::from(3),
            _ => ExitCode::FAILURE,
        }
    }
}
