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
use crate::error::chain;
use crate::process::instance::{InstanceError, Running};
use crate::process::take_over::TakeOverError;
use crate::rules::self_test::SelfTestError;

/// Why a command did not do what it was told.
#[derive(Debug, Error)]
pub(crate) enum CommandError {
    /// Exit code 2: the operator can mend it in the configuration.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// Exit code 2: the mistakes are printed already.
    #[error("mistakes in the configuration: {0}")]
    Mistakes(usize),
    #[error(transparent)]
    Interception(#[from] InterceptionError),
    #[error("there is no certificate to begin with (identity, trust)")]
    Identity(#[source] HboneError),
    #[error(
        "interception.dns: capture leads DNS queries to port {port}, but `underpass run` has no DNS proxy yet: they would \
         be refused. Set interception.dns: off; `underpass rules install` can lead them to a DNS proxy of your own"
    )]
    NoDnsProxy { port: u16 },
    #[error("{}{}", chain(error), listed(suspects))]
    SelfTest {
        error: SelfTestError,
        /// What may be the cause.
        suspects: Vec<String>,
    },
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
        "interception.profile is none: there are no rules to look after; choose ambient, sidecar or osm (`--profile`)"
    )]
    NoRules,
    /// Exit code 3: the result, already printed, is that there is a difference.
    #[error("the rules that are installed are not those of these settings")]
    Difference,
    /// Exit code 3 as well.
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
    /// What went wrong while something was started that needs a thread (EAGAIN: pthread_create(3)).
    pub(crate) fn start(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::Thread(error),
            _ => Self::Start(error),
        }
    }

    /// A self-test that could not be made.
    pub(crate) fn self_test(error: SelfTestError) -> Self {
        Self::SelfTest { error, suspects: Vec::new() }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_)
            | Self::Mistakes(_)
            | Self::NoDnsProxy { .. }
            | Self::NoRules
            | Self::NoSuchCommand(_) => ExitCode::from(2),
            Self::Difference | Self::Bypassed(_) => ExitCode::from(3),
            _ => ExitCode::FAILURE,
        }
    }
}

fn listed(suspects: &[String]) -> String {
    let suspects = suspects.iter().map(|suspect| format!("; found here: {suspect}"));
    suspects.collect()
}
