//! `underpass run`.

use std::path::PathBuf;

use tokio::runtime::Runtime;
use underpass_config::{Settings, Sources};
use underpass_interception::drop_capabilities;

use super::CommandError;
use crate::app::{self, Start};
use crate::{capture, logging};

/// Where settings come from.
#[derive(Debug, clap::Args)]
pub(super) struct SettingsArguments {
    /// The settings file (YAML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one key over the file and the environment, such as proxy.workers=2; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl SettingsArguments {
    pub(super) fn load(self) -> Result<Settings, CommandError> {
        Ok(self.sources().load()?)
    }

    fn sources(self) -> Sources {
        Sources::of_process(self.config, self.set)
    }

    /// Whether they name no file and set nothing.
    pub(super) fn are_empty(&self) -> bool {
        self.config.is_none() && self.set.is_empty()
    }

    /// The same with more settings, which win.
    pub(super) fn with(mut self, assignments: impl IntoIterator<Item = String>) -> Self {
        self.set.extend(assignments);
        self
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  underpass run --config underpass.yaml --set logging.format=json\n\nA new version or other settings, without a connection that fails:\n  underpass run --config underpass.yaml --take-over"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// Stop when standard input ends: a child of a test must not outlive it
    #[arg(long)]
    until_eof: bool,
    /// Take over from the process that runs, without a connection that fails; start as ever if none does
    #[arg(long)]
    take_over: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    let sources = arguments.settings.sources();
    let settings = sources.load()?;
    let _logs = logging::start(&settings.logging)?;
    let runtime = control_runtime()?;
    let start = Start { until_eof: arguments.until_eof, take_over: arguments.take_over };
    let outcome = runtime.block_on(app::run(settings, sources, start));
    // Dropping it would wait for the thread that still waits for a worker which does not end.
    runtime.shutdown_background();
    outcome
}

/// The runtime of this thread, which may keep a capability; threads on which it waits for what blocks need none. They give
/// it up only once the user has changed: that has to succeed on every thread or on none (setxid in nptl(7)).
fn control_runtime() -> Result<Runtime, CommandError> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().on_thread_start(|| {
        if capture::has_become_proxy()
            && let Err(error) = drop_capabilities()
        {
            tracing::warn!(%error, "a thread keeps capabilities that it does not need");
        }
    });
    runtime.build().map_err(CommandError::Start)
}
